import json
from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metamerge.errors import IncompatibleWeights, Unreadable
from metamerge.structure import Concat, Factor, PermutationSpec, Scaling, discover

# Linear 1 -> 3 -> 2: hidden group "0" of three units.
HAND = PermutationSpec(
    groups={"0": 3},
    axes={
        "0.weight": ((Factor("0", 3),), (Factor(None, 1),)),
        "0.bias": ((Factor("0", 3),),),
        "2.weight": ((Factor(None, 2, "outputs"),), (Factor("0", 3),)),
        "2.bias": ((Factor(None, 2, "outputs"),),),
    },
    scalings=(
        Scaling("0", "positive", {"0.weight": {0: 1}, "0.bias": {0: 1}, "2.weight": {1: -1}}),
    ),
    hidden=(3, 3),
)


def hand_weights():
    return {
        "0.weight": torch.tensor([[10.0], [11.0], [12.0]]),
        "0.bias": torch.tensor([20.0, 21.0, 22.0]),
        "2.weight": torch.tensor([[30.0, 31.0, 32.0], [40.0, 41.0, 42.0]]),
        "2.bias": torch.tensor([50.0, 51.0]),
        "steps": torch.tensor(7),
    }


def one(groups, *axes, within=None, **others):
    """The spec of one tensor, ``w``."""
    return PermutationSpec(groups, {"w": axes}, within or {}, **others)


H, U, N, C = Factor("h", 2), Factor("u", 3), Factor("n", 4), Factor("c", 2)
HEADS = {"u": ("h",)}
SPECS = {
    "a group and a fixed axis": one({"n": 4}, (N,), (Factor(None, 3),)),
    "a group on two axes": one({"n": 4}, (N,), (N,)),
    "a group twice on one axis": one({"u": 3}, (U, U)),
    "blocks": one({"n": 4}, (Factor(None, 2), N, Factor(None, 3))),
    "two groups on one axis": one({"h": 2, "u": 3}, (H, U)),
    "units in heads": one({"h": 2, "u": 3}, (H, U), within=HEADS),
    "units before their heads": one({"h": 2, "u": 3}, (U, H), within=HEADS),
    "units in heads, named first": one({"u": 3, "h": 2}, (H, Factor(None, 2), U), within=HEADS),
    "units in heads on both axes": one({"h": 2, "u": 3}, (H, U), (H, U), within=HEADS),
    # a grouped convolution: rows are groups times channels out, axis 1 is channels in of a group
    "a grouped convolution": one(
        {"h": 2, "n": 4, "u": 3}, (H, N), (U,), (Factor(None, 2),), within={**HEADS, "n": ("h",)}
    ),
    "units whose heads lie on the axis behind": one({"h": 2, "u": 3}, (U,), (H,), within=HEADS),
    "units in blocks of heads": one(
        {"h": 2, "c": 2, "u": 3}, (H, C, U), within={"u": ("h", "c"), "c": ("h",)}
    ),
    "units in blocks on another axis": one(
        {"h": 2, "c": 2, "u": 3}, (H, U), (C,), within={"u": ("h", "c"), "c": ("h",)}
    ),
    "parts": one({"n": 4, "u": 3}, (Concat(((N,), (Factor(None, 2),), (U,))),)),
    "a group in two parts": one({"u": 3}, (Concat(((U,), (Factor(None, 1),), (U,))),)),
    "parts in a product": one(
        {"n": 4, "u": 3},
        (Factor(None, 2), Concat(((N,), (U,))), C),
    ),
    "queries, keys and values": one(
        {"h": 2, "u": 3, "c": 2},
        (Concat(((H, U), (H, U), (H, C))),),
        (Factor(None, 2),),
        within={"u": ("h",), "c": ("h",)},
    ),
    "parts of products in a product": one(
        {"h": 2, "u": 3},
        (
            Factor(None, 2),
            Concat(((H, U), (U,), (Factor(None, 2),))),
        ),
    ),
    "parts of parts": one({"n": 4, "u": 3, "h": 2}, (H, Concat(((Concat(((N,), (U,))),), (U,))))),
}
SPECS["parts in a product"] = replace(SPECS["parts in a product"], groups={"n": 4, "u": 3, "c": 2})


def axis_size(axis):
    """Number of entries, by counting."""
    return len(list(entries(axis)))


