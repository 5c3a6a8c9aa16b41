"""Refit and repair of networks with attention, tokens, concatenations and shared weights."""

import pytest
import torch

from metamerge.corrections.refit import observe, refit
from metamerge.corrections.repair import repair
from metamerge.corrections.rescale import rescale
from metamerge.corrections.scale import scale
from metamerge.structure import OUTPUTS, Layout, run


def exact(wired):
    """Members, layout and inputs in float64."""
    layout = Layout(wired.layout.program.in_float64(), wired.layout.spec)
    members = {k: t.double() if t.is_floating_point() else t for k, t in wired.members.items()}
    inputs = wired.inputs
    return members, layout, inputs.double() if inputs.is_floating_point() else inputs


def averaged(members):
    return {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in members.items()}


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in other)


def test_identical_members_are_a_fixed_point(wired):
    members, layout, inputs = exact(wired)
    copies = {key: t[:, :1].expand(-1, 3, *t.shape[2:]) for key, t in members.items()}
    for correction in (refit, repair, rescale):
        corrected = correction(averaged(copies), copies, layout, inputs)
        assert furthest(corrected, averaged(copies)) < 1e-10


def test_refit_moves_no_outputs_away_from_what_members_compute_together(wired):
    members, layout, inputs = exact(wired)
    flat = {key: t.flatten(0, 1) for key, t in members.items()}
    told = run(layout.program, flat, [inputs], stacked=True).unflatten(0, (2, 3)).mean(1)

    def miss(weights):
        outputs = run(layout.program, weights, [inputs], stacked=True)
        return (outputs - told).flatten(1).norm(dim=1)

    fitted = refit(averaged(members), members, layout, inputs)
    if layout.unshared:
        assert (miss(fitted) < miss(averaged(members))).all()
    else:
        assert furthest(fitted, averaged(members)) == 0


def test_only_layers_that_share_nothing_are_touched(wired):
    members, layout, inputs = exact(wired)
    own = {key for layer in layout.unshared for key in (layer.weight, layer.bias)}
    own |= set(layout.running_means.values())
    fused = averaged(members)
    refitted, repaired = (f(fused, members, layout, inputs) for f in (refit, repair))
    for key, before in fused.items():
        assert torch.equal(refitted[key], before) == (key not in own), key
        if key not in own:
            assert torch.equal(repaired[key], before), key


@pytest.mark.parametrize("name", ["encoder", "tied"])
def test_scaling_a_network_of_tokens_scales_layers_that_share_nothing(wired_network, name):
    wired, report = wired_network(name), {}
    fused = averaged(wired.members)
    scaled = scale(fused, wired.members, wired.layout, wired.inputs, report=report)
    assert list(report["scales"]) == [layer.weight for layer in wired.layout.unshared]
    for key in ("embed.weight", *report["scales"]):
        factor = torch.tensor(report["scales"].get(key, [1.0, 1.0]))
        assert torch.allclose(scaled[key], fused[key] * factor[:, None, None]), key


def test_repair_restores_the_statistics_of_every_unit_of_packed_and_joined_layers(wired):
    members, layout, inputs = exact(wired)
    repaired = repair(averaged(members), members, layout, inputs)
    wanted = observe(members, layout, inputs)
    found = observe({key: t[:, None] for key, t in repaired.items()}, layout, inputs)
    for layer in layout.unshared:
        if layer.target == OUTPUTS:
            continue
        each, own = wanted[layer.node], found[layer.node][:, 0]  # [f, m, r, o], [f, r, o]
        spread = each.std(2, correction=0).mean(1)
        assert torch.allclose(own.std(1, correction=0), spread, rtol=1e-6), layer.weight
        if layer.bias:
            assert torch.allclose(own.mean(1), each.mean((1, 2)), atol=1e-9), layer.weight


def test_hidden_permutations_of_the_aligned_members_are_those_of_the_refitted_network(wired):
    members, layout, inputs = exact(wired)
    spec = layout.spec
    perm = spec.random(torch.Generator().manual_seed(0), (2,))
    everyone = {g: p[:, None].expand(-1, 3, *p.shape[1:]) for g, p in perm.items()}
    moved = spec.permute(members, everyone)
    fitted = refit(averaged(members), members, layout, inputs)
    found = refit(averaged(moved), moved, layout, inputs)
    assert furthest(found, spec.permute(fitted, perm)) < 1e-8
