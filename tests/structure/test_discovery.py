from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metamerge.errors import IncompatibleWeights, StructureError
from metamerge.structure import Factor, Layout, discover, discover_program, prove, trace

# Sums in another order: at most some 100 terms of size 1, each rounded to 1e-16 of itself.
SAME = 1e-12


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def with_factors(spec, key, axis, factors):
    """The spec with other factors on one axis of one tensor."""
    factored = list(spec.axes[key])
    factored[axis] = tuple(factors)
    return replace(spec, axes={**spec.axes, key: tuple(factored)})


def without(spec, key, axis, group):
    """The spec that has forgotten that a group permutes one axis of one tensor."""
    kept = [Factor(None, f.size) if f.group == group else f for f in spec.axes[key][axis]]
    return with_factors(spec, key, axis, kept)


def test_groups_of_every_network_are_those_found_by_hand(network):
    lines = str(network.spec).split("\n  ")
    assert lines[1:] == list(network.groups)
    assert lines[0].startswith(f"PermutationSpec: {len(network.groups)} groups, ")


def test_every_axis_has_the_size_of_the_tensor_it_belongs_to(network):
    state = network.build().state_dict()
    assert set(network.spec.axes) == set(network.program.parameters.values())
    for key, factored in network.spec.axes.items():
        assert [prod(f.size for f in axis) for axis in factored] == list(state[key].shape), key
        for factor in (f for axis in factored for f in axis if f.group):
            assert network.spec.groups[factor.group] == factor.size


def test_permuting_all_groups_leaves_the_module_itself_as_it_was(network):
    weights, inputs = network.weights(), network.inputs(6)
    expected = network.outputs(weights, inputs)
    perm = network.spec.random(torch.Generator().manual_seed(2))
    permuted = network.spec.permute(weights, perm)
    assert any(not torch.equal(permuted[key], weights[key]) for key in weights)
    assert relative(network.outputs(permuted, inputs), expected) < SAME


def test_permuting_one_group_moves_every_tensor_it_touches(network):
    weights = network.weights()
    for group, count in network.spec.groups.items():
        perm = {**network.spec.identity(), group: torch.arange(count).roll(1)}
        permuted = network.spec.permute(weights, perm)
        moved = {key for key in weights if not torch.equal(permuted[key], weights[key])}
        assert moved == {key for key, _ in network.spec.touching(group)}


def test_inputs_and_outputs_are_never_free(network):
    first, last = network.layout.layers[0], network.layout.layers[-1]
    assert all(factor.group is None for factor in network.spec.axes[first.weight][1])
    assert all(factor.group is None for factor in network.spec.axes[last.weight][0])
    assert network.spec.fixed["outputs keep their place"] > 0
    assert ("inputs keep their place" in network.spec.fixed) == (network.shape[0] > 1)


def test_a_spec_that_misses_any_single_axis_is_refused(network):
    for group in network.spec.groups:
        for key, axis in network.spec.touching(group):
            for seed in range(3):
                with pytest.raises(StructureError, match="permutation spec is wrong"):
                    prove(network.program, without(network.spec, key, axis, group), seed=seed)


def test_a_spec_that_permutes_inputs_or_outputs_is_refused(network):
    first, last = network.layout.layers[0], network.layout.layers[-1]
    for key, axis in ((first.weight, 1), (last.weight, 0)):
        outer, *inner = network.spec.axes[key][axis]
        if outer.size > 1:
            claimed = with_factors(network.spec, key, axis, [Factor("claim", outer.size), *inner])
            groups = {**network.spec.groups, "claim": outer.size}
            with pytest.raises(StructureError, match="permuting claim changes the output"):
                prove(network.program, replace(claimed, groups=groups))


@pytest.mark.parametrize("seed", range(30))
def test_no_seed_lets_a_wrong_spec_of_two_units_pass(seed):
    # Half of all permutations of two units move nothing, and a ReLU hides two units now and then.
    model = nn.Sequential(
        nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()
    )
    program = trace(nn.Sequential(model, nn.Linear(2, 3)), torch.zeros(2, 4))
    spec = discover_program(program)
    for group in spec.groups:
        for key, axis in spec.touching(group):
            with pytest.raises(StructureError, match="permutation spec is wrong"):
                prove(program, without(spec, key, axis, group), seed=seed)


def test_depth_does_not_hide_a_wrong_spec():
    # Layers of positive weights average: behind two dozen of them little is left of a difference.
    layers = [nn.Linear(6, 64), nn.GELU()]
    layers += [part for _ in range(23) for part in (nn.Linear(64, 64), nn.GELU())]
    program = trace(nn.Sequential(*layers, nn.Linear(64, 3)), torch.zeros(2, 6))
    spec = discover_program(program)
    for group in list(spec.groups)[:2]:
        for key, axis in spec.touching(group):
            with pytest.raises(StructureError, match="permutation spec is wrong"):
                prove(program, without(spec, key, axis, group))


def test_axes_exchanged_between_two_groups_are_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    program = trace(model, torch.zeros(2, 4))
    spec = discover_program(program)
    wrong = with_factors(spec, "2.weight", 0, [Factor("0", 5)])
    wrong = with_factors(wrong, "2.weight", 1, [Factor("2", 5)])
    with pytest.raises(StructureError) as caught:
        prove(program, wrong)
    assert "permuting 0 changes the output" in str(caught.value)
    assert "('2.weight', 0)" in str(caught.value)


