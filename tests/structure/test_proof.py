import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.errors import IncompatibleWeights, StructureError
from metamerge.structure import (
    Concat,
    Factor,
    PermutationSpec,
    Scaling,
    discover_program,
    prove,
    prove_module,
    trace,
)

WRONG = "The permutation spec is wrong: "


def with_factors(spec, key, axis, factors):
    """The spec with other factors on one axis of one tensor."""
    factored = list(spec.axes[key])
    factored[axis] = tuple(factors)
    return replace(spec, axes={**spec.axes, key: tuple(factored)})


def forgotten(factors, groups):
    """The factors of an axis, some groups fixed."""
    return tuple(
        Concat(tuple(forgotten(part, groups) for part in factor.axes))
        if isinstance(factor, Concat)
        else Factor(None, factor.size)
        if factor.group in groups
        else factor
        for factor in factors
    )


def without(spec, key, axis, group):
    """The spec that has forgotten that a group, and what is nested in it, permutes one axis."""
    spec = with_factors(spec, key, axis, forgotten(spec.axes[key][axis], {group}))
    for other, factors in enumerate(spec.axes[key]):
        spec = with_factors(spec, key, other, forgotten(factors, spec.inner(group)))
    return spec


def plain(spec):
    """The spec without changes of scale, which are not in question."""
    return replace(spec, scalings=())


def refused(program, spec, **options):
    """What ``prove`` says of a wrong spec."""
    with pytest.raises(StructureError) as caught:
        prove(program, spec, **options)
    message = str(caught.value)
    assert message.startswith(WRONG)
    assert "expected below 1e-09" in message
    return message


def chain(*widths, activation=nn.ReLU):
    """A perceptron, traced."""
    layers = []
    for fan_in, width in pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, width), activation()]
    model = nn.Sequential(*layers, nn.Linear(*widths[-2:]))
    return trace(model, torch.zeros(2, widths[0]))


# ---------------------------------------------------------------------------- right specs


def test_the_spec_of_every_network_holds_for_any_seed(network):
    for seed in range(3):
        prove(network.program, network.spec, seed=seed)


def test_a_spec_that_permutes_nothing_holds(network):
    program = network.program
    axes = {
        key: tuple((Factor(None, n),) for n in program.shape(value))
        for value, key in program.parameters.items()
    }
    prove(program, PermutationSpec({}, axes))


def test_a_smaller_symmetry_holds(networks):
    program, spec = networks["attention"].program, plain(networks["attention"].spec)
    for group in spec.groups:
        prove(program, spec.without(group, "it is not asked for"))
    # units alike in both heads are some of the units that each head may order as it likes
    for nested in ("packed#2", "packed#3"):
        alike = {group: outer for group, outer in spec.within.items() if group != nested}
        prove(program, replace(spec, within=alike))


def test_two_groups_merged_into_one_are_a_smaller_symmetry_and_hold():
    # Both layers permuted alike is one of the permutations that the full spec allows.
    program = chain(4, 5, 5, 3)
    spec = discover_program(program)
    axes = {
        key: tuple(tuple(Factor(f.group and "0", f.size) for f in axis) for axis in factored)
        for key, factored in spec.axes.items()
    }
    prove(program, PermutationSpec({"0": 5}, axes))
    # ... but with one axis left to the other group it is none any more.
    half = {**axes, "2.weight": spec.axes["2.weight"]}
    assert "permuting 0 changes" in refused(program, PermutationSpec({"0": 5, "2": 5}, half))


def test_the_proof_leaves_the_random_numbers_of_others_alone(networks):
    torch.manual_seed(7)
    random.seed(7)
    before = torch.random.get_rng_state(), random.getstate()
    prove(networks["mlp"].program, networks["mlp"].spec)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


# ---------------------------------------------------------------------------- wrong specs