def entries(axis):
    """What each entry of an axis is, by hand: one ``(part, factor, label)`` per factor met."""
    options = []
    for place, factor in enumerate(axis):
        if isinstance(factor, Concat):
            options.append(
                [
                    [(place, number), *inner]
                    for number, part in enumerate(factor.axes)
                    for inner in entries(part)
                ]
            )
        else:
            options.append([[(place, factor.group, label)] for label in range(factor.size)])
    for chosen in product(*options):
        yield [step for steps in chosen for step in steps]


def slow_permute(spec, key, tensor, perm):
    """Entry by entry: look up the labels, permute them by hand, find the entry they name."""
    axes = [list(entries(axis)) for axis in spec.axes[key]]
    found = [{json.dumps(entry): i for i, entry in enumerate(own)} for own in axes]
    result = torch.empty_like(tensor)
    for index in product(*(range(len(own)) for own in axes)):
        here = [own[i] for own, i in zip(axes, index, strict=True)]
        source = []
        for axis, entry in enumerate(here):
            order = [entry, *here[:axis], *here[axis + 1 :]]
            labels = {}  # of a group, on this axis rather than on another
            for other in reversed(order):
                labels.update({s[1]: s[2] for s in other if len(s) == 3})
            moved = [
                (s[0], s[1], int(perm[s[1]][(*(labels[o] for o in spec.outer(s[1])), s[2])]))
                if len(s) == 3 and s[1] in perm
                else s
                for s in entry
            ]
            source.append(found[axis][json.dumps(moved)])
        result[index] = tensor[tuple(source)]
    return result


def numbered(spec, key="w", *batch):
    """A tensor whose entries are all different."""
    shape = (*batch, *(axis_size(axis) for axis in spec.axes[key]))
    return torch.arange(prod(shape), dtype=torch.float64).reshape(shape)


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


def test_slot_i_of_the_aligned_weights_is_unit_perm_i_of_the_given_ones():
    # aligned[i] = w[perm[i]]: slot 0 takes unit 2, slot 1 unit 0, slot 2 unit 1. The other way
    # round, rows would read 11, 12, 10.
    weights = hand_weights()
    aligned = HAND.permute(weights, {"0": torch.tensor([2, 0, 1])})
    expected = {
        "0.weight": torch.tensor([[12.0], [10.0], [11.0]]),
        "0.bias": torch.tensor([22.0, 20.0, 21.0]),
        "2.weight": torch.tensor([[32.0, 30.0, 31.0], [42.0, 40.0, 41.0]]),
        "2.bias": torch.tensor([50.0, 51.0]),
        "steps": torch.tensor(7),
    }
    assert_equal(aligned, expected)
    assert_equal(weights, hand_weights())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_permuting_is_what_a_loop_over_entries_does(name, seed):
    spec = SPECS[name]
    perm = spec.random(torch.Generator().manual_seed(seed))
    tensor = numbered(spec)
    assert torch.equal(
        spec.permute_tensor("w", tensor, perm), slow_permute(spec, "w", tensor, perm)
    )


@pytest.mark.parametrize("name", SPECS)
def test_one_group_alone_is_what_a_loop_over_entries_does(name):
    spec = SPECS[name]
    for group, index in spec.random(torch.Generator().manual_seed(3)).items():
        tensor = numbered(spec)
        found = spec.permute_tensor("w", tensor, {group: index})
        assert torch.equal(found, slow_permute(spec, "w", tensor, {group: index}))


@pytest.mark.parametrize("name", SPECS)
def test_a_batch_of_permutations_is_one_for_every_member(name):
    spec = SPECS[name]
    perm = spec.random(torch.Generator().manual_seed(0), (2, 3))
    tensor = numbered(spec, "w", 2, 3)
    together = spec.permute({"w": tensor}, perm)
    for f, m in product(range(2), range(3)):
        own = {group: index[f, m] for group, index in perm.items()}
        assert torch.equal(together["w"][f, m], slow_permute(spec, "w", tensor[f, m], own))
    assert_equal(spec.unpermute(together, perm), {"w": tensor})


@pytest.mark.parametrize("name", SPECS)
def test_one_permutation_does_for_a_whole_stack(name):
    spec = SPECS[name]
    perm = spec.random(torch.Generator().manual_seed(0))
    tensor = numbered(spec, "w", 2)
    together = spec.permute_tensor("w", tensor, perm)
    for m in range(2):
        assert torch.equal(together[m], spec.permute_tensor("w", tensor[m], perm))


