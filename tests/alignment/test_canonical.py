"""Canonical: what a change of scale or sign has hidden is undone, and no function changes."""

from functools import partial

import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.alignment import align_members, canonical
from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.structure import discover_program, run, trace
from zoo.tasks import load_task
from zoo.training import init_networks, train_networks


def mlp(activation, inputs=6, width=9):
    return nn.Sequential(
        nn.Linear(inputs, width), activation(), nn.Linear(width, 7), activation(), nn.Linear(7, 3)
    )


MODELS = {
    "relu": (lambda: mlp(nn.ReLU), (6,)),
    "tanh": (lambda: mlp(nn.Tanh), (6,)),
    "linear": (lambda: mlp(nn.Identity), (6,)),
}


class Setting:
    def __init__(self, build, layout, shape):
        self.build, self.layout, self.shape = build, layout, shape
        self.spec = layout.spec

    def draw(self, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for key, tensor in self.build().state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            noise = noise.abs() + 0.5 if key.endswith("running_var") else noise
            drawn[key] = noise.to(dtype) if tensor.is_floating_point() else tensor
        return drawn

    def factors(self, scaling, generator):
        """Random ones of the scaling's kind."""
        shape = (*self.spec.blocks(scaling.group), self.spec.groups[scaling.group])
        signs = torch.randint(2, shape, generator=generator).double() * 2 - 1
        sizes = torch.randn(shape, generator=generator, dtype=torch.float64).exp()
        return {"sign": signs, "positive": sizes, "real": signs * sizes}[scaling.kind]

    def hidden(self, weights, seed):
        """The same function, with another scale, sign and place of every unit."""
        generator = torch.Generator().manual_seed(seed)
        for scaling in self.spec.scalings:
            factors = self.factors(scaling, generator)
            weights = self.spec.rescale(weights, scaling, factors)
        return self.spec.permute(weights, self.spec.random(generator))

    def run(self, weights):
        generator = torch.Generator().manual_seed(5)
        dtype = next(iter(weights.values())).dtype
        inputs = torch.randn(20, *self.shape, generator=generator, dtype=torch.float64)
        return run(self.layout.program, weights, [inputs.to(dtype)])


@pytest.fixture(scope="module")
def settings(residual_maps, attention, make_layout):
    """Name of a network -> the network in its setting."""
    models = {
        **MODELS,
        "residual": (partial(residual_maps, torch.relu), (2, 4, 4)),
        "attention": (attention, (5, 3)),
    }
    return {
        name: Setting(build, make_layout(build(), torch.zeros(2, *shape)), shape)
        for name, (build, shape) in models.items()
    }


@pytest.fixture(scope="module", params=[*MODELS, "residual", "attention"])
def setting(request, settings):
    return settings[request.param]


@pytest.fixture(scope="module", params=[*MODELS, "residual"])
def plain(request, settings):
    """Those without units nested in blocks."""
    return settings[request.param]


@pytest.fixture(scope="module")
def relu(settings):
    return settings["relu"]


def close(one, other, tolerance):
    return float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


def two_units(activation, rows, reads):
    model = nn.Sequential(nn.Linear(1, 2, bias=False), activation(), nn.Linear(2, 1, bias=False))
    members = [
        {"0.weight": torch.tensor(r).reshape(2, 1), "2.weight": torch.tensor([c])}
        for r, c in zip(rows, reads, strict=True)
    ]
    return members, discover_program(trace(model, torch.zeros(2, 1)))


def test_scales_by_hand():
    # 4 and 1: the factor 1/2 makes both 2; 1 and 9: the factor 3 makes both 3.
    members, spec = two_units(nn.ReLU, [[4.0, 1.0]], [[1.0, 9.0]])
    (found,) = canonical(members, spec)
    assert torch.allclose(found["0.weight"], torch.tensor([[2.0], [3.0]]))
    assert torch.allclose(found["2.weight"], torch.tensor([[2.0, 3.0]]))


def test_signs_by_hand():
    # Unit 0 of the second member is the first one's unit 1, turned around.
    members, spec = two_units(nn.Tanh, [[4.0, 1.0], [-1.0, 4.0]], [[1.0, 2.0], [-2.0, 1.0]])
    one, other = canonical(members, spec)
    assert one["0.weight"].flatten().tolist() == [4.0, 1.0]
    assert other["0.weight"].flatten().tolist() == [1.0, 4.0]
    assert other["2.weight"].tolist() == [[2.0, 1.0]]
    # On its own, a unit's cubes must add up to more than 0: -64 + 1 is turned around, -1 + 8 not.
    members, spec = two_units(nn.Tanh, [[-4.0, -1.0]], [[1.0, 2.0]])
    (own,) = canonical(members, spec, signs="own")
    assert own["0.weight"].flatten().tolist() == [4.0, -1.0]
    assert own["2.weight"].tolist() == [[-1.0, 2.0]]


@pytest.mark.parametrize("signs", ["medoid", "own"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_function_stays_the_same(setting, signs, dtype, error):
    members = [setting.draw(seed, dtype) for seed in range(3)]
    for own, found in zip(members, canonical(members, setting.spec, signs=signs), strict=True):
        assert close(setting.run(found), setting.run(own), error)


def test_incoming_and_outgoing_weights_of_every_unit_have_one_norm(setting):
    (found,) = canonical([setting.draw()], setting.spec)
    for scaling in (scaling for scaling in setting.spec.scalings if scaling.kind != "sign"):
        norms = {1: 0.0, -1: 0.0}
        for key, powers in scaling.powers.items():
            for axis, power in powers.items():
                rows = setting.spec.unit_rows(key, axis, scaling.group, found[key])
                norms[power] = norms[power] + rows.square().sum(-1)
        assert torch.allclose(norms[1], norms[-1], rtol=1e-5)


def test_no_other_scales_give_weights_of_a_smaller_norm(setting):
    (found,) = canonical([setting.draw()], setting.spec)
    scalings = [scaling for scaling in setting.spec.scalings if scaling.kind != "sign"]
    scaled = {key for scaling in scalings for key in scaling.powers}

    def size(weights):
        return sum(float(weights[key].square().sum()) for key in scaled)

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = found
        for scaling in scalings:
            factors = setting.factors(scaling, generator).abs() ** 0.1
            other = setting.spec.rescale(other, scaling, factors)
        assert size(other) >= size(found) * (1 - 1e-9)


@pytest.mark.parametrize("signs", ["medoid", "own"])
def test_what_was_hidden_is_found_again_up_to_the_order_of_units(plain, signs):
    origin = plain.draw()
    members = [origin, *(plain.hidden(origin, seed) for seed in range(3))]
    found = canonical(members, plain.spec, signs=signs)
    for group in plain.spec.groups:
        for key, axis in plain.spec.touching(group):
            own = [plain.spec.unit_rows(key, axis, group, w[key]).square().sum(-1) for w in found]
            assert all(torch.allclose(o.sort().values, own[0].sort().values) for o in own)


@pytest.mark.parametrize("signs", ["medoid", "own"])
def test_with_weight_matching_members_become_one_where_matching_alone_fails(plain, signs):
    origin = plain.draw()
    members = [origin, *(plain.hidden(origin, seed) for seed in range(3))]
    _, told = align_members(members, plain.layout, "weight_matching")
    assert told[-1]["matching_cost"] > 1e-2
    _, told = align_members(
        members, plain.layout, ["canonical", "weight_matching"], options={"signs": signs}
    )
    assert told[-1]["matching_cost"] < 1e-9


def test_merge_takes_the_pair(settings):
    torch.manual_seed(0)
    setting = settings["tanh"]
    origin = setting.draw(dtype=torch.float32)
    members = [origin, setting.hidden(origin, 0)]
    given = {"method": "average", "model": setting.build(), "example_inputs": torch.zeros(2, 6)}
    fused = merge(members, align=["canonical", "weight_matching"], **given)
    assert fused.report["matching_cost"] < 1e-9
    assert 0 < fused.report["alignment"][0]["flipped"] < 1
    assert close(setting.run(fused.weights), setting.run(origin), 1e-4)
    plain = merge(members, align="weight_matching", **given)
    assert not close(setting.run(plain.weights), setting.run(origin), 1e-1)


@pytest.mark.parametrize("signs", ["medoid", "own"])
def test_permuting_the_units_of_a_member_permutes_what_becomes_of_it(plain, signs):
    members = [plain.draw(seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    perms = [plain.spec.random(generator) for _ in members]
    moved = [plain.spec.permute(own, p) for own, p in zip(members, perms, strict=True)]
    found = canonical(members, plain.spec, signs=signs)
    again = canonical(moved, plain.spec, signs=signs)
    for own, other, perm in zip(found, again, perms, strict=True):
        expected = plain.spec.permute(own, perm)
        assert all(close(other[key], expected[key], 1e-9) for key in plain.spec.axes)


@pytest.mark.parametrize("signs", ["medoid", "own"])
def test_the_order_of_members_does_not_matter(setting, signs):
    members = [setting.draw(seed) for seed in range(4)]
    found = canonical(members, setting.spec, signs=signs)
    order = (2, 0, 3, 1)
    again = canonical([members[i] for i in order], setting.spec, signs=signs)
    for place, i in enumerate(order):
        assert all(close(again[place][key], found[i][key], 1e-9) for key in setting.spec.axes)


def test_own_signs_do_not_depend_on_the_other_members(setting):
    members = [setting.draw(seed) for seed in range(3)]
    together = canonical(members, setting.spec, signs="own")
    for own, found in zip(members, together, strict=True):
        (alone,) = canonical([own], setting.spec, signs="own")
        assert all(close(alone[key], found[key], 1e-6) for key in setting.spec.axes)


@pytest.mark.parametrize("signs", ["medoid", "own"])
def test_what_is_canonical_stays_as_it_is(setting, signs):
    members = [setting.draw(seed) for seed in range(2)]
    once = canonical(members, setting.spec, signs=signs)
    twice = canonical(once, setting.spec, signs=signs)
    for one, other in zip(once, twice, strict=True):
        assert all(close(other[key], one[key], 1e-6) for key in setting.spec.axes)


def test_units_without_incoming_or_outgoing_weights_keep_their_scale(relu):
    members = [relu.draw()]
    members[0]["0.weight"][2] = 0
    members[0]["0.bias"][2] = 0
    members[0]["2.weight"][:, 4] = 0
    (found,) = canonical(members, relu.spec)
    # they are not scaled, though the layer behind them still may be
    assert torch.equal(found["0.weight"][[2, 4]], members[0]["0.weight"][[2, 4]])
    assert all(tensor.isfinite().all() for tensor in found.values())
    zeros = {key: torch.zeros_like(tensor) for key, tensor in members[0].items()}
    (found,) = canonical([zeros], relu.spec)
    assert all(torch.equal(tensor, zeros[key]) for key, tensor in found.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_no_memory_is_shared(settings, dtype):
    setting = settings["residual"]
    members = [setting.draw(0, dtype), setting.draw(1, torch.float32)]
    before = [{key: t.clone() for key, t in own.items()} for own in members]
    for own, untouched, found in zip(
        members, before, canonical(members, setting.spec), strict=True
    ):
        assert list(found) == list(own)
        assert all(torch.equal(own[key], untouched[key]) for key in own)
        assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in own.items()}
        assert {t.data_ptr() for t in own.values()}.isdisjoint(t.data_ptr() for t in found.values())


def test_it_tells_what_it_did(settings, relu):
    report = {}
    canonical([relu.draw()], relu.spec, report=report)
    assert report.keys() == {"sweeps"}
    assert 1 < report["sweeps"] < 100
    tanh = settings["tanh"]
    canonical([tanh.draw(0), tanh.draw(1)], tanh.spec, report=report)
    assert report["sweeps"] == 0
    assert 0 < report["flipped"] < 1


@pytest.mark.parametrize("signs", ["cubes", None, True])
def test_unknown_signs_are_refused(relu, signs):
    with pytest.raises(ConfigError, match=f"canonical: signs must be one of .*, got {signs!r}"):
        canonical([relu.draw()], relu.spec, signs=signs)


def test_members_of_different_widths_are_refused():
    nets = [mlp(nn.ReLU, width=9), mlp(nn.ReLU, width=8)]
    align = ["canonical", "optimal_transport"]
    with pytest.raises(IncompatibleWeights, match="Merge models of one width"):
        merge(nets, method="average", align=align, example_inputs=torch.zeros(2, 6))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_trained_pairs_come_closer_than_by_weight_matching_alone(make_layout, activation):
    task, count = load_task("digits"), 6
    inputs = task.inputs.flatten(1)

    def network():
        return mlp(activation, inputs.shape[1], 32).extend([nn.Linear(3, 10)])

    layout = make_layout(network(), inputs[:2])
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(len(inputs), generator=generator)[:500] for _ in range(2 * count)]
    start = init_networks(network, range(2 * count))
    weights = train_networks(layout.program, start, inputs, task.targets, rows, epochs=10).weights
    for pair in range(count):
        members = [{key: t[2 * pair + m] for key, t in weights.items()} for m in range(2)]
        alone, both = (
            align_members(members, layout, align)[1][-1]["matching_cost"]
            for align in ("weight_matching", ["canonical", "weight_matching"])
        )
        assert both < alone
