import pytest

from metamerge.errors import StructureError
from metamerge.structure.axes import BATCH, Axes


def sizes(axes, axis):
    """Sizes of the factors of an axis, outermost first."""
    return [axes.sizes[factor] for factor in axes.resolve(axis)]


def test_a_fresh_axis_is_one_factor_and_an_axis_of_one_entry_is_none():
    axes = Axes()
    assert sizes(axes, axes.fresh(6)) == [6]
    assert axes.fresh(1) == ()
    assert axes.size(()) == 1


def test_unified_axes_are_one_class_wherever_they_are_read():
    axes = Axes()
    a, b, c, other = (axes.fresh(6) for _ in range(4))
    axes.unify(a, b, "add")
    axes.unify(b, c, "add")
    assert axes.resolve(a) == axes.resolve(b) == axes.resolve(c)
    assert axes.resolve(other) != axes.resolve(a)


def test_a_flat_axis_meets_its_factors():
    # 24 columns of a linear layer meet 4 channels of 2 by 3 positions.
    axes = Axes()
    channel, high, wide = axes.fresh(4), axes.fresh(2), axes.fresh(3)
    columns = axes.fresh(24)
    common = axes.unify((*channel, *high, *wide), columns, "linear")
    assert common == axes.resolve(columns) == (*channel, *high, *wide)
    assert axes.size(columns) == 24


@pytest.mark.parametrize("swap", [False, True])
def test_factors_that_cross_are_split_until_they_agree(swap):
    # 4 x 6 meets 8 x 3: both become 4 x 2 x 3.
    axes = Axes()
    pair = [(*axes.fresh(4), *axes.fresh(6)), (*axes.fresh(8), *axes.fresh(3))]
    one, other = reversed(pair) if swap else pair
    axes.unify(one, other, "reshape")
    assert sizes(axes, one) == sizes(axes, other) == [4, 2, 3]
    assert axes.resolve(one) == axes.resolve(other)


def test_a_split_reaches_the_axes_that_were_unified_before():
    axes = Axes()
    a, b, c = axes.fresh(6), axes.fresh(6), (*axes.fresh(2), *axes.fresh(3))
    axes.unify(a, b, "add")
    axes.unify(c, b, "linear")
    assert axes.resolve(a) == axes.resolve(b) == axes.resolve(c)
    assert sizes(axes, a) == [2, 3]


@pytest.mark.parametrize("other", [[5], [7], [2, 2], [2, 3, 2], [12]])
def test_axes_of_different_sizes_are_not_unified(other):
    axes = Axes()
    left = axes.fresh(6)
    right = tuple(factor for size in other for factor in axes.fresh(size))
    with pytest.raises(StructureError, match=r"^add_1 ties"):
        axes.unify(left, right, "add_1")


def test_sizes_that_do_not_divide_each_other_are_named():
    axes = Axes()
    left = (*axes.fresh(4), *axes.fresh(6))
    right = (*axes.fresh(6), *axes.fresh(4))
    with pytest.raises(
        StructureError, match=r"an axis of 4 entries to one of 6, and neither divides"
    ):
        axes.unify(left, right, "add")


def test_a_batch_is_unified_with_a_batch_only():
    axes = Axes()
    batch, again = axes.fresh(BATCH), axes.fresh(BATCH)
    assert axes.resolve(axes.unify(batch, again, "add")) == axes.resolve(again)
    for one, other in ((batch, axes.fresh(6)), (axes.fresh(6), batch)):
        with pytest.raises(StructureError, match="add mixes the batch axis"):
            axes.unify(one, other, "add")
    assert axes.size((*batch, *axes.fresh(6))) == BATCH


def test_what_is_fixed_stays_fixed_through_unions_and_splits():
    axes = Axes()
    fixed, free, halves = axes.fresh(6), axes.fresh(6), (*axes.fresh(2), *axes.fresh(3))
    axes.fix(fixed, "inputs keep their place")
    axes.fix(fixed, "a later reason")
    axes.unify(free, fixed, "add")
    axes.unify(halves, free, "linear")
    reasons = {axes.fixed[factor] for factor in axes.resolve(halves)}
    assert reasons == {"inputs keep their place"}


@pytest.mark.parametrize("order", [0, 1])
def test_a_union_with_a_fixed_axis_fixes_whichever_came_first(order):
    axes = Axes()
    pair = axes.fresh(6), axes.fresh(6)
    axes.fix(pair[order], "outputs keep their place")
    axes.unify(*pair, "add")
    assert axes.fixed[axes.resolve(pair[1 - order])[0]] == "outputs keep their place"


def test_taking_removes_whole_factors_from_the_front():
    axes = Axes()
    factors = [*axes.fresh(BATCH), *axes.fresh(4), *axes.fresh(3), *axes.fresh(5)]
    batch, four, three, five = factors
    assert axes.take(factors, BATCH, "view") == (batch,)
    assert axes.take(factors, 12, "view") == (four, three)
    assert axes.take(factors, 1, "view") == ()
    assert factors == [five]


def test_taking_less_than_a_factor_splits_it():
    axes = Axes()
    whole = axes.fresh(12)
    factors = list(whole)
    outer = axes.take(factors, 3, "view")
    inner = axes.take(factors, 4, "view")
    assert (sizes(axes, outer), sizes(axes, inner), factors) == ([3], [4], [])
    assert axes.resolve(whole) == (*outer, *inner)


def test_taking_ends_inside_a_factor_where_sizes_allow_it():
    axes = Axes()
    factors = [*axes.fresh(2), *axes.fresh(6)]
    assert sizes(axes, axes.take(factors, 4, "view")) == [2, 2]
    assert sizes(axes, tuple(factors)) == [3]


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        ([5, 2], 4, "view cuts an axis of 5 entries unevenly"),
        ([4, 3], 6, "view cuts an axis of 4 entries unevenly"),
        ([4], 8, "view reshapes axes in a way that cannot be followed"),
        ([4, BATCH], 8, "view reshapes axes"),
        ([4, 2], BATCH, "view mixes the batch axis with another"),
        ([], BATCH, "view reshapes axes"),
    ],
)
def test_axes_that_cannot_be_cut_are_refused(given, wanted, message):
    axes = Axes()
    factors = [factor for size in given for factor in axes.fresh(size)]
    with pytest.raises(StructureError, match=message):
        axes.take(factors, wanted, "view")