def test_a_spec_that_misses_any_single_axis_is_refused_by_name(network):
    spec = plain(network.spec)
    readers = {
        key: [f"{node.op} ({node.name})" for node in network.program.nodes if value in node.refs]
        for value, key in network.program.parameters.items()
    }
    for group in spec.groups:
        for key, axis in spec.touching(group):
            wrong = without(spec, key, axis, group)
            for seed in range(3):
                message = refused(network.program, wrong, seed=seed)
                nested = (group, *spec.inner(group))
                failing = next(g for g in nested if f"permuting {g} " in message)
                for other, place in wrong.touching(failing):
                    assert f"('{other}', {place})" in message
                    assert len(wrong.touching(failing)) > 4 or readers[other][0] in message


def test_a_spec_that_permutes_inputs_or_outputs_is_refused(layered):
    first, last = layered.layout.layers[0], layered.layout.layers[-1]
    for key, axis in ((first.weight, 1), (last.weight, 0)):
        outer, *inner = layered.spec.axes[key][axis]
        if outer.size > 1:
            claimed = with_factors(layered.spec, key, axis, [Factor("claim", outer.size), *inner])
            groups = {**layered.spec.groups, "claim": outer.size}
            message = refused(layered.program, replace(claimed, groups=groups))
            assert "permuting claim changes" in message
            assert f"('{key}', {axis})" in message


def test_a_spec_that_claims_any_fixed_axis_is_refused(network):
    # All but positions that are folded: the order of two rows of a table that is summed over.
    for key, axes in network.spec.axes.items():
        for axis, factors in enumerate(axes):
            for place, factor in enumerate(factors):
                if isinstance(factor, Concat) or factor.group is not None or factor.size == 1:
                    continue
                claimed = [*factors]
                claimed[place] = Factor("claim", factor.size)
                wrong = with_factors(plain(network.spec), key, axis, claimed)
                wrong = replace(wrong, groups={**wrong.groups, "claim": factor.size})
                assert "permuting claim changes" in refused(network.program, wrong)


def test_axes_exchanged_between_two_groups_are_refused():
    program = chain(4, 5, 5, 3)
    spec = plain(discover_program(program))
    wrong = with_factors(spec, "2.weight", 0, [Factor("0", 5)])
    wrong = with_factors(wrong, "2.weight", 1, [Factor("2", 5)])
    message = refused(program, wrong)
    assert "permuting 0 changes the output" in message
    assert "('2.weight', 0)" in message
    assert "linear.default (linear_1)" in message


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [("attention", "packed#2", "packed#3"), ("grouped convolution", "0#2", "0")],
)
def test_two_unrelated_groups_taken_for_one_in_one_tensor_are_refused(networks, name, one, other):
    program, spec = networks[name].program, plain(networks[name].spec)

    def renamed(factors):
        return tuple(
            Concat(tuple(renamed(part) for part in f.axes))
            if isinstance(f, Concat)
            else replace(f, group=other if f.group == one else f.group)
            for f in factors
        )

    assert spec.groups[one] == spec.groups[other]
    key, axis = spec.touching(one)[0]
    wrong = with_factors(spec, key, axis, renamed(spec.axes[key][axis]))
    assert "permuting " in refused(program, wrong)


@pytest.mark.parametrize(
    ("name", "key", "axis", "group"),
    [
        ("conv2d with batch normalisation and flatten", "5.weight", 1, "0"),
        ("views", "left.weight", 1, "conv"),
        ("attention", "merge.weight", 1, "packed"),
        ("grouped convolution", "2.weight", 0, "0"),
        ("grouped convolution", "6.weight", 1, "0"),
    ],
)
def test_factors_of_an_axis_in_the_wrong_order_are_refused(networks, name, key, axis, group):
    spec = plain(networks[name].spec)
    first, *rest = spec.axes[key][axis]
    assert first.group == group
    assert rest
    message = refused(networks[name].program, with_factors(spec, key, axis, [*rest, first]))
    assert "permuting " in message
    assert f"('{key}', {axis})" in message


