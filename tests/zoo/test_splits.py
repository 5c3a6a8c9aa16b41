import time

import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.splits import SPLITS, describe, dirichlet, disjoint, validate

CLASSES = 10
TARGETS = torch.arange(3000) * 7 % CLASSES
ROWS = torch.arange(500, 2500)  # 200 of each class

WAYS = {
    "disjoint, all rows": (disjoint, {}),
    "disjoint, of a size": (disjoint, {"size": 100}),
    "dirichlet, all rows": (dirichlet, {"alpha": 0.5}),
    "dirichlet, of a size": (dirichlet, {"alpha": 0.5, "size": 100}),
    "dirichlet, overlapping": (dirichlet, {"alpha": 0.5, "size": 100, "overlap": True}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sizes(segments):
    return [len(segment) for segment in segments]


# ---------------------------------------------------------------------------- every split


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("members", [1, 2, 7])
def test_segments_are_an_honest_cut(way, members):
    split, options = WAYS[way]
    segments = split(TARGETS, ROWS, members, generator=seeded(), **options)
    assert len(segments) == members
    validate(segments, ROWS, disjoint=not options.get("overlap", False))
    if "size" in options:
        assert sizes(segments) == [100] * members
    else:
        assert torch.cat(segments).sort().values.equal(ROWS)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_the_same_segments_and_another_seed_others(way):
    split, options = WAYS[way]
    one, same, other = (split(TARGETS, ROWS, 4, generator=seeded(s), **options) for s in (1, 1, 2))
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))


@pytest.mark.parametrize("way", WAYS)
def test_a_generator_moves_on_from_family_to_family(way):
    split, options = WAYS[way]
    generator = seeded()
    one, other = (split(TARGETS, ROWS, 4, generator=generator, **options) for _ in range(2))
    assert not any(map(torch.equal, one, other))


