from dataclasses import replace

import pytest
import torch
from torch import nn

from metamerge.corrections.refit import unit_rows
from metamerge.corrections.repair import repair
from metamerge.structure import Execution, Layout, discover_program, run, trace


class ResidualToInputs(nn.Module):
    """Rows of the second layer are tied to the inputs, which stay in place."""

    def __init__(self):
        super().__init__()
        self.enter, self.back = nn.Linear(6, 8), nn.Linear(8, 6)
        self.leave = nn.Linear(6, 3)

    def forward(self, x):
        return self.leave(x + self.back(torch.relu(self.enter(x))))


MODELS = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "residual to inputs": ResidualToInputs,
    "layer norm": lambda: nn.Sequential(
        nn.Linear(6, 16),
        nn.LayerNorm(16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ),
}


@pytest.fixture(scope="module")
def models(residual):
    return {**MODELS, "residual": residual}


def make_inputs(name, count=200):
    images = name in {"cnn", "depthwise", "batch norm"}
    shape = (count, 2, 9, 9) if images else (count, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make_members(model, families=2, count=3):
    """Random members, ``[f, m, ...]``; running variances are positive."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            made[key] = tensor.expand(families, count, *tensor.shape).clone()
            continue
        noise = torch.randn(families, count, *tensor.shape, generator=generator)
        noise = noise / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else noise
        made[key] = noise.abs() + 0.5 if key.endswith("running_var") else noise
    return made


def averaged(members):
    return {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in members.items()}


def layout_of(model, inputs):
    program = trace(model, inputs[:2])
    return Layout(program, discover_program(program))


def moments(weights, layout, inputs):
    """Mean and standard deviation of every hidden layer's units, ``[n, o]``, in float64."""
    exact = {k: t.double() if t.is_floating_point() else t for k, t in weights.items()}
    execution = Execution(layout.program, exact, [inputs.double()], stacked=True)
    found = {}
    for node in layout.program.nodes:
        lane = execution.step(node)
        layer = layout.by_node.get(node.name)
        if layer is not None and layer != layout.layers[-1]:
            rows = unit_rows(lane.value, layer)
            found[layer.weight] = rows.mean(1), rows.std(1, correction=0)
    return found


def wanted_moments(members, layout, inputs):
    families, count = next(iter(members.values())).shape[:2]
    each = moments({k: t.flatten(0, 1) for k, t in members.items()}, layout, inputs)
    return {
        key: tuple(m.unflatten(0, (families, count)).mean(1) for m in pair)
        for key, pair in each.items()
    }


def largest_miss(found, wanted):
    return max(
        float((a - b).abs().max())
        for key in wanted
        for a, b in zip(found[key], wanted[key], strict=True)
    )


@pytest.mark.parametrize("name", [*MODELS, "residual"])
def test_statistics_of_every_hidden_unit_are_restored(models, name):
    model, inputs = models[name](), make_inputs(name)
    layout, members = layout_of(model, inputs), make_members(model)
    fused, wanted = averaged(members), wanted_moments(members, layout, inputs)
    assert len(wanted) == len(layout.layers) - 1
    assert largest_miss(moments(fused, layout, inputs), wanted) > 0.1
    repaired = repair(fused, members, layout, inputs)
    assert largest_miss(moments(repaired, layout, inputs), wanted) < 1e-4
    assert list(repaired) == list(fused)
    assert run(layout.program, repaired, [inputs], stacked=True).isfinite().all()


def test_two_units_by_hand():
    # Inputs -1 and 1. Members 2x + 1 and -4x + 3: means 1 and 3, spreads 2 and 4. The fused unit
    # -x + 2 has mean 2 and spread 1; it is to have mean 2 and spread 3: -3x + 2.
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 2))
    inputs = torch.tensor([[-1.0], [1.0]])
    layout = layout_of(model, inputs)
    last = {"2.weight": torch.ones(1, 2, 2, 1), "2.bias": torch.ones(1, 2, 2)}
    members = {
        "0.weight": torch.tensor([2.0, -4.0]).reshape(1, 2, 1, 1),
        "0.bias": torch.tensor([1.0, 3.0]).reshape(1, 2, 1),
        **last,
    }
    repaired = repair(averaged(members), members, layout, inputs)
    assert repaired["0.weight"].item() == pytest.approx(-3)
    assert repaired["0.bias"].item() == pytest.approx(2)
    assert repaired["2.weight"].tolist() == [[[1.0], [1.0]]]


