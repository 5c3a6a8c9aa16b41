from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metamerge.errors import StructureError
from metamerge.structure import Scaling, discover, discover_program, prove, trace

# A power of a factor in [1/4, 4] and sums of some 100 terms in another order.
SAME = 1e-9


class Net(nn.Module):
    """A forward function with its parameters and modules."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, tuple):
                part = nn.Parameter(torch.randn(part) / max(1, part[-1]) ** 0.5)
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def mlp(activation):
    """``v f(w x + b)``."""
    return lambda: Net(
        lambda p, x: F.linear(activation(F.linear(x, p.w, p.b)), p.v), w=(6, 3), b=(6,), v=(2, 6)
    )


def maps(change, **parts):
    """Two convolutions and what is between them."""
    return lambda: Net(
        lambda p, x: F.conv1d(change(p, F.conv1d(x, p.w)), p.v),
        w=(6, 3, 1),
        v=(2, 6, 1),
        **{name: make() for name, make in parts.items()},
    )


def gated(p, x):
    return F.linear(F.silu(F.linear(x, p.a)) * F.linear(x, p.b), p.v)


def residual(p, x):
    x = F.relu(F.linear(x, p.w))
    x = F.relu(x + F.linear(F.relu(F.linear(x, p.s)), p.t))
    return F.linear(x, p.v)


def attend(p, x):
    q, k, v = (F.linear(x, w) for w in (p.q, p.k, p.u))
    return F.linear((q @ k.mT).softmax(-1) @ v, p.v)


def fused_attend(p, x):
    q, k, v = (F.linear(x, w)[:, None] for w in (p.q, p.k, p.u))
    return F.linear(F.scaled_dot_product_attention(q, k, v)[:, 0], p.v)


FLAT, TOKENS, LINE = (4, 3), (2, 4, 3), (2, 3, 8)
HIDDEN = {"w": {0: 1}, "b": {0: 1}, "v": {1: -1}}  # rows and bias up, columns down
NO_BIAS = {"w": {0: 1}, "v": {1: -1}}
SIGNS = {"w": {0: 1}, "b": {0: 1}, "v": {1: 1}}  # -1 and 1 are their own inverse

# name -> how to build it, shape of the inputs, and what must be found for each group by hand: the
# group is named by a tensor and an axis that it touches
TABLE = {
    "relu": (mlp(F.relu), FLAT, [("positive", HIDDEN)]),
    "leaky relu": (mlp(lambda h: F.leaky_relu(h, 0.1)), FLAT, [("positive", HIDDEN)]),
    "no activation": (mlp(lambda h: h), FLAT, [("real", HIDDEN)]),
    "minus": (mlp(lambda h: -h), FLAT, [("real", HIDDEN)]),
    "tanh": (mlp(torch.tanh), FLAT, [("sign", SIGNS)]),
    "sin": (mlp(torch.sin), FLAT, [("sign", SIGNS)]),
    "gelu": (mlp(F.gelu), FLAT, []),
    "sigmoid": (mlp(torch.sigmoid), FLAT, []),
    "exp": (mlp(torch.exp), FLAT, []),
    "relu of at most six": (mlp(F.relu6), FLAT, []),
    "softmax": (mlp(lambda h: h.softmax(-1)), FLAT, []),
    "a constant is added": (mlp(lambda h: F.relu(h + 1)), FLAT, []),
    "times a number": (mlp(lambda h: F.relu(h * 3)), FLAT, [("positive", HIDDEN)]),
    "relu then tanh": (mlp(lambda h: torch.tanh(F.relu(h))), FLAT, []),
    # an even function forgets the sign of what it reads; what it makes has none to pass on
    "cos": (mlp(torch.cos), FLAT, [("sign", {"w": {0: 1}, "b": {0: 1}})]),
    "the size of numbers": (
        mlp(torch.abs),
        FLAT,
        [("positive", HIDDEN), ("sign", {"w": {0: 1}, "b": {0: 1}})],
    ),
    "prelu": (
        lambda: Net(
            lambda p, x: F.linear(F.prelu(F.linear(x, p.w), p.s), p.v),
            w=(6, 3),
            s=(6,),
            v=(2, 6),
        ),
        FLAT,
        [("positive", NO_BIAS)],
    ),
    "two relu layers": (
        lambda: Net(
            lambda p, x: F.linear(F.relu(F.linear(F.relu(F.linear(x, p.w)), p.s)), p.v),
            w=(6, 3),
            s=(5, 6),
            v=(2, 5),
        ),
        FLAT,
        [("positive", {"w": {0: 1}, "s": {1: -1}}), ("positive", {"s": {0: 1}, "v": {1: -1}})],
    ),
    # the block's inner units on their own, the stream in all that writes and reads it
    "a residual block": (
        lambda: Net(residual, w=(6, 3), s=(5, 6), t=(6, 5), v=(2, 6)),
        FLAT,
        [
            ("positive", {"w": {0: 1}, "s": {1: -1}, "t": {0: 1}, "v": {1: -1}}),
            ("positive", {"s": {0: 1}, "t": {1: -1}}),
        ],
    ),
    # the gain makes the scale: what is normalised away is free for itself
    "batch normalisation": (
        maps(lambda p, h: F.relu(p.n(h)), n=lambda: nn.BatchNorm1d(6)),
        LINE,
        [("positive", {"n.weight": {0: 1}, "n.bias": {0: 1}, "v": {1: -1}})],
    ),
    "batch normalisation without gain": (
        maps(lambda p, h: F.relu(p.n(h)), n=lambda: nn.BatchNorm1d(6, affine=False)),
        LINE,
        [],
    ),
    "layer normalisation": (
        lambda: Net(
            lambda p, x: F.linear(p.n(F.linear(x, p.w)), p.v),
            w=(6, 3),
            v=(2, 6),
            n=nn.LayerNorm(6),
        ),
        FLAT,
        [("real", {"n.weight": {0: 1}, "n.bias": {0: 1}, "v": {1: -1}})],
    ),
    "layer normalisation without gain": (
        mlp(lambda h: F.layer_norm(h, (6,))),
        FLAT,
        [],
    ),
    "largest in windows": (
        maps(lambda p, h: F.max_pool1d(h, 2)),
        LINE,
        [("positive", NO_BIAS)],
    ),
    "mean in windows": (maps(lambda p, h: F.avg_pool1d(h, 2)), LINE, [("real", NO_BIAS)]),
    "flattened": (
        lambda: Net(
            lambda p, x: F.linear(F.relu(F.conv1d(x, p.w)).flatten(1), p.v),
            w=(6, 3, 1),
            v=(2, 48),
        ),
        LINE,
        [("positive", NO_BIAS)],
    ),
    "a gate": (
        lambda: Net(gated, a=(6, 3), b=(6, 3), v=(2, 6)),
        FLAT,
        [("real", {"b": {0: 1}, "v": {1: -1}})],
    ),
    "a product of two paths": (
        lambda: Net(
            lambda p, x: F.linear(F.linear(x, p.a) * F.linear(x, p.b), p.v),
            a=(6, 3),
            b=(6, 3),
            v=(2, 6),
        ),
        FLAT,
        [("real", {"a": {0: 1}, "v": {1: -1}}), ("real", {"b": {0: 1}, "v": {1: -1}})],
    ),
    "a scale per unit": (
        lambda: Net(lambda p, x: F.linear(F.linear(x, p.w) * p.s, p.v), w=(6, 3), s=(6,), v=(2, 6)),
        FLAT,
        [("real", {"w": {0: 1}, "v": {1: -1}}), ("real", {"s": {0: 1}, "v": {1: -1}})],
    ),
    # queries against keys, values against what reads them; each may have any scale
    "attention by hand": (
        lambda: Net(attend, q=(5, 3), k=(5, 3), u=(6, 3), v=(2, 6)),
        TOKENS,
        [("real", {"q": {0: 1}, "k": {0: -1}}), ("real", {"u": {0: 1}, "v": {1: -1}})],
    ),
    "attention": (
        lambda: Net(fused_attend, q=(5, 3), k=(5, 3), u=(6, 3), v=(2, 6)),
        TOKENS,
        [("real", {"q": {0: 1}, "k": {0: -1}}), ("real", {"u": {0: 1}, "v": {1: -1}})],
    ),
}


@cache
def program_of(name):
    build, shape, _ = TABLE[name]
    return trace(build(), torch.zeros(shape))


def spec_of(name):
    return discover_program(program_of(name))


def as_found(scalings):
    """Plain; of a scaling and its inverse, which are one, that with the first power above 0."""
    return [oriented(s.kind, {k: dict(own) for k, own in s.powers.items()}) for s in scalings]


def oriented(kind, powers):
    sign = 1 if next(iter(powers[min(powers)].values())) > 0 else -1
    return kind, {k: {axis: p * sign for axis, p in own.items()} for k, own in powers.items()}


def written(scaling):
    kind, powers = scaling
    return kind, sorted((k, *own.items()) for k, own in powers.items())


def span(scalings):
    """Rank of the powers of some scalings, as vectors over every tensor and axis."""
    places = sorted({(key, axis) for _, own in scalings for key in own for axis in own[key]})
    rows = [[float(own.get(key, {}).get(axis, 0)) for key, axis in places] for _, own in scalings]
    return int(torch.linalg.matrix_rank(torch.tensor(rows))) if rows else 0


@pytest.mark.parametrize("name", TABLE)
def test_scalings_are_those_worked_out_by_hand(name):
    found = as_found(spec_of(name).scalings)
    expected = [oriented(*scaling) for scaling in TABLE[name][2]]
    assert sorted(kind for kind, _ in found) == sorted(kind for kind, _ in expected)
    if name not in {"a product of two paths", "a scale per unit"}:  # their basis may be chosen
        assert sorted(found, key=written) == sorted(expected, key=written)
    assert span(found) == span(expected) == span([*found, *expected]) == len(expected)


def factors_of(kind, size, generator):
    """Numbers from 1/2 to 2, of either sign, or signs alone."""
    size_ = torch.rand(size, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    sign = torch.randint(0, 2, size, generator=generator).double() * 2 - 1
    sign.view(-1)[0] = -1.0  # at least one unit changes its sign
    return {"positive": size_, "sign": sign, "real": size_ * sign}[kind]


@pytest.mark.parametrize("name", TABLE)
def test_the_module_itself_computes_the_same_on_another_scale(name):
    build, shape, _ = TABLE[name]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
    spec = spec_of(name)
    weights = {
        key: t.detach() + 0.3 * torch.rand(t.shape, generator=generator, dtype=t.dtype)
        if t.is_floating_point()
        else t
        for key, t in model.state_dict().items()
    }
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = functional_call(model, weights, (x,))
        for scaling in spec.scalings:
            size = (*spec.blocks(scaling.group), spec.groups[scaling.group])
            scaled = spec.rescale(weights, scaling, factors_of(scaling.kind, size, generator))
            changed = {key for key in weights if not torch.equal(scaled[key], weights[key])}
            assert changed == set(scaling.powers)
            found = functional_call(model, scaled, (x,))
            assert float((found - expected).abs().max()) < SAME * float(expected.abs().max())


def test_every_network_computes_the_same_on_another_scale(network):
    spec, weights, x = network.spec, network.weights(), network.inputs(3)
    generator = torch.Generator().manual_seed(0)
    expected = network.outputs(weights, x)
    for scaling in spec.scalings:
        size = (*spec.blocks(scaling.group), spec.groups[scaling.group])
        scaled = spec.rescale(weights, scaling, factors_of(scaling.kind, size, generator))
        found = network.outputs(scaled, x)
        assert float((found - expected).abs().max()) < SAME * float(1 + expected.abs().max())


def claimed(program, kind, powers):
    """The network's spec with one scaling that somebody made up."""
    spec = discover_program(program)
    group = next(iter(spec.groups))
    return replace(spec, scalings=(Scaling(group, kind, powers),))


