"""The parts of the graph-network merger, one at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.mergers import consensus
from metamerge.mergers.gate import answers_of
from metamerge.mergers.gnn import correlate
from metamerge.structure import Layout, discover_program, run, trace
from metamerge.weights import stack


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def average(members):
    return {key: tensor.mean(1) for key, tensor in members.items()}


# ---------------------------------------------------------------------------- mixing


def only_mixing(make_merger):
    """A merger that does nothing but mix: no prior, no refit."""
    merger = make_merger(0.3, prior=0)
    with torch.no_grad():
        merger.strength.zero_()
    return merger


def test_mixing_stays_between_the_members(case, make_merger):
    fused = only_mixing(make_merger)(case.members, case.layout).weights
    for key, tensor in case.members.items():
        low, high = tensor.aminmax(dim=1)
        assert (fused[key] >= low - 1e-6).all(), key
        assert (fused[key] <= high + 1e-6).all(), key
    assert furthest(fused, average(case.members)) > 1e-2


def test_every_unit_has_one_coefficient_per_member_and_they_sum_to_one(case, make_merger):
    first, second = ({key: t[:, i] for key, t in case.members.items()} for i in (0, 1))
    pairs = {key: t[:, :2] for key, t in case.members.items()}
    fused = only_mixing(make_merger)(pairs, case.layout).weights
    found = set()
    for layer in case.layout.layers:
        difference = (first[layer.weight] - second[layer.weight]).flatten(2)
        moved = (fused[layer.weight] - second[layer.weight]).flatten(2)
        share = (moved * difference).sum(-1) / difference.square().sum(-1)  # [f, units]
        assert (share >= 0).all()
        assert (share <= 1).all()
        # The same share carries the whole row and its bias: nothing is left over.
        assert torch.allclose(moved, share[..., None] * difference, atol=1e-6)
        expected = second[layer.bias] + share * (first[layer.bias] - second[layer.bias])
        assert torch.allclose(fused[layer.bias], expected, atol=1e-5)
        found |= {round(float(s), 3) for s in share.flatten()}
    assert len(found) > 10  # units, layers and families have coefficients of their own


def test_integer_tensors_are_those_of_the_first_member(make_merger):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = trace(model, torch.zeros(2, 3))
    layout = Layout(program, discover_program(program))
    members = {key: t[None] for key, t in stack([model.state_dict()] * 2).items()}
    members["1.num_batches_tracked"] = torch.tensor([[7, 9]])
    fused = make_merger(shapes=((3,),))(members, layout).weights
    assert fused["1.num_batches_tracked"].tolist() == [7]
    assert torch.equal(fused["1.running_var"], members["1.running_var"][:, 0])


# ---------------------------------------------------------------------------- input prior


def test_the_input_prior_looks_at_first_layers_that_read_whole_images(case, make_merger):
    merger = make_merger()
    without = copy.deepcopy(merger)
    with torch.no_grad():
        without.prior.zero_()
    fused, plain = (made(case.members, case.layout).weights for made in (merger, without))
    changed = furthest(fused, plain)
    linear = case.layout.layers[0].linear
    assert changed > 1e-3 if linear else changed == 0


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (3, 4)])
def test_a_correlation_is_a_convolution_layer_of_one_channel(size, shape):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(size, size, generator=generator, dtype=torch.float64, requires_grad=True)
    found = correlate(maps, kernel)
    expected = F.conv2d(maps[:, None], kernel[None, None], padding=size // 2)[:, 0]
    assert torch.allclose(found, expected, atol=1e-12)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    own, others = (
        torch.autograd.grad((made * weight).sum(), (maps, kernel)) for made in (found, expected)
    )
    for gradient, other in zip(own, others, strict=True):
        assert torch.allclose(gradient, other, atol=1e-12)


def test_a_correlation_by_hand():
    kernel = torch.zeros(3, 3)
    kernel[0, 1] = 2.0  # twice the pixel above
    found = correlate(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), kernel)
    assert found.tolist() == [[[0.0, 0.0], [2.0, 4.0]]]


# ---------------------------------------------------------------------------- refit


def test_the_output_layer_is_fitted_to_the_consensus(mlp_case, make_merger):
    merger = make_merger(0.3, prior=0).double()
    with torch.no_grad():
        merger.strength.copy_(torch.tensor([0.0, 1.0]))
        merger.log_ridge.fill_(-3.0)
        merger.mix.weight.zero_()  # equal shares
    layout = Layout(mlp_case.layout.program.in_float64(), mlp_case.layout.spec)
    members = {key: t.double() for key, t in mlp_case.members.items()}
    fused, trust = merger(members, layout)
    probes, first = merger.probes.for_members(members, layout), layout.layers[0]
    wanted = consensus(trust, answers_of(members, layout, probes))  # [f, p, c]
    mean = average(members)
    hidden = (probes.flatten(1) @ mean[first.weight].mT + mean[first.bias][:, None]).relu()
    current = run(layout.program, mean, [probes], stacked=True)
    found = run(layout.program, fused, [probes], stacked=True)
    for family in range(2):  # least squares with a row more for every column: what ridge is
        columns = hidden[family] - hidden[family].mean(0)
        miss = wanted[family] - current[family]
        penalty = columns.square().sum() / columns.shape[1] * merger.log_ridge.exp() + 1e-8
        pull = penalty.sqrt() * torch.eye(columns.shape[1], dtype=torch.float64)
        asked = torch.cat([miss - miss.mean(0), torch.zeros(len(pull), 5, dtype=torch.float64)])
        change = torch.linalg.lstsq(torch.cat([columns, pull]), asked).solution
        expected = current[family] + columns @ change + miss.mean(0)
        assert torch.allclose(found[family], expected, atol=1e-8)
        assert not torch.allclose(found[family], current[family], atol=0.1)


# ---------------------------------------------------------------------------- switches


def test_parts_that_are_switched_off_have_no_parameters(make_merger):
    names = {name.split(".")[0] for name, _ in make_merger().named_parameters()}
    bare = make_merger(gate=False, prior=0)
    left = {name.split(".")[0] for name, _ in bare.named_parameters()}
    assert names - left == {"gate", "prior"}


def test_a_merger_without_its_optional_parts_still_merges(case, make_merger):
    bare = make_merger(gate=False, prior=0, rounds=0)
    members = case.members
    fused, trust = bare(members, case.layout)
    assert run(case.layout.program, fused, [case.inputs], stacked=True).isfinite().all()
    assert furthest(fused, average(members)) > 1e-2
    assert torch.equal(trust, torch.zeros(2, 4, 5, 5))  # of members and classes: all alike
