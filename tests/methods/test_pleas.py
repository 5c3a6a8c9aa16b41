import math
from functools import cache

import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.errors import ConfigError
from metamerge.methods import pleas
from metamerge.structure import Layout, discover_program, run, trace
from metamerge.weights import stack


def mlp(*widths):
    one, two = widths or (8, 6)
    return nn.Sequential(
        nn.Linear(5, one), nn.ReLU(), nn.Linear(one, two), nn.ReLU(), nn.Linear(two, 3)
    )


def cnn(*widths):
    one, two, three = widths or (4, 6, 5)
    return nn.Sequential(
        nn.Conv2d(1, one, 3, padding=1),
        nn.BatchNorm2d(one),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(one, two, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(two),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(two * 4, three),
        nn.ReLU(),
        nn.Linear(three, 3),
    )


class Stream(nn.Module):
    def __init__(self, stream=6, *inner):
        super().__init__()
        one, two = inner or (5, 4)
        self.enter, self.leave = nn.Linear(5, stream), nn.Linear(stream, 3)
        self.up, self.down = nn.Linear(stream, one), nn.Linear(one, stream)
        self.rise, self.fall = nn.Linear(stream, two), nn.Linear(two, stream)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.fall(torch.relu(self.rise(x)))
        return self.leave(torch.relu(x))


ARCHITECTURES = {"mlp": (mlp, (5,)), "cnn": (cnn, (1, 8, 8)), "stream": (Stream, (5,))}


def make_members(make, count=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        members = [make().eval().requires_grad_(False) for _ in range(count)]
        for module in (own for member in members for own in member.modules()):
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return members


def make_inputs(shape, rows=80, seed=1):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


@cache
def layout_of(name):
    make, shape = ARCHITECTURES[name]
    program = trace(make().eval(), torch.zeros(2, *shape))
    return Layout(program, discover_program(program))


def fuse(name, **options):
    """Fuse three networks, and load the weights into a module of their widths."""
    make, shape = ARCHITECTURES[name]
    members, report = make_members(make), {}
    weights = [member.state_dict() for member in members]
    given = {"layout": layout_of(name), "batches": make_inputs(shape), "report": report}
    fused = pleas(weights, **given, **options)
    module = make(*report["widths"].values()).eval().requires_grad_(False)
    module.load_state_dict(fused)
    unseen = make_inputs(shape, seed=2)
    return module(unseen), torch.stack([member(unseen) for member in members]).mean(0)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("distribution", ["uniform", "greedy"])
def test_with_the_whole_budget_the_outputs_are_the_mean_of_the_members(name, distribution):
    outputs, mean = fuse(name, budget=3, distribution=distribution)
    assert torch.allclose(outputs, mean, atol=1e-5)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_more_width_comes_closer_to_the_mean_of_the_members(name):
    misses = []
    for budget in (1, 2, 3):
        outputs, mean = fuse(name, budget=budget)
        misses.append(float((outputs - mean).square().mean()))
    assert misses[0] > misses[1] > misses[2]


def test_a_wider_network_goes_through_merge_and_into_a_module_of_its_widths():
    members, unseen = make_members(cnn), make_inputs((1, 8, 8), seed=2)
    merged = merge(members, method="pleas", batches=make_inputs((1, 8, 8)), budget=3)
    module = merged.to_module(cnn(*merged.report["chosen"]["widths"].values())).eval()
    mean = torch.stack([member(unseen) for member in members]).mean(0)
    assert torch.allclose(module(unseen), mean, atol=1e-5)
    assert merged.program is None  # it would say other widths
    assert "variance_ratio" not in merged.report


def test_the_worst_units_stay_apart_by_hand():
    # Units 0 and 2 are the same in both members, unit 1 is not: at a budget of 4/3 it alone is
    # there twice, and reads and is read as in its own member; outputs are halved by the mean.
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    program = trace(model, torch.zeros(2, 2))
    layout = Layout(program, discover_program(program))
    one = {"0.weight": torch.tensor([[1.0, 0], [5, 0], [0, 1]]), "2.weight": torch.ones(1, 3)}
    other = {"0.weight": torch.tensor([[1.0, 0], [0, 5], [0, 1]]), "2.weight": torch.ones(1, 3) * 2}
    report = {}
    inputs = torch.rand(30, 2, generator=torch.Generator().manual_seed(0))
    fused = pleas([one, other], layout=layout, batches=inputs, budget=4 / 3, report=report)
    assert report["widths"] == {"0": 4}
    assert report["gap"]["0"] == pytest.approx(0, abs=1e-9)
    # the larger member, the other, keeps its place
    assert fused["0.weight"].tolist() == [[1.0, 0.0], [0.0, 5.0], [0.0, 1.0], [5.0, 0.0]]
    assert torch.allclose(fused["2.weight"], torch.tensor([[1.5, 1.0, 1.5, 0.5]]), atol=1e-5)


def test_layers_are_least_squares_of_mean_outputs_on_mean_inputs():
    members = make_members(mlp)
    inputs = make_inputs((5,)).double()
    layout = layout_of("mlp")
    weights = [{k: t.double() for k, t in own.state_dict().items()} for own in members]
    fused = pleas(weights, layout=layout, batches=inputs, ridge=1e-12)
    # batches are taken in float32
    exact = [own.double()[:2](inputs.float().double()) for own in members]
    read = torch.stack(exact).mean(0)
    target = torch.stack([own[2](x) for own, x in zip(members, exact, strict=True)]).mean(0)
    rows = torch.cat([read, torch.ones(len(read), 1).double()], 1)
    solution = torch.linalg.lstsq(rows, target).solution
    assert torch.allclose(fused["2.weight"], solution[:-1].T, atol=1e-6)
    assert torch.allclose(fused["2.bias"], solution[-1], atol=1e-6)


def test_convolutions_are_least_squares_over_patches():
    def make():
        return nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(),
            nn.Conv2d(3, 2, 2, stride=2, padding=1, dilation=2),
            nn.ReLU(),
            nn.Conv2d(2, 2, 1),
        )

    members, inputs = make_members(make), make_inputs((1, 8, 8), rows=20)
    program = trace(make(), torch.zeros(2, 1, 8, 8))
    layout = Layout(program, discover_program(program))
    weights = [own.state_dict() for own in members]
    weights = [{k: t.double() for k, t in own.items()} for own in weights]
    fused = pleas(weights, layout=layout, batches=inputs, ridge=1e-12)
    exact = [own.double()[:2](inputs.double()) for own in members]
    read = torch.stack(exact).mean(0)
    target = torch.stack([own[2](x) for own, x in zip(members, exact, strict=True)]).mean(0)
    rows = nn.functional.unfold(read, 2, dilation=2, padding=1, stride=2).mT.flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    solution = torch.linalg.lstsq(rows, target.movedim(1, -1).flatten(0, -2)).solution
    assert torch.allclose(fused["2.weight"].flatten(1), solution[:-1].T, atol=1e-6)
    assert torch.allclose(fused["2.bias"], solution[-1], atol=1e-6)


def test_variances_shrink_by_what_mixing_takes():
    # Two members whose unit is x and -x: what is left of it is nothing, and so is its variance.
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 2)).eval()
    program = trace(model, torch.zeros(2, 1))
    layout = Layout(program, discover_program(program))
    one = {k: t.clone() for k, t in model.state_dict().items()}
    one["0.weight"], one["1.running_var"] = torch.tensor([[1.0]]), torch.tensor([4.0])
    other = {**one, "0.weight": torch.tensor([[-0.5]])}
    fused = pleas([one, other], layout=layout, batches=torch.randn(50, 1))
    # mixed unit: x / 4; variances 1 and 1/4 of x's
    assert fused["1.running_var"].item() == pytest.approx(4 * (1 / 16) / (5 / 8))


