from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamerge.errors import StructureError
from metamerge.structure.axes import Axes, Parts


@pytest.fixture
def axes():
    return Axes()


def product(axes, *sizes):
    """A new axis of several factors."""
    return tuple(atom for size in sizes for atom in axes.fresh(size))


def shown(axes, axis):
    """An axis as ``4.[2+3]``: factors, and parts in brackets."""
    return _shown(axes, axes.resolve(axis))


def _shown(axes, resolved):
    return ".".join(
        f"[{'+'.join(_shown(axes, part) or '1' for part in item.axes)}]"
        if isinstance(item, Parts)
        else str(axes.sizes[item])
        for item in resolved
    )


def counted(axes, resolved):
    """Entries of a resolved axis, by adding and multiplying."""
    return prod(
        sum(counted(axes, part) for part in item.axes)
        if isinstance(item, Parts)
        else axes.sizes[item]
        for item in resolved
    )


def test_a_fresh_axis_is_one_factor_and_an_axis_of_one_entry_is_none(axes):
    assert shown(axes, axes.fresh(6)) == "6"
    assert axes.fresh(1) == ()
    assert axes.size(()) == 1
    assert axes.resolve(()) == ()


def test_unified_axes_are_one_wherever_they_are_read(axes):
    a, b, c, other = (axes.fresh(6) for _ in range(4))
    axes.unify(a, b, "add")
    axes.unify(c, b, "add")
    assert axes.resolve(a) == axes.resolve(b) == axes.resolve(c)
    assert axes.resolve(other) != axes.resolve(a)


def test_a_flat_axis_meets_its_factors(axes):
    # 24 columns of a linear layer meet 4 channels of 2 by 3 positions.
    maps, columns = product(axes, 4, 2, 3), axes.fresh(24)
    axes.unify(maps, columns, "linear")
    assert axes.resolve(columns) == axes.resolve(maps) == maps
    assert axes.size(columns) == 24


@pytest.mark.parametrize("swap", [False, True])
def test_factors_that_cross_are_split_until_they_agree(axes, swap):
    # 4 x 6 meets 8 x 3: both become 4 x 2 x 3.
    pair = [product(axes, 4, 6), product(axes, 8, 3)]
    one, other = reversed(pair) if swap else pair
    axes.unify(one, other, "reshape")
    assert shown(axes, one) == shown(axes, other) == "4.2.3"
    assert axes.resolve(one) == axes.resolve(other)


def test_a_split_reaches_the_axes_that_were_unified_before(axes):
    a, b, c = axes.fresh(6), axes.fresh(6), product(axes, 2, 3)
    axes.unify(a, b, "add")
    axes.unify(c, b, "linear")
    assert axes.resolve(a) == axes.resolve(b) == axes.resolve(c)
    assert shown(axes, a) == "2.3"


@pytest.mark.parametrize("other", [[5], [7], [2, 2], [2, 3, 2], [12]])
def test_axes_of_different_sizes_are_not_unified(axes, other):
    with pytest.raises(StructureError, match=r"^add_1 ties an axis of 6 entries to one of"):
        axes.unify(axes.fresh(6), product(axes, *other), "add_1")


def test_sizes_that_do_not_divide_each_other_are_named(axes):
    with pytest.raises(
        StructureError, match=r"an axis of 4 entries to one of 6, and neither divides"
    ):
        axes.unify(product(axes, 4, 6), product(axes, 6, 4), "add")


def test_the_first_reason_of_a_fixed_axis_is_kept(axes):
    fixed = axes.fresh(6)
    axes.fix(fixed, "inputs")
    axes.fix(fixed, "a later reason")
    assert [axes.fixed[a] for a in axes.atoms(fixed)] == ["inputs"]


@pytest.mark.parametrize("order", [0, 1])
def test_a_union_with_a_fixed_axis_fixes_whichever_came_first(axes, order):
    pair = axes.fresh(6), axes.fresh(6)
    axes.fix(pair[order], "outputs")
    axes.unify(*pair, "add")
    assert axes.fixed[axes.atoms(pair[1 - order])[0]] == "outputs"


@pytest.mark.parametrize("before", [False, True])
def test_what_is_fixed_stays_fixed_when_it_is_split(axes, before):
    whole = axes.fresh(6)
    pieces = product(axes, 2, 3)
    axes.fix(whole, "inputs") if before else axes.unify(whole, pieces, "linear")
    axes.unify(whole, pieces, "linear") if before else axes.fix(whole, "inputs")
    assert [axes.fixed.get(a) for a in axes.atoms(pieces)] == ["inputs", "inputs"]


