"""A table of small networks with their groups written down by hand; every property runs over all.

A line of ``groups`` is what ``str(spec)`` says of a group: name, number of units, what it is nested
in, the changes of scale that it allows, every place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamerge.structure import Layout, PermutationSpec, Program, discover_program, lockstep, trace


class Residual(nn.Module):
    """Two sums with the stream, so that its units are tied through four tensors."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner = nn.Linear(5, 6), nn.Linear(6, 6)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6, bias=False)
        self.leave = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        x = x + F.silu(self.inner(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.leave(x)


class ResidualMaps(nn.Module):
    """A basic block with in-place operators and a shortcut of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 5, 3, 2, 1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.short, self.bn3 = nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.bn0(self.stem(x)))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.bn3(self.short(x))
        return self.fc(self.relu(out).mean((2, 3)))


class Tokens(nn.Module):
    """Positions beside units: embedded, normalised, mixed unit by unit, averaged away."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Linear(3, 6), nn.Parameter(torch.zeros(4, 6))
        self.norm, self.inner = nn.LayerNorm(6), nn.Linear(6, 5)
        self.scale, self.warmth = nn.Parameter(torch.ones(5)), nn.Parameter(torch.tensor(1.0))
        self.leave = nn.Linear(5, 3)

    def forward(self, x):
        x = self.norm(self.embed(x) + self.place)
        x = F.relu(self.inner(x)) * self.scale
        return self.leave(x.mean(1)) / self.warmth


class Views(nn.Module):
    """Sizes that are read from the input, and pointwise operators of two tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.left = nn.Conv2d(1, 3, 2), nn.Linear(12, 4)
        self.right, self.leave = nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = F.elu(self.conv(x))
        x = x.view(x.shape[0], -1)
        left, right = self.left(x), self.right(x)
        x = torch.maximum(left, right) * torch.sigmoid(right) - torch.minimum(left, right).abs()
        return self.leave(x.clamp(-2, 2) + left**2)


class Attention(nn.Module):
    """Two heads of three units, packed into one layer, beside the stream that they are added to."""

    def __init__(self):
        super().__init__()
        self.enter, self.packed = nn.Linear(5, 7), nn.Linear(7, 18)
        self.merge, self.leave = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):  # [b, 4, 5]
        x = F.gelu(self.enter(x))
        parts = self.packed(x).split(6, dim=-1)
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in parts)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v  # [b, heads, 4, units]
        return self.leave(F.gelu(x + self.merge(mixed.transpose(1, 2).flatten(2))))


class Concatenation(nn.Module):
    """A layer behind two others and the inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.leave = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(15, 3)

    def forward(self, x):
        return self.leave(torch.cat([F.gelu(self.left(x)), x, F.gelu(self.right(x))], 1))


class Shared(nn.Module):
    """One layer that is used twice, and one whose weight is computed."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = F.gelu(F.linear(x, 2 * self.enter.weight, self.enter.bias))
        return self.leave(F.gelu(self.inner(F.gelu(self.inner(x)))))


class Written(nn.Module):
    """A change in place through a view, and constants: equal entries, and one per unit."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("factor", torch.full((6,), 0.5), persistent=False)
        self.register_buffer("each", torch.arange(1.0, 5.0), persistent=False)

    def forward(self, x):
        x = F.gelu(self.enter(x))
        x.unsqueeze(1).mul_(self.factor)
        return self.leave(F.gelu(self.inner(x)) * self.each)


@dataclass(frozen=True)
class Network:
    """A row of the table: how to build it, what it reads, what must be found.

    ``layered`` says whether it is nothing but layers of one group per axis, each used once.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: tuple[str, ...] = ()
    layered: bool = True

    @cached_property
    def program(self) -> Program:
        return trace(self.build(), torch.zeros(2, *self.shape))

    @cached_property
    def spec(self) -> PermutationSpec:
        return discover_program(self.program)

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.program, self.spec)

    def inputs(self, *sizes: int, seed: int = 0) -> Tensor:
        """Random inputs ``[*sizes, ...]`` in float64."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*sizes, *self.shape, generator=generator, dtype=torch.float64)

    def weights(self, *sizes: int, seed: int = 1) -> dict[str, Tensor]:
        """Random weights ``[*sizes, ...]`` in float64, buffers included; variances are positive."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for key, tensor in self.build().state_dict().items():
            if not tensor.is_floating_point():
                made[key] = tensor.expand((*sizes, *tensor.shape)).clone()
                continue
            shape = (*sizes, *tensor.shape)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            noise = noise / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else noise
            made[key] = noise.abs() + 0.5 if key.endswith("running_var") else noise
        return made

    def outputs(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """The slow obvious way: the module itself, loaded and called, in float64."""
        model = self.build().double().eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            return model(inputs.clone())


NETWORKS = {
    "mlp": Network(
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)
        ),
        (5,),
        (
            "0 (7 units, positive scaling): 0.weight[0], 0.bias[0], 2.weight[1]",
            "2 (6 units, sign scaling): 2.weight[0], 2.bias[0], 4.weight[1]",
        ),
    ),
    "mlp without biases": Network(
        lambda: nn.Sequential(
            nn.Linear(5, 7, bias=False), nn.GELU(), nn.Linear(7, 3, bias=False), nn.Softmax(-1)
        ),
        (5,),
        ("0 (7 units): 0.weight[0], 2.weight[1]",),
    ),
    "mlp with batch normalisation": Network(
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.BatchNorm1d(7), nn.SiLU(), nn.Linear(7, 3), nn.LogSoftmax(1)
        ),
        (5,),
        (
            "0 (7 units): 0.weight[0], 0.bias[0], 1.weight[0], 1.bias[0], 3.weight[1], "
            "1.running_mean[0], 1.running_var[0]",
        ),
    ),
    "mlp with layer normalisation and dropout": Network(
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.LayerNorm(7), nn.Dropout(0.5), nn.GELU(), nn.Linear(7, 3)
        ),
        (5,),
        ("0 (7 units): 0.weight[0], 0.bias[0], 1.weight[0], 1.bias[0], 4.weight[1]",),
    ),
    "bottleneck of one unit": Network(
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 3)
        ),
        (5,),
        ("0 (4 units, sign scaling): 0.weight[0], 0.bias[0], 2.weight[1]",),
    ),
    "residual": Network(
        Residual,
        (5,),
        (
            "enter (6 units): enter.weight[0], enter.bias[0], inner.weight[0], inner.weight[1], "
            "inner.bias[0], up.weight[1], down.weight[0], leave.weight[1]",
            "up (7 units): up.weight[0], up.bias[0], down.weight[1]",
        ),
    ),
    "tokens": Network(
        Tokens,
        (4, 3),
        (
            "place (6 units, real scaling): place[1], embed.weight[0], embed.bias[0], "
            "norm.weight[0], norm.bias[0], inner.weight[1]",
            "scale (5 units, real and positive scaling): scale[0], inner.weight[0], "
            "inner.bias[0], leave.weight[1]",
        ),
        layered=False,
    ),
    "conv1d": Network(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1),
            nn.Hardtanh(),
            nn.AvgPool1d(2),
            nn.Conv1d(4, 3, 2, stride=2),
            nn.LeakyReLU(),
            nn.MaxPool1d(2),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        (2, 8),
        (
            "0 (4 units): 0.weight[0], 0.bias[0], 3.weight[1]",
            "3 (3 units, positive scaling): 3.weight[0], 3.bias[0], 7.weight[1]",
        ),
    ),
    "conv2d with batch normalisation and flatten": Network(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 5),
            nn.ReLU(inplace=True),
            nn.Linear(5, 3),
        ),
        (2, 6, 6),
        (
            "0 (4 units, positive scaling): 0.weight[0], 0.bias[0], 1.weight[0], 1.bias[0], "
            "5.weight[1], 1.running_mean[0], 1.running_var[0]",
            "5 (5 units, positive scaling): 5.weight[0], 5.bias[0], 7.weight[1]",
        ),
    ),
    "conv2d with pads, strides and dilation": Network(
        lambda: nn.Sequential(
            nn.ZeroPad2d((1, 0, 0, 1)),
            nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(0, 1), padding_mode="circular"),
            nn.Softplus(),
            nn.AvgPool2d(2, padding=1),
            nn.Conv2d(4, 3, 2, dilation=2, bias=False),
            nn.ELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        (2, 9, 6),
        (
            "1 (4 units): 1.weight[0], 1.bias[0], 4.weight[1]",
            "4 (3 units): 4.weight[0], 8.weight[1]",
        ),
    ),
    "depthwise": Network(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1),
            nn.ReLU6(),
            nn.Conv2d(4, 4, 3, groups=4, bias=False),
            nn.BatchNorm2d(4),
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 5, 5),
        (
            "0 (4 units): 0.weight[0], 0.bias[0], 2.weight[0], 3.weight[0], 3.bias[0], "
            "7.weight[1], 3.running_mean[0], 3.running_var[0]",
        ),
    ),
    "residual maps": Network(
        ResidualMaps,
        (2, 6, 6),
        (
            "stem (4 units, positive scaling): stem.weight[0], bn0.weight[0], bn0.bias[0], "
            "conv1.weight[1], short.weight[1], bn0.running_mean[0], bn0.running_var[0]",
            "conv1 (5 units, positive scaling): conv1.weight[0], bn1.weight[0], bn1.bias[0], "
            "conv2.weight[1], bn1.running_mean[0], bn1.running_var[0]",
            "conv2 (6 units, positive scaling): conv2.weight[0], bn2.weight[0], bn2.bias[0], "
            "short.weight[0], bn3.weight[0], bn3.bias[0], fc.weight[1], bn2.running_mean[0], "
            "bn2.running_var[0], bn3.running_mean[0], bn3.running_var[0]",
        ),
    ),
    "conv3d": Network(
        lambda: nn.Sequential(
            nn.Conv3d(1, 3, 2),
            nn.Mish(),
            nn.MaxPool3d(2),
            nn.Flatten(2),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        (1, 3, 3, 3),
        ("0 (3 units): 0.weight[0], 0.bias[0], 5.weight[1]",),
    ),
    "views": Network(
        Views,
        (1, 3, 3),
        (
            "conv (3 units): conv.weight[0], conv.bias[0], left.weight[1], right.weight[1]",
            "left (4 units): left.weight[0], left.bias[0], right.weight[0], right.bias[0], "
            "leave.weight[1]",
        ),
    ),
    "batch normalisation without running statistics": Network(
        lambda: nn.Sequential(
            nn.Linear(5, 4, bias=False),  # it would cancel
            nn.BatchNorm1d(4, affine=False, track_running_stats=False),
            nn.SELU(),
            nn.Linear(4, 3),
        ),
        (5,),
        ("0 (4 units): 0.weight[0], 3.weight[1]",),
    ),
    "attention": Network(
        Attention,
        (4, 5),
        (
            "enter (7 units): enter.weight[0], enter.bias[0], packed.weight[1], merge.weight[0], "
            "merge.bias[0], leave.weight[1]",
            "packed (2 units, sign scaling): packed.weight[0], packed.bias[0], merge.weight[1]",
            "packed#2 (3 units in each of packed, sign scaling): packed.weight[0], packed.bias[0]",
            "packed#3 (3 units in each of packed, real scaling): packed.weight[0], "
            "packed.bias[0], merge.weight[1]",
        ),
        layered=False,
    ),
    "grouped convolution": Network(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1),
            nn.GELU(),
            nn.Conv2d(4, 6, 3, groups=2),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        (2, 5, 5),
        (
            "0 (2 units): 0.weight[0], 0.bias[0], 2.weight[0], 2.bias[0], 6.weight[1]",
            "0#2 (2 units in each of 0): 0.weight[0], 0.bias[0], 2.weight[1]",
            "2 (3 units in each of 0): 2.weight[0], 2.bias[0], 6.weight[1]",
        ),
        layered=False,
    ),
    "concatenation": Network(
        Concatenation,
        (5,),
        (
            "left (4 units): left.weight[0], left.bias[0], leave.weight[1]",
            "right (6 units): right.weight[0], right.bias[0], leave.weight[1]",
        ),
        layered=False,
    ),
    "shared": Network(
        Shared,
        (5,),
        (
            "enter (7 units): enter.weight[0], enter.bias[0], inner.weight[0], inner.weight[1], "
            "inner.bias[0], leave.weight[1]",
        ),
        layered=False,
    ),
    "written in place": Network(
        Written,
        (5,),
        ("enter (6 units): enter.weight[0], enter.bias[0], inner.weight[1]",),
    ),
}
LAYERED = [name for name, network in NETWORKS.items() if network.layered]


@pytest.fixture(scope="session", params=NETWORKS)
def network(request):
    """Every network of the table in turn."""
    return NETWORKS[request.param]


@pytest.fixture(scope="session", params=LAYERED)
def layered(request):
    """Every network of nothing but layers of one group per axis, in turn."""
    return NETWORKS[request.param]


@pytest.fixture(scope="session")
def networks():
    """The whole table, by name."""
    return NETWORKS


@pytest.fixture(scope="session")
def make_network():
    """What makes a row of the table, for tests with networks of their own."""
    return Network


@pytest.fixture
def mapped(monkeypatch):
    """Operators that were mapped over the networks one by one."""
    seen = []
    original = lockstep._mapped

    def spy(op, args, kwargs):
        seen.append(op)
        return original(op, args, kwargs)

    monkeypatch.setattr(lockstep, "_mapped", spy)
    return seen