def test_greedy_spends_the_budget_where_units_differ_most():
    one = make_members(mlp, 1)[0].state_dict()
    other = {key: tensor.clone() for key, tensor in one.items()}
    other["2.weight"] = -one["2.weight"].flip(1)
    given = {"layout": layout_of("mlp"), "batches": make_inputs((5,)), "budget": 1 + 3 / 14}
    widths = {}
    for distribution in ("uniform", "greedy"):
        report = {}
        pleas([one, other], distribution=distribution, report=report, **given)
        widths[distribution] = report["widths"]
    assert widths == {"uniform": {"0": 9, "2": 7}, "greedy": {"0": 8, "2": 9}}


def test_fitted_to_votes_more_predictions_are_those_of_the_soft_vote(digits_zoo):
    inputs, _ = digits_zoo.objective
    members = [{key: t[0, k] for key, t in digits_zoo.unseen.items()} for k in range(4)]
    program = digits_zoo.layout.program
    vote = run(program, stack(members), [inputs], stacked=True).softmax(-1).mean(0).argmax(-1)
    shares = []
    for outputs in ("mean", "votes"):
        fused = pleas(members, layout=digits_zoo.layout, batches=inputs, outputs=outputs)
        own = run(program, stack([fused]), [inputs], stacked=True)[0].argmax(-1)
        shares.append(float((own == vote).double().mean()))
    assert shares[1] > shares[0] + 0.1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": 0.5}, r"budget must be a number in \[1, 3\], got 0.5"),
        ({"budget": 4}, r"budget must be a number in \[1, 3\], got 4"),
        ({"budget": math.nan}, "budget must be"),
        ({"budget": None}, "budget must be"),
        ({"distribution": "fair"}, "distribution must be one of 'uniform', 'greedy', got 'fair'"),
        ({"outputs": "sum"}, "outputs must be one of"),
        ({"ridge": -1}, "ridge must be"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    weights = [member.state_dict() for member in make_members(mlp)]
    with pytest.raises(ConfigError, match=f"pleas: {told}"):
        pleas(weights, layout=layout_of("mlp"), batches=make_inputs((5,)), **options)


def test_corrections_of_a_wider_network_are_refused():
    with pytest.raises(ConfigError, match="made a network of other widths"):
        merge(
            make_members(mlp), method="pleas", batches=make_inputs((5,)), budget=2, correct="refit"
        )