@pytest.mark.parametrize("way", WAYS)
def test_splits_change_neither_their_inputs_nor_the_global_generator(way):
    split, options = WAYS[way]
    targets, rows, state = TARGETS.clone(), ROWS.clone(), torch.get_rng_state()
    segments = split(targets, rows, 4, generator=seeded(), **options)
    for segment in segments:
        segment.fill_(-1)
    assert torch.equal(targets, TARGETS)
    assert torch.equal(rows, ROWS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("way", WAYS)
def test_the_first_rows_of_a_segment_are_a_fair_sample_of_it(way):
    split, options = WAYS[way]
    for segment in split(TARGETS, ROWS, 2, generator=seeded(), **options):
        # In random order ranks and places do not correlate: the standard error is 1 / sqrt(n).
        for values in (segment, TARGETS[segment]):
            table = torch.stack([torch.arange(len(segment)), values]).float()
            assert abs(torch.corrcoef(table)[0, 1]) < 5 / len(segment) ** 0.5


@pytest.mark.parametrize("way", WAYS)
def test_every_segment_is_spread_over_all_rows(way):
    split, options = WAYS[way]
    for segment in split(TARGETS, ROWS, 4, generator=seeded(), **options):
        values = segment.double()
        assert (values.mean() - ROWS.double().mean()).abs() < 5 * values.std() / len(segment) ** 0.5


@pytest.mark.parametrize("way", WAYS)
def test_segments_share_no_memory(way):
    split, options = WAYS[way]
    segments = split(TARGETS, ROWS, 4, generator=seeded(), **options)
    storages = {segment.untyped_storage().data_ptr() for segment in segments}
    assert len(storages) == 4
    assert all(len(s) * 8 == s.untyped_storage().nbytes() for s in segments)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("targets", "rows", "members", "error", "message"),
    [
        (TARGETS, ROWS, 0, ConfigError, "members must be a whole number above 0, got 0"),
        (TARGETS, ROWS, 2.0, ConfigError, "members must be a whole number"),
        (TARGETS, ROWS, True, ConfigError, "members must be a whole number"),
        (TARGETS, ROWS[:0], 2, ZooError, "do not fit into 0 rows"),
        (TARGETS, ROWS.float(), 2, ZooError, "rows must be an int64 vector"),
        (TARGETS.float(), ROWS, 2, ZooError, "targets must be an int64 vector"),
        (TARGETS - 1, ROWS, 2, ZooError, "targets must be 0 or above, got -1"),
        (TARGETS, ROWS + 501, 2, ZooError, "rows 1001 to 3000 .* the task has rows 0 to 2999"),
        (TARGETS, ROWS - 501, 2, ZooError, "rows -1 to 1998"),
        (TARGETS, ROWS.repeat(2), 2, ZooError, "2000 rows are named more than once"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(way, targets, rows, members, error, message):
    split, options = WAYS[way]
    with pytest.raises(error, match=f"{split.__name__}: .*{message}"):
        split(targets, rows, members, generator=seeded(), **options)


@pytest.mark.parametrize(("split", "options"), [(disjoint, {}), (dirichlet, {"alpha": 1.0})])
def test_a_size_that_does_not_fit_is_refused_with_the_largest_that_does(split, options):
    with pytest.raises(ZooError, match="The largest size is 285, or fewer members"):
        split(TARGETS, ROWS, 7, size=286, generator=seeded(), **options)
    assert sizes(split(TARGETS, ROWS, 7, size=285, generator=seeded(), **options)) == [285] * 7


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
@pytest.mark.parametrize(("split", "options"), [(disjoint, {}), (dirichlet, {"alpha": 1.0})])
def test_a_size_that_is_no_positive_whole_number_is_refused(split, options, size):
    with pytest.raises(ConfigError, match="size must be a whole number above 0"):
        split(TARGETS, ROWS, 2, size=size, generator=seeded(), **options)


def test_every_split_is_registered_under_its_name():
    assert {name: split.__name__ for name, split in SPLITS.items()} == {
        "disjoint": "disjoint",
        "dirichlet": "dirichlet",
    }


# ---------------------------------------------------------------------------- disjoint


def test_disjoint_shares_all_rows_out_to_within_one_row():
    assert sorted(sizes(disjoint(TARGETS, ROWS, 7, generator=seeded()))) == [285] * 2 + [286] * 5


def test_disjoint_segments_have_no_skew():
    counts = describe(disjoint(TARGETS, ROWS, 4, generator=seeded()), TARGETS, CLASSES)
    # 500 of 2000 rows, 200 per class: hypergeometric, mean 50, deviation sqrt(50 * .75 * .9).
    assert ((counts - 50).abs() < 5 * (50 * 0.75 * 0.9) ** 0.5).all()


# ---------------------------------------------------------------------------- dirichlet


def mean_square_share(alpha, parts):
    """Return E[sum of squared shares] of a symmetric Dirichlet distribution."""
    return (alpha + 1) / (parts * alpha + 1)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0, 20.0])
def test_classes_are_dealt_in_dirichlet_proportions(alpha):
    members, generator = 4, seeded()
    squares = []
    for _ in range(100):
        segments = dirichlet(TARGETS, ROWS, members, alpha=alpha, min_rows=1, generator=generator)
        shares = describe(segments, TARGETS, CLASSES) / 200  # [members, classes]
        squares.append(shares.square().sum(0))
    squares = torch.cat(squares)  # one per family and class, independent
    error = squares.std() / len(squares) ** 0.5
    # Rounding to whole rows moves a share by 1/200 at most.
    assert abs(squares.mean() - mean_square_share(alpha, members)) < 5 * error + 2e-3


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0, 20.0])
def test_members_of_a_size_draw_their_own_dirichlet_mix(alpha):
    size, members = 100, 1000  # 100 of 200 rows per class: a class seldom runs out ...
    targets = torch.arange(4000) % 4  # ... and with 1000 per class it never does
    segments = dirichlet(
        targets, torch.arange(4000), members, alpha=alpha, size=size, overlap=True,
        generator=seeded(),
    )  # fmt: skip
    squares = (describe(segments, targets, 4) / size).square().sum(1)  # [members]
    # Drawing `size` rows adds the multinomial variance (1 - E[sum of squares]) / size.
    expected = mean_square_share(alpha, 4)
    expected += (1 - expected) / size
    assert abs(squares.mean() - expected) < 5 * squares.std() / members**0.5


def test_a_class_that_runs_out_is_replaced_by_the_others():
    targets = torch.tensor([0] * 10 + [1] * 90)
    segments = dirichlet(targets, torch.arange(100), 4, alpha=0.01, size=25, generator=seeded())
    assert describe(segments, targets, 2).sum(0).tolist() == [10, 90]


def test_no_place_among_the_members_is_favoured_when_rows_are_scarce():
    # Mixes of practically one class of 30 rows, 20 rows each: the first two members to choose get
    # one class each or share one, and the third takes what is left.
    targets, generator, pure = torch.arange(60) % 2, seeded(), []
    for _ in range(300):
        segments = dirichlet(targets, torch.arange(60), 3, alpha=1e-4, size=20, generator=generator)
        pure.append(describe(segments, targets, 2).max(1).values == 20)
    pure = torch.stack(pure).double()  # [families, members]
    assert 0 < pure.mean() < 1
    for place in (1, 2):
        difference = pure[:, 0] - pure[:, place]
        assert difference.mean().abs() < 5 * difference.std() / 300**0.5


def test_every_member_gets_its_fewest_rows():
    generator = seeded()
    smallest = [
        min(sizes(dirichlet(TARGETS, ROWS, 6, alpha=0.1, min_rows=80, generator=generator)))
        for _ in range(30)
    ]
    assert min(smallest) >= 80
    free = [
        min(sizes(dirichlet(TARGETS, ROWS, 6, alpha=0.1, min_rows=1, generator=generator)))
        for _ in range(30)
    ]
    assert min(free) < 80  # so the condition above did something


def test_ten_rows_are_the_fewest_unless_told():
    generator = seeded()
    smallest = [
        min(sizes(dirichlet(TARGETS, ROWS, 8, alpha=0.05, generator=generator))) for _ in range(50)
    ]
    assert 10 <= min(smallest) < 50


