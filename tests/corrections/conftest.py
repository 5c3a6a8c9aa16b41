"""Small networks that corrections are tested on, with random members and calibration inputs."""

import pytest
import torch
from torch import nn

from metamerge.structure import Layout, discover_program, run, trace

FAMILIES, MEMBERS = 2, 3


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.inner = nn.Linear(6, 8), nn.Linear(8, 8)
        self.leave = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        return self.leave(torch.relu(x + self.inner(x)))


class Positions(nn.Module):
    """Linear layers that read rows by positions, then their mean."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.inner(torch.relu(self.enter(x))))
        return self.leave(x.mean(1))


MODELS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
        ),
        (6,),
    ),
    "layer norm": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3, bias=False)
        ),
        (6,),
    ),
    "residual": (Residual, (6,)),
    "positions": (Positions, (4, 6)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 5, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5, 3),
        ),
        (2, 9, 9),
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3),
            nn.ReLU(),
            nn.Conv1d(6, 4, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (2, 8),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 7, 7),
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 3),
        ),
        (2, 7, 7),
    ),
}


def average_of(members):
    return {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in members.items()}


class Setting:
    """A network with random members and calibration inputs, all in float64."""

    def __init__(self, model, shape, rows=50):  # by 81 positions: below MAX_ROWS
        self.model = model.double().eval()
        self.program = trace(model.float(), torch.zeros(2, *shape))
        self.layout = Layout(self.program, discover_program(self.program))
        self.model.double()
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
        self.members = self.draw(FAMILIES, MEMBERS)

    def draw(self, *sizes, seed=1):
        """Random weights ``[*sizes, ...]``; running variances are positive."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for key, tensor in self.model.state_dict().items():
            shape = (*sizes, *tensor.shape)
            if not tensor.is_floating_point():
                made[key] = tensor.expand(shape).clone()
                continue
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            noise = noise / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else noise
            made[key] = noise.abs() + 0.5 if key.endswith("running_var") else noise
        return made

    @property
    def average(self):
        return average_of(self.members)

    def outputs(self, weights):
        return run(self.program, weights, [self.inputs], stacked=True)

    def before_activation(self, weights, name):
        """What a submodule gives out, the slow way: rows by units."""
        self.model.load_state_dict(weights)
        seen = []
        hook = dict(self.model.named_modules())[name].register_forward_hook(
            lambda module, args, output: seen.append(output.detach())
        )
        self.model(self.inputs)
        hook.remove()
        output = seen[0]
        linear = isinstance(dict(self.model.named_modules())[name], nn.Linear)
        return (output if linear else output.movedim(1, -1)).flatten(0, -2)


@pytest.fixture(scope="session")
def make_setting():
    """Make a setting of a network's name, or of a module and the shape of its inputs."""

    def make(model, shape=None, **sizes):
        if isinstance(model, str):
            build, shape = MODELS[model]
            model = build()
        return Setting(model, shape, **sizes)

    return make


@pytest.fixture(scope="module", params=MODELS)
def setting(request, make_setting):
    return make_setting(request.param)


@pytest.fixture(scope="module")
def mlp(make_setting):
    return make_setting("mlp")


@pytest.fixture(scope="session")
def averaged():
    return average_of


@pytest.fixture(scope="session")
def residual():
    return Residual
