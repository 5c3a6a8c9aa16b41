from itertools import combinations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from metamerge.errors import ConfigError, ZooError
from zoo.splits import describe, disjoint, everything, overlapping, validate

CLASSES = 10
TARGETS = torch.arange(3000) * 7 % CLASSES
ROWS = torch.arange(500, 2500)  # 200 of each class


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sizes(segments):
    return [len(segment) for segment in segments]


def shared(one, other):
    return int(torch.isin(one, other).sum())


# ---------------------------------------------------------------------------- disjoint


def test_disjoint_shares_all_rows_out_to_within_one_row():
    assert sorted(sizes(disjoint(TARGETS, ROWS, 7, generator=seeded()))) == [285] * 2 + [286] * 5


def test_disjoint_segments_have_no_skew():
    counts = describe(disjoint(TARGETS, ROWS, 4, generator=seeded()), TARGETS, CLASSES)
    # 500 of 2000 rows, 200 per class: hypergeometric, mean 50, deviation sqrt(50 * .75 * .9).
    assert ((counts - 50).abs() < 5 * (50 * 0.75 * 0.9) ** 0.5).all()


# ---------------------------------------------------------------------------- overlapping


def test_half_of_ten_rows_are_common_to_three_members():
    segments = overlapping(TARGETS, ROWS[:20], 3, size=10, generator=seeded())
    assert sizes(segments) == [10, 10, 10]
    core = set(segments[0].tolist()) & set(segments[1].tolist())
    assert len(core) == 5
    assert all(core <= set(segment.tolist()) for segment in segments)
    assert len(torch.cat(segments).unique()) == 5 + 3 * 5  # so all twenty


def test_thirty_rows_make_a_core_of_ten_and_ten_more_for_each_of_two():
    # Without a size: core = 30 * 1/2 / (1/2 + 2 * 1/2) = 10.
    one, other = overlapping(TARGETS, ROWS[:30], 2, generator=seeded())
    assert sizes([one, other]) == [20, 20]
    assert shared(one, other) == 10


@given(
    rows=st.integers(1, 300),
    members=st.integers(1, 9),
    share=st.floats(0, 1),
    size=st.none() | st.integers(1, 300),
)
def test_any_two_members_share_the_core_and_nothing_else(rows, members, share, size):
    if size is None:
        assume(members <= rows)
        core = round(rows * share / (share + members * (1 - share)))
    else:
        core = round(share * size)
        assume(core + members * (size - core) <= rows)
    segments = overlapping(
        TARGETS, ROWS[:rows], members, share=share, size=size, generator=seeded()
    )
    validate(segments, ROWS[:rows], disjoint=False)
    assert all(shared(one, other) == core for one, other in combinations(segments, 2))
    if size is None:
        assert torch.cat(segments).unique().equal(ROWS[:rows])
        assert max(sizes(segments)) - min(sizes(segments)) <= 1
    else:
        assert sizes(segments) == [size] * members


def test_a_core_of_nothing_is_disjoint_and_one_of_everything_one_sample():
    validate(overlapping(TARGETS, ROWS, 4, share=0, size=500, generator=seeded()), ROWS)
    one, other = overlapping(TARGETS, ROWS, 2, share=1, size=500, generator=seeded())
    assert one.sort().values.equal(other.sort().values)
    assert not one.equal(other)


def test_core_rows_stand_anywhere_in_a_segment():
    one, other = overlapping(TARGETS, ROWS, 2, generator=seeded())
    places = torch.isin(one, other).nonzero().double()
    # Uniform over n places: the deviation of a place is n / sqrt(12).
    tolerance = 5 * len(one) / 12**0.5 / len(places) ** 0.5
    assert abs(places.mean() - len(one) / 2) < tolerance


def test_more_rows_than_there_are_is_refused_with_the_largest_size_that_fits():
    message = (
        r"3 members x 11 rows, 6 of them common, need 21 rows, got 20\. The largest size is 10"
    )
    with pytest.raises(ZooError, match=message):
        overlapping(TARGETS, ROWS[:20], 3, size=11, generator=seeded())
    overlapping(TARGETS, ROWS[:20], 3, size=10, generator=seeded())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ConfigError, match=r"overlapping: share must be in \[0, 1\]"):
        overlapping(TARGETS, ROWS, 2, share=share, generator=seeded())


# ---------------------------------------------------------------------------- everything


def test_every_member_gets_all_rows_in_an_order_of_its_own():
    segments = everything(TARGETS, ROWS, 3, generator=seeded())
    assert all(segment.sort().values.equal(ROWS) for segment in segments)
    assert not any(one.equal(other) for one, other in combinations(segments, 2))


def test_more_members_than_rows_may_hold_everything():
    assert sizes(everything(TARGETS, ROWS[:2], 5, generator=seeded())) == [2] * 5
