from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metamerge.errors import StructureError
from metamerge.structure import Concat, discover, discover_program, discovery, trace
from metamerge.structure.rules import RULES

# Sums in another order: at most some 100 terms of size 1, each rounded to 1e-16 of itself.
SAME = 1e-12


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def sizes(axis):
    """Number of entries of an axis, from its factors."""
    return prod(sum(map(sizes, f.axes)) if isinstance(f, Concat) else f.size for f in axis)


def factors(axis):
    """Every factor of an axis, those of concatenated axes included."""
    for factor in axis:
        if isinstance(factor, Concat):
            for part in factor.axes:
                yield from factors(part)
        else:
            yield factor


def module_of(forward, **parts):
    """A module with the given parts and forward function."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x):
            return forward(self, x)

    return Written().eval()


def lines(spec):
    """What ``str(spec)`` says of each group, without the changes of scale."""
    return [
        f"{group} {n}{list(spec.outer(group)) or ''}: "
        + " ".join(f"{key}[{axis}]" for key, axis in spec.touching(group))
        for group, n in spec.groups.items()
    ]


@pytest.fixture
def anew(monkeypatch):
    """Nothing is remembered of programs that were proved before."""
    monkeypatch.setattr(discovery, "_SPECS", {})


# ---------------------------------------------------------------------------- the whole table


def test_groups_of_every_network_are_those_found_by_hand(network):
    head, *found = str(network.spec).split("\n  ")
    assert found == list(network.groups)
    plural = "s" * (len(network.groups) != 1)
    assert head.startswith(f"PermutationSpec: {len(network.groups)} group{plural}, ")


def test_every_axis_has_the_size_of_the_tensor_it_belongs_to(network):
    state = network.build().state_dict()
    assert set(network.spec.axes) == set(network.program.parameters.values())
    for key, axes in network.spec.axes.items():
        assert [sizes(axis) for axis in axes] == list(state[key].shape), key
        for factor in (f for axis in axes for f in factors(axis) if f.group):
            assert network.spec.groups[factor.group] == factor.size


def test_every_factor_that_stays_in_place_has_a_reason(network):
    for key, axes in network.spec.axes.items():
        for factor in (f for axis in axes for f in factors(axis)):
            assert bool(factor.reason) == (factor.group is None and factor.size > 1), key


def test_permuting_all_groups_leaves_the_module_itself_as_it_was(network):
    weights, inputs = network.weights(), network.inputs(6)
    expected = network.outputs(weights, inputs)
    perm = network.spec.random(torch.Generator().manual_seed(2))
    permuted = network.spec.permute(weights, perm)
    assert any(not torch.equal(permuted[key], weights[key]) for key in weights)
    assert relative(network.outputs(permuted, inputs), expected) < SAME


def test_permuting_one_group_moves_every_tensor_it_touches(network):
    weights, spec = network.weights(), network.spec
    for group, count in spec.groups.items():
        rolled = torch.arange(count).roll(1).expand(*spec.blocks(group), count)
        permuted = spec.permute(weights, {**spec.identity(), group: rolled})
        moved = {key for key in weights if not torch.equal(permuted[key], weights[key])}
        assert moved == {key for key, _ in spec.touching(group)}


def test_inputs_and_outputs_are_never_free(layered):
    first, last = layered.layout.layers[0], layered.layout.layers[-1]
    assert all(factor.group is None for factor in layered.spec.axes[first.weight][1])
    assert all(factor.group is None for factor in layered.spec.axes[last.weight][0])
    assert layered.spec.fixed["outputs"] > 0
    assert ("inputs" in layered.spec.fixed) == (layered.shape[0] > 1)


def test_all_hidden_units_of_the_table_are_free_but_those_at_constants(networks):
    shares = {name: network.spec.free_share for name, network in networks.items()}
    assert shares.pop("written in place") == 6 / 10  # the other 4 are multiplied by 1, 2, 3, 4
    assert set(shares.values()) == {1.0}
    assert not any(network.spec.pinned for network in networks.values())


# ---------------------------------------------------------------------------- ways to be wired


def hidden(**more):
    """Two layers, and whatever else is needed."""
    torch.manual_seed(0)
    return {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3), **more}


def test_every_output_keeps_its_place():
    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h), self.c(h)

    spec = discover(module_of(forward, **hidden(c=nn.Linear(5, 2))), torch.zeros(2, 4))
    assert lines(spec) == ["a 5: a.weight[0] a.bias[0] b.weight[1] c.weight[1]"]
    assert spec.axes["b.weight"][0][0].reason == spec.axes["c.weight"][0][0].reason == "outputs"


def test_units_that_are_put_out_beside_the_logits_keep_their_place():
    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h), h

    spec = discover(module_of(forward, **hidden()), torch.zeros(2, 4))
    assert spec.groups == {}
    assert spec.axes["b.weight"][1][0].reason == "outputs"


def test_rows_of_an_embedding_keep_their_place_and_its_columns_are_units():
    spec = discover(
        nn.Sequential(nn.Embedding(9, 4), nn.GELU(), nn.Linear(4, 3)), torch.zeros(2, 5).long()
    )
    assert lines(spec) == ["0 4: 0.weight[1] 2.weight[1]"]
    assert spec.axes["0.weight"][0][0].reason == "entries are looked up by number"


def test_a_matrix_that_reads_and_writes_words_is_one():
    embed, back = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    back.weight = embed.weight
    spec = discover(nn.Sequential(embed, nn.GELU(), back), torch.zeros(2, 5).long())
    assert list(spec.groups.values()) == [4]
    assert spec.axes["0.weight"] == spec.axes["2.weight"]


def test_tied_tensors_follow_the_one_that_is_read():
    alias = nn.Linear(4, 5)
    model = module_of(lambda self, x: self.b(torch.relu(self.a(x))), **hidden(alias=alias))
    model.alias.weight = model.a.weight
    spec = discover(model, torch.zeros(2, 4))
    assert spec.axes["alias.weight"] == spec.axes["a.weight"]
    assert list(spec.groups.values()) == [5]


class Pair(nn.Module):
    """Two inputs, of different widths."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x, y):
        return self.out(torch.relu(self.left(x) + self.right(y)))