def test_what_is_fixed_stays_fixed_when_it_is_cut(axes):
    whole = axes.fresh(6)
    axes.fix(whole, "inputs")
    axes.cut(whole[0], [2])
    assert shown(axes, whole) == "[2+4]"
    assert {axes.fixed.get(a) for a in axes.atoms(whole)} == {"inputs"}


def test_fixing_an_axis_of_parts_fixes_all_of_them(axes):
    whole = axes.joined([axes.fresh(2), product(axes, 2, 3)])
    axes.fix(whole, "outputs")
    assert {axes.fixed.get(a) for a in axes.atoms(whole)} == {"outputs"}
    assert len(axes.atoms(whole)) == 3


def test_taking_removes_whole_factors_from_the_front(axes):
    factors = list(product(axes, 4, 3, 5))
    four, three, five = factors
    assert axes.take(factors, 12, "view") == (four, three)
    assert axes.take(factors, 1, "view") == ()
    assert factors == [five]


def test_taking_less_than_a_factor_splits_it(axes):
    whole = axes.fresh(12)
    factors = list(whole)
    outer, inner = axes.take(factors, 3, "view"), axes.take(factors, 4, "view")
    assert (shown(axes, outer), shown(axes, inner), factors) == ("3", "4", [])
    assert axes.resolve(whole) == (*outer, *inner)


def test_taking_ends_inside_a_factor_where_sizes_allow_it(axes):
    factors = list(product(axes, 2, 6))
    assert shown(axes, axes.take(factors, 4, "view")) == "2.2"
    assert shown(axes, tuple(factors)) == "3"


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        ([5, 2], 4, "view cuts an axis of 5 entries unevenly"),
        ([4, 3], 6, "view cuts an axis of 4 entries unevenly|view cuts an axis of 3"),
        ([4], 8, "view reshapes axes in a way that cannot be followed"),
        ([], 2, "view reshapes axes in a way that cannot be followed"),
    ],
)
def test_axes_that_cannot_be_taken_are_refused(axes, given, wanted, message):
    factors = list(product(axes, *given))
    with pytest.raises(StructureError, match=message):
        axes.take(factors, wanted, "view")


def test_the_inner_factor_of_a_split_is_nested_in_the_outer(axes):
    whole = axes.fresh(6)
    (heads,), (units,) = axes.split(whole[0], 2, "view")
    assert axes.nesting(units) == {heads}
    assert axes.nesting(heads) == set()


def test_a_factor_split_twice_is_nested_in_both_that_lie_outside(axes):
    whole = axes.fresh(12)
    (heads,), inner = axes.split(whole[0], 2, "view")
    (blocks,), (units,) = axes.split(inner[0], 2, "view")
    assert axes.nesting(units) == {heads, blocks}
    assert axes.nesting(blocks) == {heads}


def test_two_nested_factors_that_are_unified_share_what_both_are_nested_in(axes):
    one, other = axes.fresh(6), axes.fresh(6)
    (heads,), (units,) = axes.split(one[0], 2, "view")
    (_, (more,)) = axes.split(other[0], 2, "view")
    axes.unify((units,), (more,), "matmul")
    assert axes.nesting(axes.atoms((units,))[0]) == set()  # heads of two axes are no blocks of one
    axes.unify(one, other, "add")
    assert axes.nesting(axes.atoms((units,))[0]) == {heads}


def test_joined_axes_are_parts_and_a_single_one_is_itself(axes):
    a, b = axes.fresh(2), product(axes, 2, 3)
    whole = axes.joined([a, b])
    assert shown(axes, whole) == "[2+2.3]"
    assert axes.size(whole) == 8
    assert axes.joined([b]) == b
    assert axes.joined([axes.fresh(0), b]) == b


def test_parts_of_parts_are_parts(axes):
    inner = axes.joined([axes.fresh(2), axes.fresh(3)])
    assert shown(axes, axes.joined([inner, axes.fresh(4)])) == "[2+3+4]"


def test_parts_meet_parts_at_the_bounds_of_both(axes):
    one = axes.joined([axes.fresh(2), axes.fresh(4)])
    other = axes.joined([axes.fresh(3), axes.fresh(3)])
    axes.unify(one, other, "add")
    assert shown(axes, one) == shown(axes, other) == "[2+1+3]"
    assert axes.resolve(one) == axes.resolve(other)