@pytest.mark.parametrize("name", SPECS)
def test_the_inverse_undoes_a_permutation_before_and_after_it(name):
    spec = SPECS[name]
    weights = {"w": numbered(spec)}
    perm = spec.random(torch.Generator().manual_seed(0))
    assert_equal(spec.unpermute(spec.permute(weights, perm), perm), weights)
    assert_equal(spec.permute(spec.unpermute(weights, perm), perm), weights)
    back = spec.inverse(spec.inverse(perm))
    assert all(torch.equal(back[group], perm[group]) for group in spec.groups)


@pytest.mark.parametrize("name", SPECS)
def test_the_identity_changes_nothing(name):
    spec = SPECS[name]
    weights = {"w": numbered(spec)}
    assert_equal(spec.permute(weights, spec.identity()), weights)
    assert_equal(spec.permute(weights, {}), weights)
    assert {g: t.shape for g, t in spec.identity().items()} == {
        g: (*spec.blocks(g), n) for g, n in spec.groups.items()
    }


def test_permuting_twice_is_permuting_by_the_first_permutation_read_at_the_second(network):
    weights, spec = network.weights(), network.spec
    generator = torch.Generator().manual_seed(0)
    first, second = spec.random(generator), spec.random(generator)
    once = {}
    for group, n in spec.groups.items():
        sizes = (*spec.blocks(group), n)
        grid = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
        at = dict(zip(spec.outer(group), grid, strict=False))
        blocks = [second[o][(*(at[far] for far in spec.outer(o)), at[o])] for o in at]
        once[group] = first[group][(*blocks, second[group])]
    twice = spec.permute(spec.permute(weights, first), second)
    assert_equal(twice, spec.permute(weights, once))


def test_unpermuting_undoes_permuting_in_every_network(network):
    weights, spec = network.weights(2), network.spec
    perm = spec.random(torch.Generator().manual_seed(0), (2,))
    assert_equal(spec.unpermute(spec.permute(weights, perm), perm), weights)


def test_a_head_takes_its_units_along_and_orders_them_on_its_own():
    spec = SPECS["units in heads"]
    weight = torch.tensor([10, 11, 12, 20, 21, 22])
    perm = {"h": torch.tensor([1, 0]), "u": torch.tensor([[2, 0, 1], [0, 1, 2]])}
    # aligned[h, i] = w[perm_heads[h], perm_units[h, i]]: the first head is 20, 21, 22 in 2, 0, 1
    assert spec.permute_tensor("w", weight, perm).tolist() == [22, 20, 21, 10, 11, 12]
    # the first head of the aligned weights is the second: its units go back by the order of slot 0
    back = spec.inverse(perm)
    assert back["h"].tolist() == [1, 0]
    assert back["u"].tolist() == [[0, 1, 2], [1, 2, 0]]


def test_axis_1_of_a_grouped_convolution_moves_on_its_own_in_the_rows_of_each_group():
    # rows (2 groups, 1 channel out), axis 1: 3 channels in of the row's own group
    spec = one({"h": 2, "u": 3}, (H,), (U,), within=HEADS)
    weight = torch.tensor([[10, 11, 12], [20, 21, 22]])
    perm = {"h": torch.tensor([1, 0]), "u": torch.tensor([[2, 0, 1], [0, 1, 2]])}
    assert spec.permute_tensor("w", weight, perm).tolist() == [[22, 20, 21], [10, 11, 12]]


def test_random_permutations_are_permutations_and_repeat_with_their_seed():
    first = HAND.random(torch.Generator().manual_seed(0), (50,))["0"]
    assert torch.equal(first, HAND.random(torch.Generator().manual_seed(0), (50,))["0"])
    assert torch.equal(first.sort(-1).values, torch.arange(3).expand(50, 3))
    assert len(first.unique(dim=0)) == 6  # all of them: one is missing with chance 6 * (5/6)**50


