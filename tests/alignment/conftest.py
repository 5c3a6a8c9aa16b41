"""Small networks that alignments are tested on, and members of them that are drawn at random."""

import pytest
import torch
from torch import nn

from metamerge.alignment import optimal_transport, weight_matching
from metamerge.structure import Layout, discover_program, run, trace


class Residual(nn.Module):
    """One group on both axes of a tensor, and in three layers at once."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner = nn.Linear(6, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.leave, self.warmth = nn.Linear(8, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        x = torch.relu(self.enter(x))
        x = torch.relu(x + self.inner(x))
        return self.leave(x + self.down(torch.relu(self.up(x)))) * self.warmth


class OutOfOrder(nn.Module):
    """Registered from the outputs to the inputs, and without biases."""

    def __init__(self):
        super().__init__()
        self.leave = nn.Linear(7, 3, bias=False)
        self.second, self.first = nn.Linear(9, 7, bias=False), nn.Linear(8, 9, bias=False)
        self.enter = nn.Linear(6, 8, bias=False)

    def forward(self, x):
        for layer in (self.enter, self.first, self.second):
            x = torch.relu(layer(x))
        return self.leave(x)


NETWORKS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(6, 12),
            nn.ReLU(),
            nn.Linear(12, 10),
            nn.ReLU(),
            nn.Linear(10, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        ),
        (6,),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(54, 9),
            nn.ReLU(),
            nn.Linear(9, 3),
        ),
        (2, 6, 6),
    ),
    "residual": (Residual, (6,)),
    "out of order": (OutOfOrder, (6,)),
}


class ResidualMaps(nn.Module):
    """A block of convolutions beside a stream of maps."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.enter, self.leave = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(24, 3)
        self.inner, self.outer = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        x = self.activation(self.enter(x))
        x = x + self.outer(self.activation(self.norm(self.inner(x))))
        return self.leave(nn.functional.avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """Units nested in heads."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 2)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.enter(x)
        return self.leave(self.attend(x, x, x, need_weights=False)[0].mean(1))


def layout_of(model, *inputs):
    program = trace(model.eval(), inputs)
    return Layout(program, discover_program(program))


def objective_of(members, spec, perm):
    """Sum of squared distances to the barycentre, the slow way."""
    aligned = spec.permute(members, perm)
    total = torch.zeros(len(next(iter(members.values()))), dtype=torch.float64)
    for key in spec.axes:
        for f in range(len(total)):
            own = aligned[key][f].double()
            total[f] += sum((member - own.mean(0)).square().sum() for member in own)
    return total


class Network:
    """A network of the table: its program and spec, and members drawn at random."""

    def __init__(self, name):
        self.build, self.shape = NETWORKS[name]
        self.program = trace(self.build(), torch.zeros(2, *self.shape))
        self.spec = discover_program(self.program)

    def draw(self, *sizes, seed=0, dtype=torch.float32):
        """Random members of unit spread ``[*sizes, ...]``; variances are positive."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for key, tensor in self.build().state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(*sizes, *tensor.shape, generator=generator, dtype=dtype)
                drawn[key] = noise.abs() + 0.5 if key.endswith("running_var") else noise
        return drawn

    def inputs(self, seed=0):
        return torch.randn(64, *self.shape, generator=torch.Generator().manual_seed(seed))

    def fused(self, members, inputs, perm=None):
        """Outputs of the aligned average of every family, ``[f, b, o]``."""
        perm = perm or weight_matching(members, self.spec)
        aligned = self.spec.permute(members, perm)
        average = {key: tensor.mean(1) for key, tensor in aligned.items()}
        return run(self.program, average, [inputs], stacked=True)


@pytest.fixture(scope="session", params=NETWORKS)
def network(request):
    return Network(request.param)


@pytest.fixture(scope="session")
def perceptron():
    return Network("mlp")


@pytest.fixture(scope="session")
def objective():
    return objective_of


@pytest.fixture(scope="session")
def make_layout():
    return layout_of


@pytest.fixture(scope="session")
def residual_maps():
    return ResidualMaps


@pytest.fixture(scope="session")
def attention():
    return Attention


def mlp_of(width=6, other=5, inputs=4, classes=3):
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, other), nn.Tanh(),
        nn.Linear(other, classes),
    )  # fmt: skip


def cnn_of(width=4, other=3):
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * width, other), nn.ReLU(), nn.Linear(other, 3),
    )  # fmt: skip


class ElasticResidual(nn.Module):
    def __init__(self, stream=4, inner=3):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(2, stream, 3, padding=1), nn.Linear(stream, 3)
        self.inner = nn.Conv2d(stream, inner, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.outer = nn.Conv2d(inner, stream, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        x = torch.relu(x + self.outer(torch.relu(self.norm(self.inner(x)))))
        return self.leave(x.mean((2, 3)))


ELASTIC = {
    "mlp": (mlp_of, (4,)),
    "cnn": (cnn_of, (2, 4, 4)),
    "residual": (ElasticResidual, (2, 4, 4)),
}


class Elastic:
    """A network of any hidden widths; its layout is that of its usual ones."""

    def __init__(self, name):
        self.build, self.shape = ELASTIC[name]
        self.layout = self.layout_at()
        self.spec = self.layout.spec

    def layout_at(self, *widths):
        return layout_of(self.build(*widths), torch.zeros(2, *self.shape))

    def draw(self, *widths, seed=0, dtype=torch.float32, **sizes):
        """One random member; variances are positive."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for key, tensor in self.build(*widths, **sizes).state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if key.endswith("running_var"):
                noise = noise.abs() + 0.5
            drawn[key] = noise.to(dtype) if tensor.is_floating_point() else tensor.clone()
        return drawn

    def inputs(self):
        return torch.randn(50, *self.shape, generator=torch.Generator().manual_seed(0))

    def move(self, members, **options):
        return optimal_transport(members, self.spec, layout=self.layout, **options)

    def run(self, weights):
        return run(self.layout.program, weights, [self.inputs()])


@pytest.fixture(scope="session", params=ELASTIC)
def elastic(request):
    return Elastic(request.param)


@pytest.fixture(scope="session")
def elastic_mlp():
    return Elastic("mlp")


@pytest.fixture(scope="session")
def elastic_cnn():
    return Elastic("cnn")