def test_an_axis_without_parts_is_cut_where_it_meets_some(axes):
    columns, parts = axes.fresh(9), axes.joined([axes.fresh(2), product(axes, 2, 3), ()])
    axes.unify(columns, parts, "linear")
    assert shown(axes, columns) == "[2+2.3+1]"
    assert axes.resolve(columns) == axes.resolve(parts)


def test_an_axis_that_meets_the_same_axis_twice_ties_its_halves(axes):
    half, columns = axes.fresh(4), axes.fresh(8)
    axes.unify(columns, axes.joined([half, half]), "linear")
    assert axes.atoms(columns) == [*half, *half]


def test_a_picked_piece_is_a_part(axes):
    batch, units = axes.fresh(5), axes.fresh(9)
    piece = axes.pick([batch, units], 1, 2, 4, "slice")
    assert piece[0] == batch
    assert shown(axes, piece[1]) == "4"
    assert shown(axes, units) == "[2+4+3]"
    assert axes.atoms(units)[1:2] == axes.atoms(piece[1])


def test_picking_everything_changes_nothing_and_nothing_is_an_axis_of_no_entries(axes):
    units = axes.fresh(9)
    assert axes.pick([units], 0, 0, 9, "slice") == [units]
    assert axes.size(axes.pick([units], 0, 3, 0, "slice")[0]) == 0
    assert shown(axes, units) == "9"


def test_pieces_that_overlap_cut_each_other(axes):
    units = axes.fresh(9)
    first = axes.pick([units], 0, 0, 5, "slice")[0]
    second = axes.pick([units], 0, 3, 6, "slice")[0]
    assert shown(axes, units) == "[3+2+4]"
    assert (shown(axes, first), shown(axes, second)) == ("[3+2]", "[2+4]")
    assert axes.atoms(first)[1] == axes.atoms(second)[0]


def test_a_piece_of_whole_blocks_cuts_the_outer_factor(axes):
    maps = product(axes, 4, 3)
    piece = axes.pick([maps], 0, 3, 6, "slice")[0]
    assert shown(axes, piece) == "2.3"
    assert shown(axes, maps) == "[1+2+1].3"
    assert axes.atoms(piece)[1] == maps[1]


def test_a_piece_within_a_block_is_cut_out_of_it(axes):
    maps = product(axes, 4, 3)
    assert shown(axes, axes.pick([maps], 0, 7, 2, "slice")[0]) == "2"  # of the third block


def test_cutting_nowhere_leaves_an_axis_whole(axes):
    units = axes.fresh(6)
    axes.cut(units[0], [0, 6])
    assert shown(axes, units) == "6"


def heads_and_units(axes):
    whole = axes.fresh(12)
    heads, units = axes.split(whole[0], 4, "view")
    return whole, heads, units


def test_units_of_heads_that_are_cut_apart_have_copies_of_their_own(axes):
    whole, heads, units = heads_and_units(axes)
    first = axes.pick([heads, units], 0, 0, 1, "select")
    others = axes.pick([heads, units], 0, 1, 3, "slice")
    assert (shown(axes, first[0]), shown(axes, first[1])) == ("1", "3")
    assert (shown(axes, others[0]), shown(axes, others[1])) == ("3", "3")
    assert axes.atoms(first[1]) != axes.atoms(others[1])
    assert shown(axes, whole) == "[3+3.3]"
    assert axes.carried(whole) == {
        *axes.atoms(first[0]),
        *axes.atoms(first[1]),
        *axes.atoms(others[0]),
        *axes.atoms(others[1]),
    }


def test_copies_are_tied_again_where_a_tensor_carries_no_heads(axes):
    whole, heads, units = heads_and_units(axes)
    first = axes.pick([heads, units], 0, 0, 1, "select")
    others = axes.pick([heads, units], 0, 1, 3, "slice")
    axes.give_up_copies([heads, units])  # carries both: nothing to give up
    assert axes.atoms(first[1]) != axes.atoms(others[1])
    axes.give_up_copies([axes.fresh(5), units])
    assert axes.atoms(first[1]) == axes.atoms(others[1]) == axes.atoms(units)
    assert shown(axes, whole) in {"[1+3].3", "[3+3.3]"}


def test_copies_are_nested_in_what_is_left_of_the_heads(axes):
    _, heads, units = heads_and_units(axes)
    others = axes.pick([heads, units], 0, 1, 3, "slice")
    assert axes.nesting(axes.atoms(others[1])[0]) == set(axes.atoms(others[0]))