def test_random_permutations_differ_from_block_to_block():
    perm = SPECS["units in blocks of heads"].random(torch.Generator().manual_seed(0), (9,))["u"]
    assert perm.shape == (9, 2, 2, 3)
    assert len(perm.flatten(0, 2).unique(dim=0)) == 6  # missing one: 6 * (5/6)**36 < 1 %
    assert any(not torch.equal(row[0, 0], row[1, 0]) for row in perm)


def test_gradients_flow_back_through_a_permutation():
    weights = hand_weights()
    weights["0.bias"].requires_grad_()
    aligned = HAND.permute(weights, {"0": torch.tensor([2, 0, 1])})
    (aligned["0.bias"] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weights["0.bias"].grad.tolist() == [2.0, 3.0, 1.0]


def test_columns_behind_a_flatten_move_in_blocks():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(4, 1))
    spec = discover(model, torch.zeros(2, 1, 1, 2))
    assert [(f.group, f.size) for f in spec.axes["2.weight"][1]] == [("0", 2), (None, 2)]
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # channel 0: 1, 2; channel 1: 3, 4
    moved = spec.permute_tensor("2.weight", weight, {"0": torch.tensor([1, 0])})
    assert moved.tolist() == [[3.0, 4.0, 1.0, 2.0]]


def test_two_groups_on_one_axis_move_independently():
    spec = one({"a": 2, "b": 3}, (Factor("a", 2), Factor("b", 3)))
    perm = {"a": torch.tensor([1, 0]), "b": torch.tensor([2, 0, 1])}
    assert spec.permute_tensor("w", torch.arange(6), perm).tolist() == [5, 3, 4, 2, 0, 1]


def test_parts_move_each_in_its_own_range():
    spec = SPECS["parts"]
    perm = {"n": torch.tensor([3, 2, 1, 0]), "u": torch.tensor([2, 0, 1])}
    moved = spec.permute_tensor("w", torch.arange(9), perm)
    assert moved.tolist() == [3, 2, 1, 0, 4, 5, 8, 6, 7]


def test_a_group_may_be_kept_in_place_on_one_axis_of_two():
    spec = one({"u": 3}, (U,), (U,))
    weight, perm = torch.arange(9).reshape(3, 3), {"u": torch.tensor([2, 0, 1])}
    assert spec.permute_tensor("w", weight, perm).tolist() == [[8, 6, 7], [2, 0, 1], [5, 3, 4]]
    rows = spec.permute_tensor("w", weight, perm, keep=(1, "u"))
    columns = spec.permute_tensor("w", weight, perm, keep=(0, "u"))
    assert rows.tolist() == [[6, 7, 8], [0, 1, 2], [3, 4, 5]]
    assert columns.tolist() == [[2, 0, 1], [5, 3, 4], [8, 6, 7]]


def slow_rows(spec, axis, group, tensor):
    """Entries of each unit, in the order that they have in the tensor."""
    axes = [list(entries(own)) for own in spec.axes["w"]]
    wanted = [*spec.outer(group), group]
    rows = {u: [] for u in product(*(range(spec.groups[g]) for g in wanted))}
    for index in product(*(range(len(own)) for own in axes)):
        here = [own[i] for own, i in zip(axes, index, strict=True)]
        own = {s[1]: s[2] for s in here[axis] if len(s) == 3}
        labels = {s[1]: s[2] for entry in here for s in entry if len(s) == 3} | own
        if group in own:
            rows[tuple(labels[g] for g in wanted)].append(float(tensor[index]))
    return rows


SEVERAL_PLACES = {"a group twice on one axis", "parts of parts"}
ONE_PLACE = [name for name in SPECS if name not in SEVERAL_PLACES]


@pytest.mark.parametrize("name", ONE_PLACE)
def test_unit_rows_hold_all_that_belongs_to_a_unit(name):
    spec = SPECS[name]
    tensor = numbered(spec)
    for group in spec.groups:
        for key, axis in spec.touching(group):
            found = spec.unit_rows(key, axis, group, tensor)
            expected = slow_rows(spec, axis, group, tensor)
            assert found.shape[:-1] == (*spec.blocks(group), spec.groups[group])
            for unit, row in expected.items():
                assert sorted(found[unit].tolist()) == sorted(row), (group, unit)
            stacked = spec.unit_rows(key, axis, group, torch.stack([tensor, -tensor])[:, None])
            assert torch.equal(stacked[:, 0], torch.stack([found, -found]))