@pytest.mark.parametrize(
    "example",
    [(torch.zeros(2, 4), torch.zeros(2, 6)), {"y": torch.zeros(2, 6), "x": torch.zeros(2, 4)}],
    ids=["in order", "by name"],
)
def test_axes_of_every_input_keep_their_place(example):
    spec = discover(Pair(), example)
    assert lines(spec) == [
        "left 5: left.weight[0] left.bias[0] right.weight[0] right.bias[0] out.weight[1]"
    ]
    reasons = [spec.axes[key][1][0].reason for key in ("left.weight", "right.weight")]
    assert reasons == ["inputs", "inputs"]


@pytest.mark.parametrize(
    ("model", "shape", "groups"),
    [
        pytest.param(
            nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
            (4, 5, 5),
            [f"{group} 3: 0.weight[0] 0.bias[0] 2.weight[1]" for group in ("0", "0#2")],
            id="blocks of inputs keep their place, what each makes moves on its own",
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.GELU(), nn.Conv2d(4, 2, 1)),
            (2, 5, 5),
            ["0 4: 0.weight[0] 0.bias[0] 2.weight[1]"],
            id="padding by name",
        ),
        pytest.param(
            nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)),
            (3, 4),
            ["1 5: 1.weight[0] 1.bias[0] 3.weight[1]"],
            id="rows and positions flattened",
        ),
        pytest.param(
            nn.Sequential(nn.Linear(4, 5), nn.ConstantPad1d((1, 2), 0.0), nn.Linear(8, 2)),
            (4,),
            ["0 5: 0.weight[0] 0.bias[0] 2.weight[1]", "2 2: 2.weight[1]"],
            id="units between zeros, where columns that read two zeros are as good",
        ),
        pytest.param(
            nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)),
            (4,),
            ["0 5: 0.weight[0] 0.bias[0] 2.weight[1]"],
            id="one slope for all units",
        ),
    ],
)
def test_what_was_once_refused_is_followed(model, shape, groups):
    assert lines(discover(model, torch.zeros(2, *shape))) == groups