def test_stacked_axes_have_units_of_their_own_behind_every_entry_of_the_front(axes):
    one, other = axes.fresh(4), axes.fresh(4)
    front, units = axes.stacked([one, other])
    assert axes.atoms((*front, *units)) == [*one, *other]
    assert axes.size((*front, *units)) == 8
    second = axes.pick([front, axes.fresh(5), units], 0, 1, 1, "select")
    assert axes.atoms(second[2]) == [*other]
    assert axes.atoms(one) != axes.atoms(other)


def test_stacked_units_that_are_read_without_the_front_are_tied(axes):
    one, other = axes.fresh(4), axes.fresh(4)
    _, units = axes.stacked([one, other])
    assert axes.atoms(units) == axes.atoms(one) == axes.atoms(other)


def test_axes_of_equal_entries_tie_nothing_that_reads_them(axes):
    ones = axes.fresh(4, alike=True)
    a, b = axes.fresh(4), axes.fresh(4)
    axes.unify(axes.read(ones), a, "mul")
    axes.unify(axes.read(ones), b, "mul")
    assert axes.atoms(a) != axes.atoms(b)
    assert axes.read(a) == a


def test_an_axis_is_no_more_alike_once_it_met_another_or_was_fixed(axes):
    ones, units = axes.fresh(4, alike=True), axes.fresh(4)
    axes.unify(ones, units, "add")
    assert axes.read(ones) == ones
    fixed = axes.fresh(4, alike=True)
    axes.fix(fixed, "outputs")
    assert axes.read(fixed) == fixed


def test_pieces_and_blocks_of_equal_entries_are_alike_as_well(axes):
    ones = axes.fresh(6, alike=True)
    piece = axes.pick([ones], 0, 0, 2, "slice")[0]
    blocks = axes.take(list(axes.fresh(6, alike=True)), 3, "view")
    assert all(axes.read(axis) != axis for axis in (piece, blocks))


def test_an_axis_of_parts_is_split_where_all_parts_are_whole_blocks(axes):
    parts = axes.joined([axes.fresh(2), axes.fresh(4)])
    outer, inner = axes.split(parts[0], 3, "view")
    assert (shown(axes, outer), shown(axes, inner)) == ("[1+2]", "2")
    assert shown(axes, parts) == "[1+2].2"
    uneven = axes.joined([axes.fresh(3), axes.fresh(5)])
    with pytest.raises(StructureError, match=r"view splits parts of \[3, 5\] into blocks of 2"):
        axes.split(uneven[0], 4, "view")


SIZES = (1, 2, 3, 4, 6, 8, 12)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sequence_of_operations_keeps_sizes_and_what_is_fixed(data):
    axes = Axes()
    made, fixed = [], []

    def chosen():
        return made[data.draw(st.integers(0, len(made) - 1))]

    for _ in range(data.draw(st.integers(2, 4))):
        made.append(product(axes, *data.draw(st.lists(st.sampled_from(SIZES), max_size=3))))
    for _ in range(data.draw(st.integers(1, 8))):
        step = data.draw(
            st.sampled_from(["fresh", "unify", "take", "pick", "join", "fix", "split"])
        )
        axis = chosen()
        size = axes.size(axis)
        try:
            if step == "fresh":
                made.append(axes.fresh(data.draw(st.sampled_from(SIZES)), alike=True))
            elif step == "unify":
                equal = [other for other in made if axes.size(other) == size]
                axes.unify(axis, equal[data.draw(st.integers(0, len(equal) - 1))], "unify")
            elif step == "take":
                factors = axes.roots(axis)
                made.append(axes.take(factors, data.draw(st.sampled_from(SIZES)), "take"))
                assert axes.size(made[-1]) * axes.size(tuple(factors)) == size
            elif step == "pick":
                start = data.draw(st.integers(0, size - 1))
                length = data.draw(st.integers(1, size - start))
                (piece,) = axes.pick([axis], 0, start, length, "pick")
                assert axes.size(piece) == length
                made.append(piece)
            elif step == "join":
                whole = axes.joined([axis, chosen()])
                made += [whole] if axes.size(whole) <= 40 else []
            elif step == "split":
                wide = [a for a in axes.roots(axis) if axes.sizes[a] in (4, 6, 8, 12)]
                made += axes.split(wide[0], 2, "split") if wide else []
            else:
                axes.fix(axis, "of a test")
                fixed.append(axis)
        except StructureError:
            pass
        for one in made:
            assert counted(axes, axes.resolve(one)) == axes.size(one)
        for one in fixed:
            assert all(atom in axes.fixed for atom in axes.atoms(one))
        for atom in (a for one in made for a in axes.atoms(one)):
            assert axes.nesting(atom).isdisjoint({atom})
