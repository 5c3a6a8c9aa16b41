import pytest
import torch
from torch import nn

from metamerge.alignment import weight_matching
from metamerge.methods import average
from metamerge.structure import Layout, discover_program, run, trace
from metamerge.weights import stack


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


@pytest.fixture(scope="session")
def pair_layout():
    """Two inputs, two hidden units, one output; no biases."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    return layout_of(model, torch.zeros(2, 2))


@pytest.fixture(scope="session")
def pair_member():
    """Make a member of ``pair_layout`` of its two matrices."""

    def make(first, second):
        return {"0.weight": torch.tensor(first), "2.weight": torch.tensor(second)}

    return make


@pytest.fixture(scope="session")
def digits_scores(digits_zoo):
    """Mean accuracy of a method that is given unlabelled images, and of the plain average."""
    layout, (inputs, labels) = digits_zoo.layout, digits_zoo.validation
    found = {key: t[:4] for key, t in digits_zoo.unseen.items()}
    found = layout.spec.permute(found, weight_matching(found, layout.spec))
    families = [[{k: t[f, m] for k, t in found.items()} for m in range(4)] for f in range(4)]
    resources = {"layout": layout, "batches": digits_zoo.objective[0][:200]}

    def score(method):
        fused = [method(members, **resources) for members in families]
        fused += [average(members) for members in families]
        logits = run(layout.program, stack(fused), [inputs], stacked=True)
        return (logits.argmax(-1) == labels).float().unflatten(0, (2, 4)).mean((1, 2)).tolist()

    return score
