import pytest
import torch
from torch import nn

from metamerge.corrections.repair import repair
from metamerge.corrections.rescale import rescale
from metamerge.structure import Layout, discover_program, trace


def layout_of(model, inputs):
    program = trace(model, inputs[:2])
    return Layout(program, discover_program(program))


def make_members(model, count=3):
    """Random members of one family, ``[1, m, ...]``; running variances are positive."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for key, tensor in model.state_dict().items():
        noise = torch.randn(1, count, *tensor.shape, generator=generator)
        noise = noise.abs() + 0.5 if key.endswith("running_var") else noise
        made[key] = noise if tensor.is_floating_point() else tensor.expand(1, count).clone()
    return made


def averaged(members):
    return {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in members.items()}


def mlp():
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def test_one_unit_by_hand():
    # Inputs -1 and 1 are 0 and 1 behind the ReLU. There, members 2h + 1 and 6h + 3 have spreads 1
    # and 3, the fused 4h + 2 has 2: nothing to do. Had it been -h + 2, with mean 1.5 and spread
    # .5, it would become -4h + 3.5: the spread is 2, the mean stays.
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    inputs = torch.tensor([[-1.0], [1.0]])
    members = {
        "0.weight": torch.ones(1, 2, 1, 1),
        "0.bias": torch.zeros(1, 2, 1),
        "2.weight": torch.tensor([2.0, 6.0]).reshape(1, 2, 1, 1),
        "2.bias": torch.tensor([1.0, 3.0]).reshape(1, 2, 1),
        "4.weight": torch.ones(1, 2, 2, 1),
        "4.bias": torch.ones(1, 2, 2),
    }
    layout, fused = layout_of(model, inputs), averaged(members)
    for key, tensor in rescale(fused, members, layout, inputs).items():
        assert torch.allclose(tensor, fused[key], atol=1e-6)
    fused = {**fused, "2.weight": -torch.ones(1, 1, 1), "2.bias": torch.full((1, 1), 2.0)}
    scaled = rescale(fused, members, layout, inputs)
    assert scaled["2.weight"].item() == pytest.approx(-4)
    assert scaled["2.bias"].item() == pytest.approx(3.5)
    assert torch.equal(scaled["4.weight"], fused["4.weight"])


def test_agrees_with_a_loop_over_modules_in_float64():
    inputs = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).double()
    model, layout = mlp().double(), layout_of(mlp(), inputs.float())
    members = make_members(model)
    members = {k: t.double() for k, t in members.items()}
    expected = {key: tensor[0].clone() for key, tensor in averaged(members).items()}

    def outputs(weights, depth):
        model.load_state_dict(weights)
        return model[: depth + 1](inputs).detach()

    for depth in (0, 2):
        each = [outputs({k: t[0, m] for k, t in members.items()}, depth) for m in range(3)]
        spread = sum(y.std(0, correction=0) for y in each) / 3
        own = outputs(expected, depth)
        factor = spread / own.std(0, correction=0)
        expected[f"{depth}.weight"] *= factor[:, None]
        expected[f"{depth}.bias"] = factor * (expected[f"{depth}.bias"] - own.mean(0)) + own.mean(0)
    single = {k: t.float() for k, t in members.items()}
    scaled = rescale(averaged(single), single, layout, inputs.float())
    for key, tensor in expected.items():
        assert torch.allclose(scaled[key][0].double(), tensor, atol=1e-5, rtol=1e-5), key


def test_means_are_not_repaired():
    inputs = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    layout, members = layout_of(mlp(), inputs), make_members(mlp())
    fused = averaged(members)
    scaled, repaired = (f(fused, members, layout, inputs) for f in (rescale, repair))
    # In the first layer, averaging moves no mean, so the two are one; in the second it does.
    assert torch.allclose(scaled["0.bias"], repaired["0.bias"], atol=1e-5)
    assert torch.allclose(scaled["2.weight"], repaired["2.weight"], atol=1e-5)
    assert not torch.allclose(scaled["2.bias"], repaired["2.bias"], atol=0.1)


def test_a_batch_normalisation_takes_the_shift_of_units_without_bias():
    model = nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    )
    inputs = 1 + torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    layout, members = layout_of(model, inputs), make_members(model)
    fused = averaged(members)
    scaled = rescale(fused, members, layout, inputs)
    before, after = (inputs @ w["0.weight"][0].T - w["1.running_mean"][0] for w in (fused, scaled))
    assert torch.allclose(before.mean(0), after.mean(0), atol=1e-4)
    spreads = (inputs @ members["0.weight"][0].mT).std(1, correction=0)
    assert torch.allclose(after.std(0, correction=0), spreads.mean(0), atol=1e-4)


def test_identical_members_stay_as_they_are():
    inputs = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    members = {k: t.repeat_interleave(3, 1) for k, t in make_members(mlp(), 1).items()}
    fused = averaged(members)
    for key, tensor in rescale(fused, members, layout_of(mlp(), inputs), inputs).items():
        assert torch.allclose(tensor, fused[key], atol=1e-5)
