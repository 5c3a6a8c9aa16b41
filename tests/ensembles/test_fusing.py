"""One wide network of several: exactly the mean of what they put out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.ensembles import fused
from metamerge.errors import StructureError
from metamerge.structure import Layout, discover, discover_program, run, trace
from metamerge.structure.rebuilding import rebuilt
from metamerge.weights import stack, unstack
from zoo import architectures
from zoo.training import init_networks, train_networks

SHAPE = (1, 12, 12)


def layout_of(module, example):
    program = trace(module, example)
    return Layout(program, discover_program(program))


def members_of(factory, count):
    """Members with statistics that no two share."""
    generator = torch.Generator().manual_seed(0)
    stacked = init_networks(factory, range(count))
    for key, tensor in stacked.items():
        if key.endswith(("running_mean", "running_var")):
            stacked[key] = torch.rand(tensor.shape, generator=generator) + 0.5
        if key.endswith("num_batches_tracked"):
            stacked[key] = torch.arange(count)
    return unstack(stacked)


def residual(norm):
    make = architectures.NORMS[norm]
    return nn.Sequential(
        architectures.convolution(1, 2, make),
        architectures.Residual(2, 3, make, stride=2),
        architectures.Residual(3, 3, make),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    )


def mean_of(members, layout, inputs):
    return torch.stack([run(layout.program, own, [inputs]) for own in members]).mean(0)


def test_two_networks_of_two_units_by_hand():
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    members = [
        {
            "0.weight": torch.tensor([[a], [b]]),
            "0.bias": torch.tensor([a, b]),
            "2.weight": torch.tensor([[c, d]]),
            "2.bias": torch.tensor([d]),
        }
        for a, b, c, d in ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0))
    ]
    wide = fused(members, layout_of(net, torch.zeros(2, 1)))
    assert {key: tensor.tolist() for key, tensor in wide.weights.items()} == {
        "0.weight": [[1], [2], [5], [6]],
        "0.bias": [1, 2, 5, 6],
        "2.weight": [[1.5, 2, 3.5, 4]],
        "2.bias": [6],
    }
    # of 1: units are twice their weights; 2 * 1.5 + 4 * 2 + 10 * 3.5 + 12 * 4 + 6
    assert float(wide.answers(torch.ones(1, 1))) == 100


def test_eight_convolutional_networks_are_their_ensemble_to_1e_5():
    shape = (1, 28, 28)
    factory = lambda: architectures.build("convnet", shape, 10, widths=(16, 32, 32))  # noqa: E731
    members = members_of(factory, 8)
    layout = layout_of(factory(), torch.zeros(2, *shape))
    wide = fused(members, layout)
    inputs = torch.rand(16, *shape, generator=torch.Generator().manual_seed(1))
    assert wide.weights["3.weight"].shape == (256, 128, 3, 3)
    assert (wide.answers(inputs) - mean_of(members, layout, inputs)).abs().max() < 1e-5
    blocks = wide.weights["3.weight"].reshape(8, 32, 8, 16, 9)
    for k, own in enumerate(members):
        assert torch.equal(blocks[k, :, k].flatten(2), own["3.weight"].flatten(2))
    assert int((blocks != 0).any(4).any(3).any(1).sum()) == 8  # no other block holds anything


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_residual_networks_with_normalisations_are_their_ensemble(norm):
    factory = lambda: residual(norm)  # noqa: E731
    members = members_of(factory, 3)
    layout = layout_of(factory(), torch.zeros(2, *SHAPE))
    wide = fused(members, layout)
    inputs = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert (wide.answers(inputs) - mean_of(members, layout, inputs)).abs().max() < 1e-5
    if norm == "batch":
        assert wide.weights["0.1.num_batches_tracked"] == 2  # the largest
        assert wide.layout.spec.groups == {g: 3 * n for g, n in layout.spec.groups.items()}


class Attention(nn.Module):
    """Two heads of three, and a depthwise convolution before them."""

    def __init__(self):
        super().__init__()
        self.a, self.d = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.out, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):  # [b, 2, t]
        x = self.d(self.a(x).relu()).transpose(1, 2)
        q, k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))


def test_heads_stay_as_large_and_become_more():
    members = members_of(Attention, 2)
    example = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0))
    layout = layout_of(Attention(), example)
    wide = fused(members, layout)
    assert (wide.answers(example) - mean_of(members, layout, example)).abs().max() < 1e-5
    assert (wide.layout.spec.groups["q"], wide.layout.spec.groups["v"]) == (4, 3)


class Meeting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Sure(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x).relu()).softmax(1)


@pytest.mark.parametrize("kind", [Meeting, Sure])
def test_members_that_meet_before_or_behind_the_last_layer_are_refused(kind):
    layout = layout_of(kind(), torch.zeros(2, 3))
    with pytest.raises(StructureError, match="differs from the mean of its 2 members"):
        fused(members_of(kind, 2), layout)


def test_members_are_left_as_they_are_and_share_no_memory():
    factory = lambda: architectures.build("mlp", SHAPE, 3, widths=(4,))  # noqa: E731
    members = members_of(factory, 2)
    before = [{key: t.clone() for key, t in own.items()} for own in members]
    wide = fused(members, layout_of(factory(), torch.zeros(2, *SHAPE)))
    for tensor in wide.weights.values():
        tensor.fill_(9)
    assert all(
        torch.equal(own[k], old[k]) for own, old in zip(members, before, strict=True) for k in own
    )


def test_half_precision_comes_out_as_it_went_in():
    factory = lambda: architectures.build("mlp", SHAPE, 3, widths=(4,)).half()  # noqa: E731
    layout = layout_of(architectures.build("mlp", SHAPE, 3, widths=(4,)), torch.zeros(2, *SHAPE))
    wide = fused(members_of(factory, 3), layout)
    assert {t.dtype for t in wide.weights.values()} == {torch.float16}


def test_training_fills_the_blocks_between_members():
    factory = lambda: architectures.build("mlp", SHAPE, 3, widths=(6, 5))  # noqa: E731
    wide = fused(members_of(factory, 4), layout_of(factory(), torch.zeros(2, *SHAPE)))
    inputs, targets = torch.rand(32, *SHAPE), torch.arange(32) % 3
    trained = train_networks(
        wide.layout.program,
        stack([wide.weights]),
        inputs,
        targets,
        [torch.arange(32)],
        epochs=5,
    ).weights
    between = trained["3.weight"][0].reshape(4, 5, 4, 6)[0, :, 1]
    assert (wide.weights["3.weight"].reshape(4, 5, 4, 6)[0, :, 1] == 0).all()
    assert (between != 0).float().mean() > 0.5


def test_discovery_on_the_rebuilt_module_finds_the_same_spec():
    factory = lambda: architectures.build("convnet", SHAPE, 3, widths=(2, 3))  # noqa: E731
    wide = fused(members_of(factory, 2), layout_of(factory(), torch.zeros(2, *SHAPE)))
    module = rebuilt(factory(), wide.layout.program, wide.weights)
    assert discover(module, torch.zeros(2, *SHAPE)).digest == wide.layout.spec.digest
