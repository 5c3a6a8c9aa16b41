"""What units matter, and networks without the least of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.ensembles import Mutant, magnitude, pruned, taylor
from metamerge.errors import ConfigError
from metamerge.structure import Layout, discover, discover_program, run, trace
from metamerge.structure.rebuilding import rebuilt

LABELS = torch.tensor([0, 1, 2, 1, 0])
INPUTS = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual stream that two convolutions and the flattened head read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.Conv2d(6, 4, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x):
        x = self.a(x).relu()
        x = x + self.c(self.norm(self.b(x)).relu())
        return self.head(F.max_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Net().eval()
        module.norm.running_mean.uniform_(-0.1, 0.1)
        module.norm.running_var.uniform_(0.5, 1.5)
    program = trace(module, INPUTS)
    layout = Layout(program, discover_program(program))
    return module, Mutant(module.state_dict(), layout)


def test_taylor_is_the_slope_of_the_loss_in_a_factor_on_what_layers_read(net):
    """One unit and one input after the other: finite differences in float64."""
    _, mutant = net
    double, step = {k: t.double() for k, t in mutant.weights.items() if t.is_floating_point()}, 1e-6
    found = taylor(double, mutant.layout, INPUTS.double(), LABELS)
    program, spec = mutant.layout.program.in_float64(), mutant.layout.spec
    assert found.keys() == spec.groups.keys()
    for group, n in spec.groups.items():
        for unit in range(n):
            losses = []
            for factor in (1 + step, 1 - step):
                weights = dict(double)
                for layer in mutant.layout.consumers(group):
                    columns = mutant.layout.columns(layer).index == unit
                    scaled = weights[layer.weight].clone()
                    scaled[:, columns] *= factor
                    weights[layer.weight] = scaled
                logits = run(program, weights, [INPUTS.double()])
                losses.append(F.cross_entropy(logits, LABELS, reduction="none"))
            slope = ((losses[0] - losses[1]) / (2 * step)).abs().mean()
            assert float(found[group][unit]) == pytest.approx(float(slope), rel=1e-5, abs=1e-9)


def test_magnitude_by_hand():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    program = trace(net, torch.zeros(2, 2))
    layout = Layout(program, discover_program(program))
    weights = {
        "0.weight": torch.tensor([[1.0, -2.0], [0.0, 0.5], [-1.0, -1.0]]),
        "0.bias": torch.full((3,), 9.0),
        "2.weight": torch.ones(2, 3),
        "2.bias": torch.zeros(2),
    }
    assert magnitude(weights, layout)["0"].tolist() == [3, 0.5, 2]
    small = pruned(Mutant(weights, layout), {"0": 2}, magnitude(weights, layout))
    assert small.weights["0.weight"].tolist() == [[1, -2], [-1, -1]]
    assert small.weights["2.weight"].shape == (2, 2)


def test_a_pruned_network_computes_what_the_masked_one_does(net):
    module, mutant = net
    spec, layout = mutant.layout.spec, mutant.layout
    saliency = taylor(mutant.weights, layout, INPUTS, LABELS)
    widths = {group: n - 2 for group, n in spec.groups.items()}
    small = pruned(mutant, widths, saliency)
    masked = {key: tensor.clone() for key, tensor in mutant.weights.items()}
    for group, width in widths.items():
        gone = saliency[group].argsort()[: spec.groups[group] - width]
        for layer in layout.consumers(group):
            masked[layer.weight][:, torch.isin(layout.columns(layer).index, gone)] = 0
    expected = run(layout.program, masked, [INPUTS])
    assert torch.allclose(small.answers(INPUTS), expected, atol=1e-5)
    assert small.layout.spec.groups == widths
    assert small.weights["norm.running_var"].shape == (4,)
    assert small.weights["head.weight"].shape == (3, 2 * 16)
    again = rebuilt(module, small.layout.program, small.weights)
    assert discover(again, INPUTS).digest == small.layout.spec.digest
    assert torch.allclose(again(INPUTS), expected, atol=1e-5)


def test_units_are_kept_in_the_order_they_were_in_and_nothing_is_changed(net):
    _, mutant = net
    before = {key: tensor.clone() for key, tensor in mutant.weights.items()}
    (group,) = (g for g, n in mutant.layout.spec.groups.items() if n == 6)
    saliency = {group: torch.tensor([1.0, 5, 0, 4, 3, 2])}
    small = pruned(mutant, {group: 3}, saliency)
    assert torch.equal(small.weights["b.bias"], before["b.bias"][[1, 3, 4]])
    small.weights["a.weight"].zero_()
    assert all(torch.equal(mutant.weights[key], tensor) for key, tensor in before.items())


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))
        self.out = nn.Linear(6, 3)

    def forward(self, x):  # [b, t, 4]
        q, k, v = (f(x).unflatten(-1, (3, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y).mean(1)


def test_whole_heads_can_be_pruned_and_units_of_each_head():
    inputs = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = Heads()
    program = trace(module, inputs)
    layout = Layout(program, discover_program(program))
    mutant = Mutant(module.state_dict(), layout)
    saliency = taylor(mutant.weights, layout, inputs, LABELS)
    assert {g: tuple(s.shape) for g, s in saliency.items()} == {"q": (3,), "v": (3, 2)}
    small = pruned(mutant, {"q": 2, "v": 1}, saliency)
    assert small.weights["v.weight"].shape == (2, 4)
    assert small.weights["q.weight"].shape == (4, 4)
    best = saliency["q"].argsort(descending=True)[:2].sort()[0]
    kept = [2 * int(head) + int(saliency["v"][head].argmax()) for head in best]
    assert torch.equal(small.weights["v.bias"], mutant.weights["v.bias"][kept])
    with pytest.raises(ConfigError, match="nothing is known of 'q#2'"):
        pruned(mutant, {"q#2": 1}, saliency)


@pytest.mark.parametrize("widths", [{"a": 9}, {"a": 0}, {"nobody": 1}])
def test_more_units_than_there_are_and_unknown_groups_are_refused(net, widths):
    _, mutant = net
    saliency = {g: torch.ones(n) for g, n in mutant.layout.spec.groups.items()}
    with pytest.raises(ConfigError, match="Ask for no more than it has"):
        pruned(mutant, widths, saliency)
