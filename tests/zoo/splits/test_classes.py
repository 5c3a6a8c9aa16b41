import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metamerge.errors import ConfigError, ZooError
from zoo.splits import classes, describe, validate

CLASSES = 10
TARGETS = torch.arange(3000) * 7 % CLASSES
ROWS = torch.arange(500, 2500)  # 200 of each class


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def counts_of(members, targets=TARGETS, rows=ROWS, seed=0, **options):
    segments = classes(targets, rows, members, generator=seeded(seed), **options)
    validate(segments, rows)
    return describe(segments, targets, CLASSES)  # [members, classes]


def test_five_members_of_two_classes_hold_all_ten_whole():
    counts = counts_of(5)
    assert (counts.sum(0) == 200).all()
    assert sorted(counts.flatten().tolist()) == [0] * 40 + [200] * 10


def test_three_rows_of_a_class_go_to_two_members_as_two_and_one():
    targets = torch.tensor([0, 0, 0, 1, 1])
    counts = counts_of(2, targets, torch.arange(5))
    assert sorted(counts[:, 0].tolist()) == [1, 2]
    assert counts[:, 1].tolist() == [1, 1]


@given(members=st.integers(1, 12), each=st.integers(1, CLASSES), seed=st.integers(0, 100))
def test_classes_are_held_as_evenly_as_they_can_be(members, each, seed):
    counts = counts_of(members, classes_per_segment=each, seed=seed)
    holders = (counts > 0).sum(0)
    assert ((counts > 0).sum(1) == each).all()
    assert holders.max() - holders.min() <= 1
    assert (holders > 0).all() == (members * each >= CLASSES)
    for held in counts.T[holders > 0]:
        assert held.sum() == 200
        assert held[held > 0].max() - held[held > 0].min() <= 1


def test_every_pair_of_classes_can_meet_in_a_member():
    met = torch.zeros(CLASSES, CLASSES)
    for seed in range(100):
        held = (counts_of(5, seed=seed) > 0).float()
        met += held.T @ held
    # 500 pairs among 45: a pair that never comes has probability (44 / 45)**500, about 1e-5.
    assert (met.fill_diagonal_(1) > 0).all()


def test_a_size_is_taken_evenly_from_the_classes_of_a_member():
    counts = counts_of(5, classes_per_segment=3, size=100)
    assert (counts.sum(1) == 100).all()
    assert all(sorted(c[c > 0].tolist()) == [33, 33, 34] for c in counts)


def test_where_a_class_is_scarce_the_other_classes_of_a_member_stand_in():
    targets = torch.tensor([0] * 10 + [1] * 90)
    segments = classes(targets, torch.arange(100), 1, size=40, generator=seeded())
    assert describe(segments, targets, 2).tolist() == [[10, 30]]


def test_classes_that_the_rows_lack_are_passed_over():
    rows = ROWS[TARGETS[ROWS] % 2 == 0]
    counts = counts_of(3, rows=rows)
    assert counts[:, 1::2].sum() == 0
    assert ((counts > 0).sum(1) == 2).all()


def test_more_classes_per_segment_than_there_are_is_refused():
    rows = ROWS[TARGETS[ROWS] < 3]
    with pytest.raises(ZooError, match="classes_per_segment=4, but the rows have 3 classes"):
        counts_of(2, rows=rows, classes_per_segment=4)


def test_a_class_with_fewer_rows_than_holders_is_refused():
    targets = torch.tensor([0] * 50 + [1] * 2)
    with pytest.raises(ZooError, match="class 1 has 2 rows for 3 members"):
        classes(targets, torch.arange(52), 3, generator=seeded())


def test_a_size_beyond_the_rows_of_a_members_classes_is_refused():
    with pytest.raises(ZooError, match=r"segments\[\d\] has 200 rows in its classes, size=201"):
        counts_of(4, classes_per_segment=1, size=201)


@pytest.mark.parametrize("each", [0, -1, 2.0, True])
def test_classes_per_segment_must_be_a_positive_whole_number(each):
    with pytest.raises(ConfigError, match="classes_per_segment must be a whole number above 0"):
        counts_of(4, classes_per_segment=each)