@pytest.mark.parametrize(
    ("name", "key", "group"),
    [("concatenation", "leave.weight", "left"), ("attention", "packed.weight", "packed#2")],
)
def test_concatenated_axes_in_the_wrong_order_are_refused(networks, name, key, group):
    spec = plain(networks[name].spec)
    axis = next(a for k, a in spec.touching(group) if k == key)
    (concat,) = spec.axes[key][axis]
    turned = Concat((*concat.axes[1:], concat.axes[0]))
    message = refused(networks[name].program, with_factors(spec, key, axis, [turned]))
    assert "permuting " in message


def shared_units():
    """Heads that share one layer: their units must be permuted alike."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.each, self.leave = nn.Linear(5, 6), nn.Linear(3, 4), nn.Linear(8, 3)

        def forward(self, x):
            heads = F.gelu(self.enter(x)).unflatten(-1, (2, 3))
            return self.leave(F.gelu(self.each(heads)).flatten(1))

    return trace(Heads(), torch.zeros(2, 5))


def test_units_that_must_move_alike_in_every_block_are_not_nested():
    program = shared_units()
    spec = discover_program(program)
    assert spec.within == {}
    assert list(spec.groups.values()) == [2, 3, 4]
    heads, units, made = spec.groups
    axes = {**spec.axes, "each.weight": ((Factor(made, 4),), (Factor(None, 3),))}
    wrong = replace(plain(spec), axes=axes, within={units: (heads,)})
    assert f"permuting {units} changes" in refused(program, wrong)


def test_what_is_nested_in_one_tensor_and_not_in_the_next_is_refused(networks):
    # Channels of a second convolution that is not grouped, said to move in each group on their own.
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.GELU(), nn.Conv2d(4, 6, 1, groups=2), nn.GELU(), nn.Conv2d(6, 3, 1)
    )
    program = trace(model, torch.zeros(2, 2, 3, 3))
    spec = plain(discover_program(program))
    blocks, inner, made = spec.groups
    assert spec.within == {inner: (blocks,), made: (blocks,)}
    alike = (Factor(None, 2), Factor(made, 3))
    wrong = with_factors(spec, "4.weight", 1, alike)
    wrong = replace(wrong, within={inner: (blocks,)})
    assert "permuting " in refused(program, wrong)


@pytest.mark.parametrize("seed", range(30))
def test_no_seed_lets_a_wrong_spec_of_two_units_pass(seed):
    # Half of all permutations of two units move nothing, and a ReLU hides two units now and then.
    model = nn.Sequential(
        nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()
    )
    program = trace(nn.Sequential(model, nn.Linear(2, 3)), torch.zeros(2, 4))
    spec = plain(discover_program(program))
    for group in spec.groups:
        for key, axis in spec.touching(group):
            assert "permuting " in refused(program, without(spec, key, axis, group), seed=seed)


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.GELU, nn.Tanh, nn.ReLU),
        pytest.param(nn.Sigmoid),
    ],
)
def test_depth_does_not_hide_a_wrong_spec(activation):
    # Layers of positive weights average: behind two dozen of them little is left of a difference.
    program = chain(6, *[24] * 24, 3, activation=activation)
    spec = plain(discover_program(program))
    for group in list(spec.groups)[:2]:
        for key, axis in spec.touching(group):
            message = refused(program, without(spec, key, axis, group))
            assert f"permuting {group} changes" in message


class Masked(nn.Module):
    """Causal attention of one head; ``mask`` is what future scores are replaced by."""

    def __init__(self, mask, *, added=False):
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 6), nn.Linear(6, 3)
        self.query, self.key = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.mask, self.added = mask, added

    def forward(self, x):
        x = F.gelu(self.enter(x))
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        future = torch.ones(4, 4, dtype=torch.bool).triu(1)
        if self.added:
            scores = scores + torch.zeros(4, 4).masked_fill(future, self.mask)
        else:
            scores = scores.masked_fill(future, self.mask)
        return self.leave(scores.softmax(-1) @ x)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        *(-1e4, -1e9, -1e15, -1e20, -1e38, torch.finfo(torch.float32).min, -float("inf")),
    ],
)
def test_masks_do_not_hide_a_wrong_spec(mask, added):
    program = trace(Masked(mask, added=added), torch.zeros(2, 4, 5))
    spec = plain(discover_program(program))
    assert len(spec.groups) == 2
    for group in spec.groups:
        for key, axis in spec.touching(group):
            assert "permuting " in refused(program, without(spec, key, axis, group))


def test_a_wrong_spec_that_shows_in_the_second_output_alone_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x):
            x = F.gelu(self.enter(x))
            return self.one(x), self.two(x)

    program = trace(Two(), torch.zeros(2, 4))
    wrong = without(discover_program(program), "two.weight", 1, "enter")
    assert "permuting enter changes" in refused(program, wrong)


def test_a_wrong_spec_that_shows_in_integers_alone_is_refused():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 9), nn.Linear(9, 9)

        def forward(self, x):
            return self.leave(F.gelu(self.enter(x))).argmax(-1)

    program = trace(Chosen(), torch.zeros(2, 4))
    spec = plain(discover_program(program))
    assert list(spec.groups.values()) == [9]
    assert "permuting enter changes" in refused(program, without(spec, "leave.weight", 1, "enter"))


def test_the_spec_of_another_width_is_refused_by_name(networks):
    program = trace(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6)), torch.zeros(2, 5))
    with pytest.raises(IncompatibleWeights, match=r"'4.weight' has shape nothing"):
        prove(program, networks["mlp"].spec)


def test_outputs_that_are_not_finite_prove_nothing():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.leave(torch.log(self.enter(x)))

    with pytest.raises(StructureError, match=r"outputs are NaN.*prove_module"):
        discover_program(trace(Root(), torch.zeros(2, 4)))


# ---------------------------------------------------------------------------- scales


@pytest.mark.parametrize("name", ["mlp", "tokens", "residual maps", "bottleneck of one unit"])
def test_a_change_of_scale_that_misses_one_tensor_is_refused(networks, name):
    network = networks[name]
    assert network.spec.scalings
    for scaling in network.spec.scalings:
        for key in scaling.powers:
            powers = {k: own for k, own in scaling.powers.items() if k != key}
            wrong = replace(network.spec, scalings=(replace(scaling, powers=powers),))
            message = refused(network.program, wrong)
            assert f"{scaling.kind} scaling of {scaling.group} changes" in message


@pytest.mark.parametrize(
    ("activation", "kind"), [(nn.ReLU, "sign"), (nn.ReLU, "real"), (nn.Tanh, "positive")]
)
def test_a_kind_of_scale_that_the_activation_does_not_pass_is_refused(activation, kind):
    program = chain(4, 5, 3, activation=activation)
    (scaling,) = discover_program(program).scalings
    wrong = replace(discover_program(program), scalings=(replace(scaling, kind=kind),))
    assert f"{kind} scaling of 0 changes" in refused(program, wrong)


# ---------------------------------------------------------------------------- training mode


def test_what_holds_in_eval_mode_alone_is_refused():
    # Without eps, a running variance of s^2 times the size divides the signal by s, which a column
    # of s puts right again; the statistics of a batch know nothing of the running variance.
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5, eps=1e-30), nn.ReLU(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).double().eval()
    weights = {key: t.double().abs() + 0.5 for key, t in model.state_dict().items()}
    weights["1.running_mean"].zero_()
    powers = {"1.running_var": {0: 2}, "1.bias": {0: -1}, "3.weight": {1: 1}}
    scaling = Scaling("0", "positive", powers)
    program = trace(model, torch.zeros(2, 4).double())
    claim = replace(discover_program(program), scalings=(scaling,))
    factors = torch.arange(1.0, 6.0).double()
    scaled = weights | {k: claim.rescale_tensor(k, weights[k], scaling, factors) for k in powers}

    def outputs(weights):
        return torch.func.functional_call(model, weights, (torch.eye(4).double(),))

    torch.testing.assert_close(outputs(scaled), outputs(weights), rtol=1e-12, atol=0)
    model.train()
    copies = [{key: t.clone() for key, t in own.items()} for own in (scaled, weights)]
    assert float((outputs(copies[0]) - outputs(copies[1])).abs().max()) > 0.1
    assert "positive scaling of 0 changes the output" in refused(program, claim)


def test_networks_are_proved_in_training_mode_as_well_where_they_normalise_batches(
    networks, monkeypatch
):
    from metamerge.structure import lockstep

    ran = []
    original = lockstep._call

    def spy(op, args, kwargs):
        if op == "batch_norm.default":
            ran.append(args[5].value)  # whether it is in training mode
        return original(op, args, kwargs)

    monkeypatch.setattr(lockstep, "_call", spy)
    network = networks["mlp with batch normalisation"]
    prove(network.program, network.spec)
    assert set(ran) == {False, True}
    assert ran == sorted(ran)  # in eval mode first


# ---------------------------------------------------------------------------- networks as they are


class Unexportable(nn.Module):
    """Control flow on values, which torch.export refuses."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)
        self.drop = nn.Dropout()

    def forward(self, x):
        x = torch.relu(self.enter(x))
        if x.sum() > 3:
            x = x * 2
        return {"logits": self.leave(self.drop(x)), "sum": x.sum()}