def test_more_fewest_rows_than_there_are_is_refused_with_the_largest_number():
    with pytest.raises(ZooError, match=r"need 2004 rows, got 2000\. The largest min_rows is 500"):
        dirichlet(TARGETS, ROWS, 4, alpha=1.0, min_rows=501, generator=seeded())


def test_fewest_rows_that_no_draw_reaches_end_with_an_error():
    with pytest.raises(ZooError, match="none of 1000 draws gave each of 40 members 10 rows"):
        dirichlet(TARGETS, ROWS, 40, alpha=0.01, generator=seeded())


def test_overlapping_members_share_rows_but_hold_none_twice():
    segments = dirichlet(TARGETS, ROWS, 4, alpha=1.0, size=1500, overlap=True, generator=seeded())
    validate(segments, ROWS, disjoint=False)
    with pytest.raises(ZooError, match="also in other segments"):
        validate(segments, ROWS)


def test_an_overlapping_member_may_hold_every_row_and_no_more():
    options = {"alpha": 0.01, "overlap": True, "generator": seeded()}
    for segment in dirichlet(TARGETS, ROWS, 3, size=2000, **options):
        assert segment.sort().values.equal(ROWS)
    with pytest.raises(ZooError, match="The largest size is 2000"):
        dirichlet(TARGETS, ROWS, 3, size=2001, **options)


@pytest.mark.parametrize("alpha", [1e-300, 1e-10, 1e8])
def test_extreme_concentrations_still_cut_honestly(alpha):
    validate(dirichlet(TARGETS, ROWS, 2, alpha=alpha, generator=seeded()), ROWS)
    validate(dirichlet(TARGETS, ROWS, 7, alpha=alpha, size=285, generator=seeded()), ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be above 0 and finite, got 0.0"),
        ({"alpha": -1.0}, "alpha must be above 0"),
        ({"alpha": float("inf")}, "use the split 'disjoint'"),
        ({"alpha": float("nan")}, "alpha must be above 0"),
        ({"alpha": 1.0, "overlap": True}, "overlap=True needs size="),
        ({"alpha": 1.0, "min_rows": 0}, "min_rows must be a whole number above 0, got 0"),
        ({"alpha": 1.0, "min_rows": 2.5}, "min_rows must be a whole number above 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        dirichlet(TARGETS, ROWS, 2, generator=seeded(), **options)


def test_500_families_of_8_members_are_cut_in_seconds():
    targets = torch.arange(60_000) % 10
    rows, generator = torch.arange(45_000), seeded()
    start = time.perf_counter()
    for _ in range(500):
        dirichlet(targets, rows, 8, alpha=0.3, size=1000, generator=generator)
    assert time.perf_counter() - start < 5


# ---------------------------------------------------------------------------- describe, validate


def test_describe_counts_classes_per_member():
    targets = torch.tensor([0, 0, 1, 2, 2, 2])
    segments = [torch.tensor([0, 1, 5]), torch.tensor([2]), torch.tensor([], dtype=torch.int64)]
    assert describe(segments, targets, 4).tolist() == [[2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_describe_refuses_a_class_that_the_task_does_not_have():
    with pytest.raises(ZooError, match=r"segments\[1\] has classes 0 to 2, expected \[0, 2\)"):
        describe([torch.tensor([0]), torch.tensor([0, 1])], torch.tensor([0, 2]), 2)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "there are no segments"),
        ([[3, 5], []], r"segments\[1\]: expected .* at least one"),
        ([[3, 5], [4, 7]], r"segments\[1\]: 1 rows .* the first is 4"),
        ([[3, 5], [9, 10]], r"segments\[1\]: 1 rows .* the first is 10"),
        ([[-1, 5]], r"segments\[0\]: 1 rows .* the first is -1"),
        ([[3, 5, 3]], r"segments\[0\]: 1 rows are in it more than once"),
        ([[3], [5], [7, 5, 3]], r"segments\[2\]: 2 rows .* first in segments\[1\]"),
    ],
)
def test_a_dishonest_cut_is_refused(segments, message):
    rows = torch.tensor([3, 5, 7, 9])
    with pytest.raises(ZooError, match=message):
        validate([torch.tensor(s, dtype=torch.int64) for s in segments], rows)


def test_segments_of_another_type_are_refused():
    with pytest.raises(ZooError, match=r"segments\[0\]: expected int64 .* got torch.float32"):
        validate([torch.tensor([1.0])], torch.arange(3))


def test_shared_rows_pass_only_when_allowed():
    segments = [torch.tensor([0, 1]), torch.tensor([1, 2])]
    validate(segments, torch.arange(3), disjoint=False)
    with pytest.raises(ZooError, match=r"segments\[1\]: 1 rows are also in other segments"):
        validate(segments, torch.arange(3))
    with pytest.raises(ZooError, match="more than once"):
        validate([torch.tensor([1, 1])], torch.arange(3), disjoint=False)
