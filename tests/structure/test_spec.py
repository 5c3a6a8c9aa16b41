import json

import pytest
import torch
from torch import nn

from metamerge.errors import IncompatibleWeights, Unreadable
from metamerge.structure import Factor, PermutationSpec, discover

# Linear 1 -> 3 -> 2: hidden group "0" of three units.
HAND = PermutationSpec(
    groups={"0": 3},
    axes={
        "0.weight": ((Factor("0", 3),), (Factor(None, 1),)),
        "0.bias": ((Factor("0", 3),),),
        "2.weight": ((Factor(None, 2),), (Factor("0", 3),)),
        "2.bias": ((Factor(None, 2),),),
    },
    fixed={"inputs keep their place": 0, "outputs keep their place": 2},
)


def hand_weights():
    return {
        "0.weight": torch.tensor([[10.0], [11.0], [12.0]]),
        "0.bias": torch.tensor([20.0, 21.0, 22.0]),
        "2.weight": torch.tensor([[30.0, 31.0, 32.0], [40.0, 41.0, 42.0]]),
        "2.bias": torch.tensor([50.0, 51.0]),
        "steps": torch.tensor(7),
    }


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


def test_unpermuting_undoes_permuting(network):
    weights = network.weights()
    perm = network.spec.random(torch.Generator().manual_seed(0))
    spec = network.spec
    assert_equal(spec.unpermute(spec.permute(weights, perm), perm), weights)
    assert_equal(spec.permute(spec.unpermute(weights, perm), perm), weights)


def test_permuting_twice_is_permuting_by_the_first_permutation_read_at_the_second(network):
    weights, spec = network.weights(), network.spec
    generator = torch.Generator().manual_seed(0)
    first, second = spec.random(generator), spec.random(generator)
    once = spec.permute(weights, {group: first[group][second[group]] for group in spec.groups})
    assert_equal(spec.permute(spec.permute(weights, first), second), once)


def test_the_identity_changes_nothing(network):
    assert_equal(
        network.spec.permute(network.weights(), network.spec.identity()), network.weights()
    )


def test_a_batch_of_permutations_is_one_for_every_network(network):
    spec, weights = network.spec, network.weights(2, 3)
    perm = spec.random(torch.Generator().manual_seed(0), (2, 3))
    together = spec.permute(weights, perm)
    for f in range(2):
        for m in range(3):
            own = spec.permute(
                {key: t[f, m] for key, t in weights.items()},
                {group: index[f, m] for group, index in perm.items()},
            )
            assert_equal({key: t[f, m] for key, t in together.items()}, own)
    undone = spec.unpermute(together, perm)
    assert_equal(undone, weights)


def test_one_permutation_does_for_a_whole_stack(network):
    spec, weights = network.spec, network.weights(2, 3)
    perm = spec.random(torch.Generator().manual_seed(0))
    together = spec.permute(weights, perm)
    last = spec.permute({key: t[1, 2] for key, t in weights.items()}, perm)
    assert_equal({key: t[1, 2] for key, t in together.items()}, last)


def test_random_permutations_are_permutations_and_repeat_with_their_seed():
    first = HAND.random(torch.Generator().manual_seed(0), (50,))["0"]
    assert torch.equal(first, HAND.random(torch.Generator().manual_seed(0), (50,))["0"])
    assert torch.equal(first.sort(-1).values, torch.arange(3).expand(50, 3))
    assert len(first.unique(dim=0)) == 6  # all of them: one is missing with chance 6 * (5/6)**50


