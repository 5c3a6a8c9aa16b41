"""The graph-network merger on networks with attention, tokens, concatenations, shared weights."""

import pytest
import torch

from metamerge.alignment import weight_matching
from metamerge.mergers import GNNConfig, GNNMerger
from metamerge.structure import Layout, run


def make(wired, noise, grad=False):
    shape = tuple(wired.inputs.shape[1:])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        merger = GNNMerger(GNNConfig(shapes=(shape,), probes=24, width=12))
        for parameter in merger.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return merger.requires_grad_(grad)


def probes(wired):
    """Tokens cannot be learned: calibration inputs stand in for them."""
    return None if wired.inputs.is_floating_point() else wired.inputs[:24]


def align(wired, members):
    spec = wired.layout.spec
    return spec.permute(members, weight_matching(members, spec))


def outputs(wired, fused):
    return run(wired.layout.program, fused, [wired.inputs], stacked=True)


def gap(found, expected):
    distance = (found - expected).flatten(1).norm(dim=1)
    return float((distance / expected.flatten(1).norm(dim=1)).max())


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[k].double() - expected[k].double()).abs().max()) for k in expected)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_permuted_copies_of_one_network_give_that_network(wired, noise):
    spec = wired.layout.spec
    single = {key: t[:, 0] for key, t in wired.members.items()}
    copies = {key: t[:, :1].expand(-1, 3, *t.shape[2:]) for key, t in wired.members.items()}
    copies = spec.permute(copies, spec.random(torch.Generator().manual_seed(1), (2, 3)))
    fused = make(wired, noise)(align(wired, copies), wired.layout, inputs=probes(wired)).weights
    assert gap(outputs(wired, fused), outputs(wired, single)) < 1e-4


def test_a_fresh_merger_is_the_average_of_the_aligned_members(wired):
    members = align(wired, wired.members)
    fused = make(wired, 0.0)(members, wired.layout, inputs=probes(wired)).weights
    mean = {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in members.items()}
    assert furthest(fused, mean) < 1e-6


def exact(wired):
    """Members and layout in float64, where nothing but rounding is far below any effect."""
    layout = Layout(wired.layout.program.in_float64(), wired.layout.spec)
    members = {k: t.double() if t.is_floating_point() else t for k, t in wired.members.items()}
    return members, layout


def test_hidden_permutations_of_all_members_change_nothing(wired):
    merger, spec = make(wired, 0.1).double(), wired.layout.spec
    raw, layout = exact(wired)
    members = align(wired, raw)
    fused = merger(members, layout, inputs=probes(wired)).weights
    perm = spec.random(torch.Generator().manual_seed(2), (2,))
    everyone = {g: p[:, None].expand(-1, 3, *p.shape[1:]) for g, p in perm.items()}
    moved = merger(spec.permute(members, everyone), layout, inputs=probes(wired)).weights
    assert furthest(moved, spec.permute(fused, perm)) < 1e-8

    shown = wired.inputs.double() if wired.inputs.is_floating_point() else wired.inputs

    def said(weights):
        return run(layout.program, weights, [shown], stacked=True)

    assert gap(said(moved), said(fused)) < 1e-8
    each = spec.permute(raw, spec.random(torch.Generator().manual_seed(3), (2, 3)))
    again = merger(align(wired, each), layout, inputs=probes(wired)).weights
    assert gap(said(again), said(fused)) < 1e-8


def test_the_sparse_path_equals_the_dense_path(wired):
    merger, (members, layout) = make(wired, 0.1).double(), exact(wired)
    dense = merger(members, layout, inputs=probes(wired)).weights
    assert (
        furthest(merger(members, layout, inputs=probes(wired), sparse=True).weights, dense) < 1e-5
    )


def test_gradients_reach_every_parameter_that_has_a_say(wired):
    merger = make(wired, 0.1, grad=True)
    fused = merger(wired.members, wired.layout, inputs=probes(wired)).weights
    outputs(wired, fused).square().mean().backward()
    without = {"prior"}  # no first layer reads whole images
    if probes(wired) is not None:
        without |= {"probes"}
    if not wired.layout.unshared:  # nothing to be fitted or changed
        without |= {"strength", "log_ridge", "gain", "gate"}
    for name, parameter in merger.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        if name == "mix.bias":
            continue  # a softmax over members does not see what is added to all of them alike
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached != (name.split(".")[0] in without), name
