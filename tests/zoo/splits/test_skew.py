import time

import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.splits import describe, dirichlet, quantity, validate

CLASSES = 10
TARGETS = torch.arange(3000) * 7 % CLASSES
ROWS = torch.arange(500, 2500)  # 200 of each class


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sizes(segments):
    return [len(segment) for segment in segments]


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


# ---------------------------------------------------------------------------- quantity


@pytest.mark.parametrize("alpha", [1.0, 3.0, 20.0])  # where hardly a draw leaves a member no row
def test_sizes_are_dirichlet_proportions(alpha):
    members, generator = 4, seeded()
    squares = []
    for _ in range(400):
        segments = quantity(TARGETS, ROWS, members, alpha=alpha, min_rows=1, generator=generator)
        squares.append((torch.tensor(sizes(segments)) / 2000).square().sum())
    squares = torch.stack(squares)
    # Rounding to whole rows moves a share by 1/2000 at most.
    error = squares.std() / 400**0.5
    assert abs(squares.mean() - mean_square_share(alpha, members)) < 5 * error + 2e-4


def test_members_of_unequal_size_have_the_same_mix_of_classes():
    segments = quantity(TARGETS, ROWS, 4, alpha=0.5, min_rows=100, generator=seeded())
    assert max(sizes(segments)) > 2 * min(sizes(segments))
    for segment, counts in zip(segments, describe(segments, TARGETS, CLASSES), strict=True):
        expected = len(segment) / CLASSES
        assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_members_of_unequal_size_get_their_fewest_rows():
    generator, smallest = seeded(), {1: [], 80: []}
    for _ in range(30):
        for min_rows, found in smallest.items():
            segments = quantity(TARGETS, ROWS, 6, alpha=1.0, min_rows=min_rows, generator=generator)
            found.append(min(sizes(segments)))
    assert min(smallest[80]) >= 80
    assert min(smallest[1]) < 80  # so the condition did something


def test_sizes_that_no_draw_reaches_end_with_an_error():
    with pytest.raises(ZooError, match="quantity: none of 1000 draws gave each of 40 members 10"):
        quantity(TARGETS, ROWS, 40, alpha=1e-300, generator=seeded())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "quantity: alpha must be above 0 and finite, got 0.0"),
        ({"alpha": float("nan")}, "use the split 'disjoint'"),
        ({"alpha": 1.0, "min_rows": 0}, "quantity: min_rows must be a whole number above 0"),
    ],
)
def test_an_option_of_sizes_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        quantity(TARGETS, ROWS, 2, generator=seeded(), **options)


def test_more_fewest_rows_of_unequal_members_than_there_are_is_refused():
    with pytest.raises(ZooError, match=r"quantity: 4 members x min_rows=501 need 2004 rows"):
        quantity(TARGETS, ROWS, 4, alpha=1.0, min_rows=501, generator=seeded())
