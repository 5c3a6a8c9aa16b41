"""Probes: banks by shape of input, starts of them, and inputs that are imagined."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from metamerge.errors import IncompatibleWeights
from metamerge.mergers import probe_start
from metamerge.mergers.probes import Probes, filled_up, imagine, mixtures, name_of
from metamerge.structure import Layout, discover_program, trace
from metamerge.weights import stack


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layout_of(model, inputs):
    program = trace(model, inputs)
    return Layout(program, discover_program(program))


# ---------------------------------------------------------------------------- banks


def test_every_shape_has_its_bank_and_others_have_none():
    starts = {shape: torch.rand(7, *shape) for shape in ((1, 28, 28), (12,))}
    probes = Probes(starts)
    for shape, start in starts.items():
        assert torch.equal(probes(shape), start)
        assert torch.equal(probes(torch.Size(shape)), start)
    assert probes((1, 28, 29)) is None
    assert probes((None, 12)) is None


def test_banks_are_parameters_of_their_own_with_the_shape_as_their_name():
    start = torch.rand(4, 1, 2, 3)
    probes = Probes({(1, 2, 3): start, (6,): torch.rand(4, 6)})
    assert [name for name, _ in probes.named_parameters()] == ["banks.1x2x3", "banks.6"]
    with torch.no_grad():
        probes((1, 2, 3)).zero_()
    assert start.amax() > 0
    assert name_of((1, 28, 28)) == "1x28x28"


def test_flat_inputs_are_those_of_the_only_bank_of_as_many_numbers():
    image, other = torch.rand(4, 1, 2, 3), torch.rand(4, 1, 3, 3)
    probes = Probes({(1, 2, 3): image, (1, 3, 3): other})
    assert torch.equal(probes((6,)), image.flatten(1))
    assert torch.equal(probes((9,)), other.flatten(1))
    assert probes((7,)) is None
    assert probes((2, 3)) is None  # of another shape, but not flat
    assert Probes({(1, 2, 3): image, (2, 3, 1): image.reshape(4, 2, 3, 1)})((6,)) is None
    own = torch.rand(4, 6)
    assert torch.equal(Probes({(1, 2, 3): image, (6,): own})((6,)), own)


def test_probes_beyond_the_count_are_spare():
    bank, other = torch.rand(7, 1, 2, 3), torch.rand(4, 5)
    probes = Probes({(1, 2, 3): bank, (5,): other}, count=4)
    assert torch.equal(probes((1, 2, 3)), bank[:4])
    assert torch.equal(probes.spare((1, 2, 3)), bank[4:])
    assert torch.equal(probes((6,)), bank[:4].flatten(1))
    assert torch.equal(probes.spare((6,)), bank[4:].flatten(1))
    assert torch.equal(probes((5,)), other)
    assert probes.spare((5,)) is None  # a bank of just as many
    assert probes.spare((9,)) is None  # no bank
    probes((1, 2, 3)).sum().backward()
    assert probes.banks["1x2x3"].grad.flatten(1).sum(1).tolist() == [6.0] * 4 + [0.0] * 3


def test_neighbours_of_flat_inputs_are_those_of_their_bank():
    probes = Probes({(1, 2, 3): torch.rand(4, 1, 2, 3), (1, 3, 3): torch.rand(4, 1, 3, 3)})
    assert probes.grid((6,)) == (1, 2, 3)
    assert probes.grid((1, 3, 3)) == (1, 3, 3)
    assert probes.grid((7,)) == (7,)
    assert probes.grid((5, 9, 9)) == (5, 9, 9)
    own = Probes({(1, 2, 3): torch.rand(4, 1, 2, 3), (6,): torch.rand(4, 6)})
    assert own.grid((6,)) == (6,)


# ---------------------------------------------------------------------------- starts


def test_probes_start_as_different_images():
    images = torch.arange(10.0)[:, None]
    start = probe_start(images, 6, seeded())
    assert len(set(start.flatten().tolist())) == 6
    assert torch.equal(start, probe_start(images, 6, seeded()))
    assert not torch.equal(start, probe_start(images, 6, seeded(1)))


def test_too_few_images_for_the_probes_are_repeated_evenly():
    start = probe_start(torch.arange(4.0)[:, None], 10, seeded())
    counts = torch.bincount(start.flatten().long(), minlength=4)
    assert len(start) == 10
    assert counts.min() >= 2
    assert counts.max() <= 3


# ---------------------------------------------------------------------------- imagined inputs


def moments(inputs):
    """Second moments of inputs, whose sum of squares is 1: ``[d, d]``."""
    flat = inputs.flatten(1).double()
    square = flat.mT @ flat
    return square / square.trace()


def test_imagined_inputs_have_mean_zero_and_deviation_one(case):
    found = imagine(case.members, case.layout, 20, seeded())
    assert found.shape == (20, 1, 8, 8)
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(found.std()) == pytest.approx(1.0, abs=1e-5)


def test_imagined_inputs_have_the_second_moments_of_the_rows_of_first_layers():
    layout = layout_of(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3)
    )
    rows = torch.randn(8, 3, generator=seeded(1)) * torch.tensor([1.0, 2.0, 0.1])
    members = {
        "0.weight": rows.reshape(1, 2, 4, 3),
        "0.bias": torch.randn(1, 2, 4, generator=seeded(2)),
        "2.weight": torch.randn(1, 2, 2, 4, generator=seeded(3)),
        "2.bias": torch.zeros(1, 2, 2),
    }
    found = imagine(members, layout, 40_000, seeded())
    # The deviation of a mean of 40,000 products of two normal numbers is at most root 2 of 1/200.
    assert torch.allclose(moments(found), moments(rows), atol=4 * 2**0.5 / 200)
    assert not torch.allclose(moments(found), torch.eye(3, dtype=torch.float64) / 3, atol=0.1)


def test_imagined_images_are_kernels_at_all_places():
    layout = layout_of(nn.Sequential(nn.Conv2d(1, 2, 2, bias=False)), torch.zeros(2, 1, 3, 3))
    kernels = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 2.0]]]])
    found = imagine({"0.weight": kernels[None, None]}, layout, 40_000, seeded())
    placed = torch.zeros(8, 3, 3)
    for place in range(4):
        row, column = place // 2, place % 2
        placed[place, row, column : column + 2] = 1.0
        placed[4 + place, row + 1, column + 1] = 2.0
    assert torch.allclose(moments(found), moments(placed), atol=4 * 2**0.5 / 200)


def test_a_row_that_no_member_has_is_never_imagined():
    layout = layout_of(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3))
    members = {"0.weight": torch.tensor([[[[1.0, 2.0, 0.0]] * 2]]), "0.bias": torch.zeros(1, 1, 2)}
    found = imagine(members, layout, 50, seeded())
    found = found - found[:, 2:]  # the mean that was taken off
    assert torch.allclose(found[:, 1], 2 * found[:, 0], atol=1e-4)


def test_layers_behind_the_first_have_no_say(case):
    changed = dict(case.members)
    for layer in case.layout.layers[1:]:
        changed[layer.weight] = torch.zeros_like(changed[layer.weight])
    found, expected = (
        imagine(members, case.layout, 5, seeded()) for members in (changed, case.members)
    )
    assert torch.equal(found, expected)


def test_the_same_seed_imagines_the_same(case):
    first, again, other = (
        imagine(case.members, case.layout, 5, seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_neither_the_order_of_members_nor_that_of_units_matters(case):
    members = {key: tensor[:1] for key, tensor in case.members.items()}
    expected = imagine(members, case.layout, 5, seeded())
    turned = {key: tensor[:, [2, 0, 3, 1]] for key, tensor in members.items()}
    shuffled = case.layout.spec.permute(turned, case.layout.spec.random(seeded(1), (1, 4)))
    for other in (turned, shuffled):
        # Sums over up to 96 rows in another order.
        assert torch.allclose(imagine(other, case.layout, 5, seeded()), expected, atol=1e-5)


def test_no_gradient_reaches_the_members(case):
    members = {key: tensor.clone().requires_grad_() for key, tensor in case.members.items()}
    with torch.no_grad():
        assert not imagine(members, case.layout, 3, seeded()).requires_grad
    assert all(tensor.grad is None for tensor in members.values())


def test_networks_of_zeros_are_shown_zeros(case):
    zeros = {key: torch.zeros_like(tensor) for key, tensor in case.members.items()}
    assert torch.equal(imagine(zeros, case.layout, 3, seeded()), torch.zeros(3, 1, 8, 8))


class Two(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x, y):
        return self.one(x) + self.two(y)


def test_two_inputs_are_not_imagined():
    model = Two()
    layout = layout_of(model, (torch.zeros(2, 3), torch.zeros(2, 3)))
    members = {key: t[None] for key, t in stack([model.state_dict()] * 2).items()}
    with pytest.raises(IncompatibleWeights, match=r"take 2 inputs.*Pass batches="):
        imagine(members, layout, 3, seeded())


def test_inputs_of_unknown_shape_are_not_imagined():
    program = trace(nn.Linear(3, 2), torch.zeros(2, 3))
    grows = dict(program.sizes) | {program.inputs[0]: (-2, -3)}  # an axis that no trace has fixed
    layout = Layout(replace(program, sizes=grows), discover_program(program))
    members = {"weight": torch.randn(1, 2, 2, 3), "bias": torch.randn(1, 2, 2)}
    with pytest.raises(IncompatibleWeights, match=r"of shape \(None,\).*Pass batches="):
        imagine(members, layout, 3, seeded())


@pytest.mark.parametrize("name", ["encoder", "tied"])
def test_tokens_are_not_imagined(wired_network, name):
    wired = wired_network(name)
    with pytest.raises(IncompatibleWeights, match="read by a linear layer or a convolution"):
        imagine(wired.members, wired.layout, 3, seeded())


def test_a_mixture_is_more_than_half_of_one_input_and_the_rest_of_another():
    inputs = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = mixtures(inputs, 500, torch.Generator().manual_seed(0))
    assert found.shape == (500, 3)
    assert torch.allclose(found.sum(1), torch.ones(500))
    assert found.amax(1).min() >= 0.5
    assert found.amax(1).min() < 0.51
    assert (found.amax(1) == 1).float().mean() == pytest.approx(1 / 3, abs=0.07)  # 3 deviations
    assert found.argmax(1).unique().tolist() == [0, 1, 2]
    assert ((found > 0).sum(1) <= 2).all()


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [("vision", 0, 40), ("vision", 30, 40), ("vision", 256, 256), ("encoder", 256, 40)],
)
def test_mixtures_fill_up_inputs_but_tokens(wired_network, name, count, expected):
    wired = wired_network(name)
    found, more = filled_up(wired.inputs, wired.layout, count), wired.inputs[:0]
    if expected > 40:
        more = mixtures(wired.inputs, expected - 40, seeded())
    assert torch.equal(found, torch.cat([wired.inputs, more]))