def test_gradients_flow_back_through_a_permutation():
    weights = hand_weights()
    weights["0.bias"].requires_grad_()
    aligned = HAND.permute(weights, {"0": torch.tensor([2, 0, 1])})
    (aligned["0.bias"] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weights["0.bias"].grad.tolist() == [2.0, 3.0, 1.0]


def flattened():
    """Two channels of 1 by 2 positions, flattened into the four columns of a linear layer."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(4, 1))
    return discover(model, torch.zeros(2, 1, 1, 2))


def test_columns_behind_a_flatten_move_in_blocks():
    spec = flattened()
    assert spec.axes["2.weight"] == ((Factor(None, 1),), (Factor("0", 2), Factor(None, 2)))
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # channel 0: 1, 2; channel 1: 3, 4
    moved = spec.permute_tensor("2.weight", weight, {"0": torch.tensor([1, 0])})
    assert moved.tolist() == [[3.0, 4.0, 1.0, 2.0]]


def test_an_inner_factor_moves_within_its_blocks():
    # Channels last: column = position * 2 + channel.
    spec = PermutationSpec({"c": 2}, {"w": ((Factor(None, 2), Factor("c", 2)),)}, {})
    moved = spec.permute_tensor("w", torch.tensor([1, 2, 3, 4]), {"c": torch.tensor([1, 0])})
    assert moved.tolist() == [2, 1, 4, 3]


def test_two_groups_on_one_axis_move_independently():
    spec = PermutationSpec({"a": 2, "b": 3}, {"w": ((Factor("a", 2), Factor("b", 3)),)}, {})
    perm = {"a": torch.tensor([1, 0]), "b": torch.tensor([2, 0, 1])}
    moved = spec.permute_tensor("w", torch.arange(6), perm)
    assert moved.tolist() == [5, 3, 4, 2, 0, 1]
    # the same for a batch in which only one entry is permuted
    both = {"a": torch.tensor([[0, 1], [1, 0]]), "b": torch.tensor([[0, 1, 2], [2, 0, 1]])}
    batched = spec.permute_tensor("w", torch.arange(6).expand(2, 6), both)
    assert batched.tolist() == [[0, 1, 2, 3, 4, 5], [5, 3, 4, 2, 0, 1]]


def test_a_group_may_be_kept_in_place_on_one_axis_of_two():
    square = ((Factor("g", 3),), (Factor("g", 3),))
    spec = PermutationSpec({"g": 3}, {"w": square}, {})
    weight, perm = torch.arange(9).reshape(3, 3), {"g": torch.tensor([2, 0, 1])}
    assert spec.permute_tensor("w", weight, perm).tolist() == [[8, 6, 7], [2, 0, 1], [5, 3, 4]]
    rows = spec.permute_tensor("w", weight, perm, keep=(1, "g"))
    columns = spec.permute_tensor("w", weight, perm, keep=(0, "g"))
    assert rows.tolist() == [[6, 7, 8], [0, 1, 2], [3, 4, 5]]
    assert columns.tolist() == [[2, 0, 1], [5, 3, 4], [8, 6, 7]]


def test_unit_rows_hold_all_that_belongs_to_a_unit():
    weight = torch.arange(6.0).reshape(2, 3)
    spec = PermutationSpec(
        {"a": 2, "b": 3},
        {"w": ((Factor("a", 2),), (Factor("b", 3),)), "v": ((Factor("a", 2),),)},
        {},
    )
    assert spec.unit_rows("w", 0, "a", weight).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert spec.unit_rows("w", 1, "b", weight).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert spec.unit_rows("v", 0, "a", torch.tensor([7.0, 8.0])).tolist() == [[7], [8]]
    stacked = torch.stack([weight, weight + 10])[:, None]  # [2, 1, 2, 3]
    rows = spec.unit_rows("w", 1, "b", stacked)
    assert rows.shape == (2, 1, 3, 2)
    assert rows[1, 0].tolist() == [[10, 13], [11, 14], [12, 15]]


def test_unit_rows_of_a_factored_axis_hold_rows_and_positions():
    spec = PermutationSpec(
        {"c": 2}, {"w": ((Factor(None, 2),), (Factor("c", 2), Factor(None, 2)))}, {}
    )
    weight = torch.arange(8).reshape(2, 4)  # two rows; channel 0 has columns 0 and 1
    assert spec.unit_rows("w", 1, "c", weight).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_unit_rows_move_with_their_units(network):
    spec, weights = network.spec, network.weights()
    for group in spec.groups:
        perm = {**spec.identity(), group: torch.randperm(spec.groups[group])}
        permuted = spec.permute(weights, perm)
        for key, axis in spec.touching(group):
            kept = spec.permute_tensor(key, weights[key], perm, keep=(axis, group))
            rows = spec.unit_rows(key, axis, group, kept)
            moved = spec.unit_rows(key, axis, group, permuted[key])
            assert torch.equal(moved, rows[perm[group]]), key


def test_touching_lists_every_axis_of_a_group():
    assert HAND.touching("0") == [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]
    assert HAND.touching("no such group") == []


def test_the_row_group_is_that_of_a_first_axis_without_factors():
    assert HAND.row_group("0.weight") == "0"
    assert HAND.row_group("2.weight") is None
    assert HAND.row_group("steps") is None
    assert (
        PermutationSpec({"c": 2}, {"w": ((Factor("c", 2), Factor(None, 2)),)}, {}).row_group("w")
        is None
    )


def test_every_spec_survives_json(network):
    text = json.dumps(network.spec.to_json())
    back = PermutationSpec.from_json(json.loads(text))
    assert back == network.spec
    assert back.digest == network.spec.digest
    assert str(back) == str(network.spec)


def test_specs_differ_in_their_digest_when_an_axis_does():
    other = {**HAND.axes, "0.bias": ((Factor(None, 3),),)}
    assert PermutationSpec(HAND.groups, other, HAND.fixed).digest != HAND.digest


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        {"groups": {}, "axes": {}},
        {"groups": {}, "axes": {"w": 3}, "fixed": {}},
        {"groups": {}, "axes": {"w": [[["g"]]]}, "fixed": {}},
        {"groups": 1, "axes": {}, "fixed": {}},
    ],
)
def test_json_that_is_no_spec_is_refused(data):
    with pytest.raises(Unreadable, match="no permutation spec written by metamerge"):
        PermutationSpec.from_json(data)


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


def test_a_spec_prints_one_line_per_group():
    assert str(HAND) == (
        "PermutationSpec: 1 groups, 3 free units\n"
        "  0 (3 units): 0.weight[0], 0.bias[0], 2.weight[1]"
    )
    assert str(PermutationSpec({}, {}, {})) == "PermutationSpec: 0 groups, 0 free units"
