"""Modules in other widths: real layers of the right sizes, or refused."""

import pytest
import torch
from torch import nn

from metamerge.errors import IncompatibleWeights, StructureError
from metamerge.structure import discover_program, run, trace
from metamerge.structure.rebuilding import rebuilt
from metamerge.structure.resizing import resized


def drawn(program):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for value, key in program.parameters.items():
        weights[key] = torch.rand(program.shape(value), generator=generator) + 0.1
    return weights


def widened(module, example, times=2):
    program = trace(module, example)
    spec = discover_program(program)
    wide = resized(
        program, spec, {g: times * n for g, n in spec.groups.items() if not spec.outer(g)}
    )
    return wide, {**module.state_dict(), **drawn(wide)}


def test_sizes_that_layers_keep_are_those_of_their_tensors():
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).train()  # fmt: skip
    example = torch.rand(2, 1, 6, 6)
    program, weights = widened(module, example)
    made = rebuilt(module, program, weights)
    assert (made[0].out_channels, made[1].num_features, made[6].in_features) == (8, 8, 8)
    assert (made[3].groups, made[3].in_channels) == (8, 8)
    assert made.training
    assert torch.allclose(made.eval()(example), run(program, weights, [example]), rtol=1e-5)
    assert module[0].out_channels == 4
    assert module.training


def test_a_rebuilt_module_can_be_trained_and_owns_its_tensors():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    program, weights = widened(module, torch.rand(2, 3))
    made = rebuilt(module, program, weights)
    made(torch.ones(2, 3)).sum().backward()
    assert made[0].weight.grad.shape == (8, 3)
    assert not made[0].bias.requires_grad
    with torch.no_grad():
        made[0].weight.zero_()
    assert weights["0.weight"].min() > 0


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 4, 1), nn.Linear(20, 2)

    def forward(self, x):
        return self.b(self.a(x).reshape(-1, 20))


def test_a_forward_with_sizes_of_its_own_is_refused():
    program, weights = widened(Sized(), torch.rand(2, 1, 5))
    with pytest.raises(StructureError, match="or run the network by its program"):
        rebuilt(Sized(), program, weights)


def test_another_architecture_is_refused():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    program, weights = widened(module, torch.rand(2, 3))
    with pytest.raises(IncompatibleWeights, match="are in the module or in the weights"):
        rebuilt(nn.Linear(3, 4), program, weights)
