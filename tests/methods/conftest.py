import pytest
import torch
from torch import nn

from metamerge.structure import Layout, discover_program, trace


def layout_of(model, inputs):
    program = trace(model, inputs)
    return Layout(program, discover_program(program))


@pytest.fixture(scope="session")
def scalar_layout():
    """One input, two classes, no bias: with weights [a, 0], class 0 has a logit of a * x."""
    return layout_of(nn.Sequential(nn.Linear(1, 2, bias=False)), torch.zeros(2, 1))


@pytest.fixture
def scalar_members():
    """Make members of ``scalar_layout``, one per number."""

    def make(*numbers):
        return [{"0.weight": torch.tensor([[float(a)], [0.0]])} for a in numbers]

    return make


@pytest.fixture(scope="session")
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture(scope="session")
def mlp_layout(mlp):
    return layout_of(mlp, torch.zeros(2, 5))


@pytest.fixture
def mlp_members(mlp):
    generator = torch.Generator().manual_seed(1)
    return [
        {k: torch.randn(t.shape, generator=generator) for k, t in mlp.state_dict().items()}
        for _ in range(5)
    ]


@pytest.fixture(scope="session")
def image_layout():
    """Layout and two members of a network that gives out feature maps."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    return layout_of(model, torch.zeros(2, 1, 4, 4)), [model.state_dict()] * 2