def test_agrees_with_a_loop_over_modules_in_float64():
    inputs = make_inputs("mlp").double()
    model = MODELS["mlp"]().double()
    layout, members = layout_of(MODELS["mlp"](), inputs.float()), make_members(model, families=1)
    fused = averaged(members)

    def before_activation(weights, depth):
        model.load_state_dict({k: t.double() for k, t in weights.items()})
        return model[: depth + 1](inputs)

    expected = {key: tensor[0].double() for key, tensor in fused.items()}
    for depth in (0, 2):
        outputs = [
            before_activation({k: t[0, m] for k, t in members.items()}, depth) for m in range(3)
        ]
        mean = sum(y.mean(0) for y in outputs) / 3
        spread = sum(y.std(0, correction=0) for y in outputs) / 3
        own = before_activation(expected, depth)
        factor = spread / own.std(0, correction=0)
        expected[f"{depth}.weight"] = factor[:, None] * expected[f"{depth}.weight"]
        expected[f"{depth}.bias"] = factor * (expected[f"{depth}.bias"] - own.mean(0)) + mean
    repaired = repair(fused, members, layout, inputs.float())
    for key, tensor in expected.items():
        assert torch.allclose(repaired[key][0].double(), tensor.detach(), atol=1e-5), key


@pytest.mark.parametrize("name", [*MODELS, "residual"])
def test_identical_members_stay_as_they_are(models, name):
    model, inputs = models[name](), make_inputs(name)
    members = make_members(model, count=1)
    members = {key: tensor.repeat_interleave(3, 1) for key, tensor in members.items()}
    repaired = repair(averaged(members), members, layout_of(model, inputs), inputs)
    for key, tensor in averaged(members).items():
        assert torch.allclose(repaired[key].double(), tensor.double(), atol=1e-5), key


def test_a_family_does_not_depend_on_those_beside_it():
    model, inputs = MODELS["cnn"](), make_inputs("cnn")
    layout, members = layout_of(model, inputs), make_members(model)
    fused = averaged(members)
    together = repair(fused, members, layout, inputs)
    for f in range(2):
        alone = repair(
            {k: t[f : f + 1] for k, t in fused.items()},
            {k: t[f : f + 1] for k, t in members.items()},
            layout,
            inputs,
        )
        assert all(torch.allclose(together[k][f], alone[k][0], atol=1e-5) for k in alone)


def test_inputs_stay_as_they_are_and_no_memory_is_shared():
    model, inputs = MODELS["batch norm"](), make_inputs("batch norm")
    members = make_members(model)
    fused = averaged(members)
    before = [{k: t.clone() for k, t in w.items()} for w in (fused, members, {"x": inputs})]
    repaired = repair(fused, members, layout_of(model, inputs), inputs)
    for now, then in zip((fused, members, {"x": inputs}), before, strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)
    addresses = {t.data_ptr() for w in (fused, members) for t in w.values()}
    assert addresses.isdisjoint(t.data_ptr() for t in repaired.values())


def test_without_a_bias_units_are_scaled_only():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    inputs = make_inputs("mlp")
    layout, members = layout_of(model, inputs), make_members(model)
    fused = averaged(members)
    repaired = repair(fused, members, layout, inputs)
    ratio = repaired["0.weight"] / fused["0.weight"]  # one number per unit
    assert float((ratio - ratio[..., :1]).abs().max()) < 1e-5
    found = moments(repaired, layout, inputs)["0.weight"][1]
    wanted = wanted_moments(members, layout, inputs)["0.weight"][1]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_without_a_bias_the_running_mean_takes_the_shift():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    inputs = make_inputs("cnn")
    layout, members = layout_of(model, inputs), make_members(model)
    fused = averaged(members)
    repaired = repair(fused, members, layout, inputs)
    mean, spread = moments(repaired, layout, inputs)["2.weight"]
    wanted_mean, wanted_spread = wanted_moments(members, layout, inputs)["2.weight"]
    assert torch.allclose(spread, wanted_spread, atol=1e-4)
    assert not torch.allclose(mean, wanted_mean, atol=1e-2)
    centred = mean - repaired["3.running_mean"]
    assert torch.allclose(centred, wanted_mean - fused["3.running_mean"], atol=1e-4)


def test_a_unit_that_is_constant_in_the_fused_network_is_not_blown_up():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    inputs = torch.tensor([[-1.0], [1.0]])
    members = {
        "0.weight": torch.tensor([2.0, -2.0]).reshape(1, 2, 1, 1),  # cancel to 0
        "0.bias": torch.tensor([1.0, 3.0]).reshape(1, 2, 1),
        "2.weight": torch.ones(1, 2, 2, 1),
        "2.bias": torch.ones(1, 2, 2),
    }
    repaired = repair(averaged(members), members, layout_of(model, inputs), inputs)
    assert repaired["0.weight"].item() == 0
    assert repaired["0.bias"].item() == pytest.approx(2)


def test_names_that_share_a_tensor_still_agree():
    model, inputs = MODELS["mlp"](), make_inputs("mlp")
    program = replace(trace(model, inputs), tied={"alias": "0.weight"})
    layout = Layout(program, discover_program(program))
    members = make_members(model)
    members["alias"] = members["0.weight"].clone()
    fused = averaged(members)
    repaired = repair(fused, members, layout, inputs)
    assert torch.equal(repaired["alias"], repaired["0.weight"])
    assert not torch.allclose(repaired["alias"], fused["alias"], atol=1e-3)