def test_units_that_are_pooled_over_are_not_free():
    model = nn.Sequential(nn.Linear(4, 6), nn.MaxPool1d(2), nn.ReLU(), nn.Linear(3, 2))
    spec = discover(model, torch.zeros(2, 5, 4))
    assert spec.groups == {}
    assert spec.fixed["positions"] > 0


def packed_attention(split):
    """Attention of two heads with five units each, with q, k and v from one layer."""

    def forward(self, x):
        q, k, v = split(self.packed(F.gelu(self.enter(x))))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.leave(F.gelu(self.merge(mixed.transpose(1, 2).flatten(2))))

    parts = {"enter": nn.Linear(5, 7), "packed": nn.Linear(7, 30)}
    return module_of(forward, **parts, merge=nn.Linear(10, 8), leave=nn.Linear(8, 3))


PACKED = [
    "enter 7: enter.weight[0] enter.bias[0] packed.weight[1]",
    "packed 2: packed.weight[0] packed.bias[0] merge.weight[1]",
    "packed#2 5['packed']: packed.weight[0] packed.bias[0]",
    "packed#3 5['packed']: packed.weight[0] packed.bias[0] merge.weight[1]",
    "merge 8: merge.weight[0] merge.bias[0] leave.weight[1]",
]


@pytest.mark.parametrize(
    "split",
    [
        pytest.param(
            lambda x: [p.unflatten(-1, (2, 5)).transpose(1, 2) for p in x.chunk(3, -1)],
            id="chunk, as in GPT-2",
        ),
        pytest.param(
            lambda x: x.unflatten(-1, (3, 10)).unflatten(-1, (2, 5)).permute(2, 0, 3, 1, 4),
            id="unflatten twice",
        ),
        pytest.param(
            lambda x: x.reshape(len(x), -1, 3, 2, 5).permute(2, 0, 3, 1, 4).unbind(0),
            id="reshape and unbind, as in timm",
        ),
    ],
)
def test_queries_and_values_of_a_packed_layer_have_units_of_their_own(split):
    assert lines(discover(packed_attention(split), torch.zeros(2, 4, 5))) == PACKED


def test_units_may_be_positions_of_a_layer_with_a_bias():
    def forward(self, x):  # [b, 2, 4] -> channels by units
        return self.leave(torch.relu(self.inner(self.conv(x))).flatten(1))

    parts = {"conv": nn.Conv1d(2, 3, 1), "inner": nn.Linear(4, 5), "leave": nn.Linear(15, 2)}
    spec = discover(module_of(forward, **parts), torch.zeros(2, 2, 4))
    assert spec.groups == {"conv": 3, "inner": 5}


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


# ---------------------------------------------------------------------------- what is not followed


def spectrum():
    """Units whose order is read by an operator that has no rule."""
    return module_of(
        lambda self, x: self.b(torch.fft.fft(torch.relu(self.a(x))).abs() + self.c(x)),
        **hidden(c=nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5))),
    )


def test_an_operator_without_a_rule_is_refused_with_what_it_reads_and_touches():
    with pytest.raises(StructureError) as caught:
        discover(spectrum(), torch.zeros(2, 4))
    message = str(caught.value)
    assert message.startswith("Operator aten.fft_fft.default (fft_fft) cannot be followed: ")
    assert "it has no rule" in message
    assert "It reads ['relu'] and touches units of ['a.weight (5, 4)', 'a.bias (5,)']" in message
    assert "Pass partial=True" in message


def test_an_operator_without_a_rule_pins_what_it_touches_where_that_is_allowed():
    spec = discover(spectrum(), torch.zeros(2, 4), partial=True)
    assert lines(spec) == ["c.0 6: c.0.weight[0] c.0.bias[0] c.2.weight[1]"]
    (pinned,) = spec.pinned
    assert pinned.startswith(
        "units of a.weight (5, 4), a.bias (5,) at aten.fft_fft.default (fft_fft): "
    )
    assert f"pinned: {pinned}" in str(spec)
    assert spec.axes["a.weight"][0][0].reason == "aten.fft_fft.default cannot be followed"
    # c.2 makes units that are added to the spectrum, whose entries are frequencies
    assert spec.hidden[1] == 6
    assert spec.hidden[0] >= 11
    assert 0 < spec.free_share < 1