@pytest.mark.parametrize("name", ONE_PLACE)
def test_rows_of_units_are_in_one_order_for_all_units(name):
    # moving a unit moves its row and leaves the order in the row as it was
    spec = SPECS[name]
    tensor = numbered(spec)
    for group, index in spec.random(torch.Generator().manual_seed(1)).items():
        for key, axis in spec.touching(group):
            kept = spec.permute_tensor(key, tensor, {group: index}, keep=(axis, group))
            moved = spec.permute_tensor(key, tensor, {group: index})
            rows = spec.unit_rows(key, axis, group, kept)
            wanted = rows.take_along_dim(index[..., None], dim=-2)
            assert torch.equal(spec.unit_rows(key, axis, group, moved), wanted)


def test_unit_rows_of_a_factored_axis_hold_rows_and_positions():
    spec = one({"c": 2}, (Factor(None, 2),), (C, Factor(None, 2)))
    weight = torch.arange(8).reshape(2, 4)  # two rows; channel 0 has columns 0 and 1
    assert spec.unit_rows("w", 1, "c", weight).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_touching_lists_every_axis_of_a_group_once():
    assert HAND.touching("0") == [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]
    assert SPECS["queries, keys and values"].touching("u") == [("w", 0)]
    assert SPECS["a group on two axes"].touching("n") == [("w", 0), ("w", 1)]


def test_the_row_group_is_that_of_a_first_axis_without_factors():
    assert HAND.row_group("0.weight") == "0"
    assert HAND.row_group("2.weight") is None
    assert HAND.row_group("steps") is None
    assert SPECS["units in heads"].row_group("w") is None
    assert SPECS["parts"].row_group("w") is None


def test_groups_come_after_those_they_are_nested_in():
    spec = one({"u": 3, "c": 2, "h": 2}, (H, C, U), within={"u": ("h", "c"), "c": ("h",)})
    assert spec.order == ("h", "c", "u")
    assert (spec.outer("u"), spec.blocks("u"), spec.inner("h")) == (("h", "c"), (2, 2), ("c", "u"))
    assert (spec.outer("h"), spec.blocks("h"), spec.inner("u")) == ((), (), ())


def test_rescaling_multiplies_by_the_power_of_each_axis():
    factors = torch.tensor([2.0, 4.0, 8.0])
    scaled = HAND.rescale(hand_weights(), HAND.scalings[0], factors)
    expected = {
        "0.weight": torch.tensor([[20.0], [44.0], [96.0]]),
        "0.bias": torch.tensor([40.0, 84.0, 176.0]),
        "2.weight": torch.tensor([[15.0, 7.75, 4.0], [20.0, 10.25, 5.25]]),
        "2.bias": torch.tensor([50.0, 51.0]),
        "steps": torch.tensor(7),
    }
    assert_equal(scaled, expected)


@pytest.mark.parametrize("name", SPECS)
def test_rescaling_is_what_a_loop_over_entries_does(name):
    spec = SPECS[name]
    tensor = numbered(spec) + 1
    for group in spec.groups:
        size = (*spec.blocks(group), spec.groups[group])
        factors = torch.rand(size, generator=torch.Generator().manual_seed(0)).double() + 0.5
        for axis in {axis for _, axis in spec.touching(group)}:
            scaling = Scaling(group, "real", {"w": {axis: 2}})
            found = spec.rescale_tensor("w", tensor, scaling, factors)
            axes = [list(entries(own)) for own in spec.axes["w"]]
            for index in product(*(range(len(own)) for own in axes)):
                here = [own[i] for own, i in zip(axes, index, strict=True)]
                labels = {s[1]: s[2] for entry in here for s in entry if len(s) == 3}
                labels |= {s[1]: s[2] for s in here[axis] if len(s) == 3}
                value = tensor[index]
                for step in here[axis]:
                    if len(step) == 3 and step[1] == group:
                        unit = (*(labels[o] for o in spec.outer(group)), step[2])
                        value = value * factors[unit] ** 2
                assert torch.isclose(found[index], value, rtol=1e-15 * 4, atol=0)