def test_two_groups_merged_into_one_are_a_smaller_symmetry_and_hold():
    # Both layers permuted alike is one of the permutations that the full spec allows.
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    program = trace(model, torch.zeros(2, 4))
    spec = discover_program(program)
    axes = {
        key: tuple(tuple(Factor(f.group and "0", f.size) for f in axis) for axis in factored)
        for key, factored in spec.axes.items()
    }
    prove(program, replace(spec, groups={"0": 5}, axes=axes))
    # ... but with one axis left to the other group it is none any more.
    half = {**axes, "2.weight": spec.axes["2.weight"]}
    with pytest.raises(StructureError, match="permuting 0 changes the output"):
        prove(program, replace(spec, groups={"0": 5, "2": 5}, axes=half))


def test_factors_of_a_flattened_axis_in_the_wrong_order_are_refused(networks):
    network = networks["conv2d with batch normalisation and flatten"]
    channels, *positions = network.spec.axes["5.weight"][1]
    assert (channels, positions) == (Factor("0", 4), [Factor(None, 2), Factor(None, 2)])
    with pytest.raises(StructureError, match="permuting 0 changes the output"):
        prove(network.program, with_factors(network.spec, "5.weight", 1, [*positions, channels]))


def test_the_spec_of_another_width_is_refused_by_name(networks):
    program = trace(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6)), torch.zeros(2, 5))
    with pytest.raises(IncompatibleWeights, match=r"'4.weight' has shape nothing"):
        prove(program, networks["mlp"].spec)


def test_an_operator_without_a_rule_is_refused_with_the_tensors_it_reads():
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3))
    with pytest.raises(StructureError) as caught:
        discover(model, torch.zeros(2, 4))
    message = str(caught.value)
    assert "aten.prelu.default" in message
    assert "'linear'" in message
    assert "'1.weight'" in message
    assert "linear.default" in message.partition("that are followed")[2]


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), "a convolution in 2 groups"),
        (nn.Conv2d(2, 4, 3, groups=2), (2, 5, 5), "a convolution in 2 groups"),
        (nn.Flatten(0, 1), (3, 4), "flatten"),
        (nn.ConstantPad1d((1, 1), 0.0), (4,), "changes the channel axis"),
        (nn.Conv2d(2, 4, 3, padding="same"), (2, 5, 5), "aten.conv2d.padding"),
    ],
)
def test_what_cannot_be_followed_is_refused(model, shape, message):
    with pytest.raises(StructureError, match=message):
        discover(model, torch.zeros(2, *shape))


def test_units_that_are_pooled_over_are_not_free():
    model = nn.Sequential(nn.Linear(4, 6), nn.MaxPool1d(2), nn.ReLU(), nn.Linear(3, 2))
    spec = discover(model, torch.zeros(2, 5, 4))
    assert spec.groups == {}
    assert spec.fixed["positions keep their place"] > 0


def test_two_groups_of_one_module_have_different_names():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Parameter(torch.ones(4, 5))
            self.inner = nn.Parameter(torch.ones(6, 4))
            self.leave = nn.Parameter(torch.ones(3, 6))

        def forward(self, x):
            x = torch.relu(nn.functional.linear(x, self.enter))
            x = torch.relu(nn.functional.linear(x, self.inner))
            return nn.functional.linear(x, self.leave)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Loose()

        def forward(self, x):
            return self.body(x)

    spec = discover(Outer(), torch.zeros(2, 5))
    assert spec.groups == {"body": 4, "body#2": 6}


def test_tied_tensors_follow_the_one_that_is_read():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)
            self.alias = nn.Linear(4, 5)
            self.alias.weight = self.enter.weight

        def forward(self, x):
            return self.leave(torch.relu(self.enter(x)))

    spec = discover(Tied(), torch.zeros(2, 4))
    assert spec.axes["alias.weight"] == spec.axes["enter.weight"]
    assert list(spec.groups.values()) == [5]


@st.composite
def sequential_networks(draw):
    """A multi-layer perceptron or convolutional network with random widths and parts."""
    activations = st.sampled_from([nn.ReLU(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Sigmoid()])
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    images = draw(st.booleans())
    norms = [None, nn.BatchNorm2d] if images else [None, nn.BatchNorm1d, nn.LayerNorm]
    layers, fan_in, hidden = [], 3, []
    for width in widths:
        bias, norm = draw(st.booleans()), draw(st.sampled_from(norms))
        kind = nn.Conv2d(fan_in, width, 2, bias=bias) if images else nn.Linear(fan_in, width, bias)
        layers += [kind, *([norm(width)] if norm else []), draw(activations)]
        hidden.append(width)
        fan_in = width
    if images:
        size = 5 - len(widths)
        pooled = draw(st.booleans())
        layers += [nn.AdaptiveAvgPool2d(1)] if pooled else []
        layers += [nn.Flatten()]
        fan_in *= 1 if pooled else size * size
    layers.append(nn.Linear(fan_in, 2, bias=draw(st.booleans())))
    return nn.Sequential(*layers), (3, 5, 5) if images else (3,), hidden


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn=sequential_networks(), seed=st.integers(0, 1000))
def test_any_sequential_network_keeps_its_function_under_its_permutations(
    make_network, drawn, seed
):
    model, shape, hidden = drawn
    spec = discover(model, torch.zeros(2, *shape))
    assert sorted(spec.groups.values()) == sorted(width for width in hidden if width > 1)
    network = make_network(lambda: model, shape)
    weights, inputs = network.weights(seed=seed), network.inputs(4)
    perm = spec.random(torch.Generator().manual_seed(seed))
    expected = network.outputs(weights, inputs)
    found = network.outputs(spec.permute(weights, perm), inputs)
    assert float((found - expected).abs().max()) < SAME * (1 + float(expected.abs().max()))


def test_layouts_name_the_layers_of_every_network(network):
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    modules = [f"{n}.weight" for n, m in network.build().named_modules() if isinstance(m, kinds)]
    assert sorted(layer.weight for layer in network.layout.layers) == sorted(modules)
    assert isinstance(network.layout, Layout)