def by_hand(enter="hidden", leave="hidden"):
    def rows(group, size):
        return (Factor(group, size),)

    return PermutationSpec(
        {"hidden": 5},
        {
            "enter.weight": (rows(enter, 5), rows(None, 4)),
            "enter.bias": (rows(enter, 5),),
            "leave.weight": (rows(None, 3), rows(leave, 5)),
            "leave.bias": (rows(None, 3),),
        },
    )


X = torch.linspace(-1, 1, 24).reshape(6, 4)


@pytest.mark.parametrize("example", [X, [X], {"x": X}], ids=["one", "sequence", "by name"])
def test_a_spec_by_hand_of_a_network_that_cannot_be_traced_is_tested(example):
    model = Unexportable().eval()
    with pytest.raises(StructureError, match="cannot be traced"):
        trace(model, example)
    prove_module(model, example, by_hand())


@pytest.mark.parametrize("wrong", [{"enter": None}, {"leave": None}])
def test_a_wrong_spec_by_hand_is_refused_with_all_that_it_touches(wrong):
    spec = by_hand(**wrong)
    with pytest.raises(StructureError) as caught:
        prove_module(Unexportable().eval(), X, spec)
    message = str(caught.value)
    assert message.startswith(f"{WRONG}permuting hidden changes the output by ")
    assert str(spec.touching("hidden")) in message