def test_a_pinned_group_stays_where_it_is_and_says_why():
    spec = SPECS["queries, keys and values"]
    spec = replace(spec, hidden=(14, 14), scalings=(Scaling("u", "sign", {"w": {0: 1}}),))
    pinned = spec.without("u", "of a test")
    assert pinned.groups == {"h": 2, "c": 2}
    assert pinned.within == {"c": ("h",)}
    assert pinned.scalings == ()
    assert pinned.pinned == ("u (6 units): of a test",)
    assert pinned.hidden == (14, 8)
    assert pinned.fixed == {"of a test": 1}
    assert spec.groups == {"h": 2, "u": 3, "c": 2}
    pinned.check()
    perm = pinned.random(torch.Generator().manual_seed(0))
    tensor = numbered(spec)
    assert torch.equal(
        pinned.permute_tensor("w", tensor, perm), slow_permute(spec, "w", tensor, perm)
    )


def test_units_whose_heads_are_pinned_are_permuted_alike_in_all_heads():
    pinned = SPECS["units in heads"].without("h", "of a test")
    assert pinned.within == {}
    perm = {"u": torch.tensor([2, 0, 1])}
    assert pinned.permute_tensor("w", torch.arange(6), perm).tolist() == [2, 0, 1, 5, 3, 4]


def test_the_free_share_is_that_of_hidden_units():
    assert HAND.free_share == 1
    assert replace(HAND, hidden=(8, 2)).free_share == 0.25
    assert replace(HAND, hidden=(0, 0)).free_share == 1


def test_fixed_counts_the_axes_that_hold_something_fixed_by_its_reason():
    assert HAND.fixed == {"outputs": 2}
    twice = (Factor(None, 2, "taps"), Factor("u", 3), Factor(None, 2, "taps"))
    spec = one({"u": 3}, twice, (Concat(((U,), (Factor(None, 2, "inputs"),))),))
    assert spec.fixed == {"taps": 1, "inputs": 1}


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_survives_json(name):
    scaling = Scaling(next(iter(SPECS[name].groups)), "sign", {"w": {0: -1}})
    spec = replace(SPECS[name], scalings=(scaling,), pinned=("a unit",), hidden=(9, 4))
    back = PermutationSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert back == spec
    assert (back.digest, str(back), back.fixed) == (spec.digest, str(spec), spec.fixed)


def test_what_is_not_said_in_json_is_empty():
    data = {"groups": {"u": 3}, "axes": {"w": [[["u", 3]], [[None, 2, "taps"]]]}}
    spec = PermutationSpec.from_json(data)
    assert spec == one({"u": 3}, (U,), (Factor(None, 2, "taps"),))