@pytest.mark.parametrize(
    ("name", "kind", "powers"),
    [
        ("relu", "positive", {"w": {0: 1}, "b": {0: 1}, "v": {1: 1}}),
        ("relu", "positive", {"w": {0: 1}, "v": {1: -1}}),
        ("relu", "positive", {"w": {0: 1}, "b": {0: 1}, "v": {1: -2}}),
        ("relu", "real", HIDDEN),
        ("relu", "sign", SIGNS),
        ("tanh", "positive", HIDDEN),
        ("tanh", "real", HIDDEN),
        ("tanh", "sign", {"w": {0: 1}, "v": {1: 1}}),
        ("gelu", "positive", HIDDEN),
        ("gelu", "sign", SIGNS),
        ("cos", "sign", SIGNS),
        ("a constant is added", "positive", HIDDEN),
    ],
)
def test_a_scaling_that_changes_the_network_is_refused(name, kind, powers):
    program = program_of(name)
    with pytest.raises(StructureError, match=f"{kind} scaling of p?[a-z]* changes the output by"):
        prove(program, claimed(program, kind, powers))


@pytest.mark.parametrize("kind", ["positive", "sign", "real"])
def test_a_scaling_that_holds_is_accepted_whoever_made_it(kind):
    program = program_of("no activation")
    prove(program, claimed(program, kind, HIDDEN))
    prove(program, claimed(program, kind, {"w": {0: 2}, "b": {0: 2}, "v": {1: -2}}))


def test_scalings_of_tied_tensors_are_those_of_their_owner():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)
            self.alias = nn.Linear(4, 5)
            self.alias.weight = self.enter.weight

        def forward(self, x):
            return self.leave(F.relu(self.enter(x)))

    (scaling,) = discover(Tied(), torch.zeros(2, 4)).scalings
    assert scaling.powers["alias.weight"] == scaling.powers["enter.weight"] == {0: 1}


def test_units_of_heads_have_a_scale_each():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(3, 8, bias=False) for _ in range(3))
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
            found = F.scaled_dot_product_attention(q, k, v)
            return self.out(found.transpose(1, 2).flatten(2))

    spec = discover(Heads(), torch.zeros(2, 3, 3))
    found = as_found(spec.scalings)
    keys = ("real", {"q.weight": {0: 1}, "k.weight": {0: -1}})
    values = ("real", {"v.weight": {0: 1}, "out.weight": {1: -1}})
    # the units of each head on their own, and each head as a whole
    expected = [oriented(*scaling) for scaling in (keys, keys, values, values)]
    assert sorted(found, key=written) == sorted(expected, key=written)
    assert sorted(spec.blocks(s.group) for s in spec.scalings) == [(), (), (2,), (2,)]
