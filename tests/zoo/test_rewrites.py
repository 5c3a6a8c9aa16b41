"""Programs that compute the same in less time: the same values and gradients, in float64."""

import pytest
import torch
from torch import nn

from metamerge.structure import run, trace
from zoo.rewrites import pool_first


class TwoUses(nn.Module):
    """ReLU whose output is also read beside the pooling: it has to stay where it is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        x = self.conv(x).relu()
        return nn.functional.max_pool2d(x, 2).mean((2, 3)) + x.mean((2, 3))


def chain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(),
        nn.MaxPool2d(3, stride=1, padding=1), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def operators(program):
    wanted = ("relu.default", "max_pool2d.default")
    return [node.op.partition(".")[0] for node in program.nodes if node.op in wanted]


def gradients(program, state, inputs):
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in state.items()}
    outputs = run(program, leaves, [inputs])
    return outputs, torch.autograd.grad(outputs.square().sum(), list(leaves.values()))


@pytest.mark.parametrize("network", [chain, TwoUses])
def test_values_and_gradients_are_the_same_to_the_bit(network):
    torch.manual_seed(0)
    model = network().double()
    inputs = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    program = trace(model, inputs)
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    expected, found = (gradients(p, state, inputs) for p in (program, pool_first(program)))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))


def test_relu_follows_pooling_where_nothing_else_reads_it():
    inputs = torch.randn(2, 1, 8, 8)
    program = trace(chain(), inputs)
    assert operators(program) == ["relu", "max_pool2d"] * 2
    assert operators(pool_first(program)) == ["max_pool2d", "relu"] * 2
    program = trace(TwoUses(), inputs)
    assert operators(pool_first(program)) == operators(program) == ["relu", "max_pool2d"]