@pytest.mark.parametrize(
    "change",
    [
        {"axes": {**HAND.axes, "0.bias": ((Factor(None, 3),),)}},
        {"groups": {"0": 3, "1": 2}},
        {"scalings": ()},
        {"pinned": ("a unit",)},
        {"hidden": (4, 3)},
    ],
)
def test_specs_differ_in_their_digest_when_anything_does(change):
    assert replace(HAND, **change).digest != HAND.digest
    assert replace(HAND).digest == HAND.digest


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        {"groups": {}, "axes": {"w": 3}},
        {"groups": {}, "axes": {"w": [[["g"]]]}},
        {"groups": 1, "axes": {}},
        {"groups": {"u": "many"}, "axes": {}},
        {"groups": {}, "axes": {"w": [[{"parts": []}]]}},
        {"groups": {}, "axes": {}, "scalings": [["g"]]},
        {"groups": {}, "axes": {}, "within": 3},
    ],
)
def test_json_that_is_no_spec_is_refused(data):
    with pytest.raises(Unreadable, match="no permutation spec written by metamerge"):
        PermutationSpec.from_json(data)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (one({}, (U,)), "3 units of 'u' in 'w', and None"),
        (one({"u": 4}, (U,)), "3 units of 'u' in 'w', and 4"),
        (one({"u": 4}, (Concat(((U,),)),)), "3 units of 'u' in 'w', and 4"),
        (one({"h": 2, "u": 3}, (U,), within=HEADS), r"nests 'u' in \('h',\), but 'w' carries only"),
        (one({"h": 2, "u": 3}, (H, U), within={"u": ("h",), "h": ("u",)}), "in itself"),
        (one({"u": 3}, (U,), within={"u": ("u",)}), "nests 'u' in itself"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(spec, message):
    with pytest.raises(Unreadable, match=message):
        spec.check()
    with pytest.raises(Unreadable, match=message):
        PermutationSpec.from_json(spec.to_json())


def test_weights_that_fit_pass_the_check(network):
    network.spec.check_weights("member", network.weights())


@pytest.mark.parametrize(
    ("change", "found"),
    [({"0.weight": torch.zeros(4, 1)}, "(4, 1)"), ({"0.weight": torch.zeros(3)}, "(3,)")],
)
def test_weights_of_another_shape_are_refused_with_both_shapes(change, found):
    with pytest.raises(IncompatibleWeights) as caught:
        HAND.check_weights("checkpoints[1]", {**hand_weights(), **change})
    assert str(caught.value) == (
        f"checkpoints[1]: '0.weight' has shape {found}, the permutation spec expects (3, 1). "
        "Use the spec of the network that these weights belong to."
    )


def test_missing_weights_are_refused_by_name():
    with pytest.raises(IncompatibleWeights, match=r"'0\.bias' has shape nothing"):
        HAND.check_weights("b", {k: t for k, t in hand_weights().items() if k != "0.bias"})


def test_parts_are_counted_when_weights_are_checked():
    spec = SPECS["parts in a product"]
    spec.check_weights("member", {"w": torch.zeros(28)})
    with pytest.raises(IncompatibleWeights, match=r"\(29,\), the permutation spec expects \(28,\)"):
        spec.check_weights("member", {"w": torch.zeros(29)})


def test_a_spec_prints_one_line_per_group_and_what_is_pinned():
    assert str(HAND) == (
        "PermutationSpec: 1 group, 3 of 3 hidden units are free\n"
        "  0 (3 units, positive scaling): 0.weight[0], 0.bias[0], 2.weight[1]"
    )
    spec = SPECS["units in blocks of heads"]
    assert str(replace(spec, hidden=(14, 12), pinned=("two units: of a test",))) == (
        "PermutationSpec: 3 groups, 12 of 14 hidden units are free\n"
        "  h (2 units): w[0]\n"
        "  c (2 units in each of h): w[0]\n"
        "  u (3 units in each of h x c): w[0]\n"
        "  pinned: two units: of a test"
    )
    assert str(PermutationSpec({}, {})) == (
        "PermutationSpec: 0 groups, 0 of 0 hidden units are free"
    )


SIZES = {"a": 2, "b": 3, "c": 2, "d": 2}


@st.composite
def specs(draw):
    """A random spec: groups may be nested in those before them, axes carry factors and parts."""
    groups = {g: SIZES[g] for g in "abcd"[: draw(st.integers(1, 4))]}
    names = list(groups)
    within = {}
    for number, group in enumerate(names):
        direct = draw(st.lists(st.sampled_from(names[:number]), unique=True)) if number else []
        closed = {o for near in direct for o in (near, *within.get(near, ()))}
        if closed:
            within[group] = tuple(g for g in names if g in closed)
    axes = {}
    for number in range(draw(st.integers(1, 2))):
        kept = draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
        kept = [g for g in names if any(g in (k, *within.get(k, ())) for k in kept)]
        carried = draw(st.permutations([Factor(g, groups[g]) for g in kept]))
        here = [[] for _ in range(draw(st.integers(1, 3)))]
        for factor in carried:
            here[draw(st.integers(0, len(here) - 1))].append(factor)
        for axis in here:
            if not axis or draw(st.booleans()):
                axis.append(Factor(None, draw(st.integers(1, 2))))
        if draw(st.booleans()):  # everything once more, behind something fixed
            whole = tuple(factor for axis in here for factor in axis)
            here = [[Concat((whole, (Factor(None, 2),), whole))]]
        axes[f"w{number}"] = tuple(map(tuple, here))
    return PermutationSpec(groups, axes, within)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spec=specs(), seed=st.integers(0, 1000))
def test_unpermuting_undoes_permuting_for_any_spec(spec, seed):
    spec.check()
    weights = {key: numbered(spec, key) for key in spec.axes}
    perm = spec.random(torch.Generator().manual_seed(seed))
    moved = spec.permute(weights, perm)
    assert_equal(spec.unpermute(moved, perm), weights)
    assert_equal(spec.permute(spec.unpermute(weights, perm), perm), weights)
    for key, tensor in weights.items():
        if tensor.numel() <= 200:
            assert torch.equal(moved[key], slow_permute(spec, key, tensor, perm))