def test_a_network_in_training_mode_cannot_be_tested():
    with pytest.raises(StructureError, match=r"Unexportable is in training mode.*model\.eval\(\)"):
        prove_module(Unexportable().train(), X, by_hand())


def test_a_network_that_was_tested_is_left_as_it_was():
    model = Unexportable().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prove_module(model, X, by_hand())
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    assert all(t.dtype == torch.float32 for t in model.state_dict().values())


def test_the_spec_of_another_network_is_refused_by_name_before_it_is_tested():
    with pytest.raises(IncompatibleWeights, match=r"Linear: 'enter.weight' has shape nothing"):
        prove_module(nn.Linear(4, 3).eval(), X, by_hand())


def test_discovered_specs_hold_for_the_modules_themselves(network):
    example = network.inputs(6)
    prove_module(network.build().eval(), example, network.spec)


def test_integers_of_a_network_that_is_tested_stay_integers():
    model = nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 3)).eval()
    tokens = torch.tensor([0, 3, 8, 1])
    spec = discover_program(trace(model, tokens))
    prove_module(model, tokens, spec)
    wrong = without(plain(spec), "1.running_mean", 0, next(iter(spec.groups)))
    with pytest.raises(StructureError, match="permutation spec is wrong"):
        prove_module(model, tokens, wrong)