def test_an_operator_without_a_rule_that_reads_no_units_is_no_obstacle():
    model = module_of(
        lambda self, x: self.b(torch.relu(self.a(torch.fft.fft(x).abs()))), **hidden()
    )
    assert discover(model, torch.zeros(2, 4)).groups == {"a": 5}


def test_partial_changes_nothing_where_all_is_followed(networks):
    program = networks["attention"].program
    whole, part = (discover_program(program, partial=partial) for partial in (False, True))
    assert part == whole


def test_a_rule_that_is_wrong_about_sizes_is_not_believed(anew, monkeypatch):
    monkeypatch.setitem(RULES, "relu.default", lambda call: call.tensor()[:1])
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(StructureError, match=r"finds axes of \(2,\), the network has \(2, 5\)"):
        discover(model, torch.zeros(2, 4))
    spec = discover(model, torch.zeros(2, 4), partial=True)
    assert spec.groups == {}
    assert spec.free_share == 0


def untied(call):
    """A rule for sums that forgets to tie what is added."""
    return call.tensors()[0]


def residual():
    return module_of(
        lambda self, x: self.b(F.gelu(F.gelu(self.a(x)) + F.gelu(self.c(x)))),
        **hidden(c=nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5))),
    )


def test_a_wrong_rule_is_caught_by_the_proof(anew, monkeypatch):
    monkeypatch.setitem(RULES, "add.Tensor", untied)
    with pytest.raises(StructureError, match=r"The permutation spec is wrong: permuting a changes"):
        discover(residual(), torch.zeros(2, 4))


def test_groups_that_fail_the_proof_are_pinned_where_that_is_allowed(anew, monkeypatch):
    monkeypatch.setitem(RULES, "add.Tensor", untied)
    spec = discover(residual(), torch.zeros(2, 4), partial=True)
    assert lines(spec) == ["c.0 6: c.0.weight[0] c.0.bias[0] c.2.weight[1]"]
    assert spec.pinned == ("a (5 units): it failed the proof", "c.2 (5 units): it failed the proof")
    assert spec.axes["a.weight"][0][0].reason == "it failed the proof"
    assert spec.hidden == (16, 6)
    assert spec.free_share == 6 / 16


def test_a_program_is_proved_once(anew, monkeypatch):
    program = trace(residual(), torch.zeros(2, 4))
    spec = discover_program(program)
    monkeypatch.setitem(RULES, "add.Tensor", untied)
    assert discover_program(trace(residual(), torch.ones(5, 4))) is spec
    discovery._SPECS.clear()
    with pytest.raises(StructureError, match="permutation spec is wrong"):
        discover_program(program)


def test_tensors_of_a_spec_are_in_the_order_of_its_own_network(anew):
    class Net(nn.Module):
        def __init__(self, names):
            super().__init__()
            shapes = {"enter": (6, 4), "slope": (6,), "leave": (3, 6)}
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.ones(shapes[name])))

        def forward(self, x):
            return F.linear(F.prelu(F.linear(x, self.enter), self.slope), self.leave)

    orders = [("enter", "slope", "leave"), ("leave", "enter", "slope")]
    programs = [trace(Net(names), torch.zeros(2, 4)) for names in orders]
    assert programs[0] == programs[1]
    assert [tuple(discover_program(program).axes) for program in programs] == orders


def test_what_is_pinned_is_not_remembered_for_those_who_refuse_it(anew):
    assert discover(spectrum(), torch.zeros(2, 4), partial=True).pinned
    with pytest.raises(StructureError, match="cannot be followed"):
        discover(spectrum(), torch.zeros(2, 4))


# ---------------------------------------------------------------------------- any chain of layers


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


class Extended(nn.Module):
    """Reads a tensor without any entries."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.empty = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x):
        return self.head(torch.relu(self.hidden(torch.cat([x, self.empty])[: len(x)])))


def test_a_tensor_without_entries_is_in_nobodys_way():
    spec = discover(Extended(), torch.randn(3, 4))
    assert list(spec.groups.values()) == [8]
