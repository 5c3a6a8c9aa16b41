"""Members are matched to the sum of the others, sweep by sweep."""

from itertools import pairwise

import pytest
import torch

from metamerge.alignment import weight_matching
from metamerge.alignment.barycentre import to_each_other
from metamerge.alignment.plan import Plan
from metamerge.alignment.weight_matching import _member
from metamerge.structure import Factor, PermutationSpec


def one_pass(weights, spec, perm):
    """Permutations after one pass of the second stage, over all members and groups."""
    aligned = {key: tensor.double() for key, tensor in spec.permute(weights, perm).items()}
    aligned = {key: aligned[key] for key in spec.axes}
    families, count = next(iter(aligned.values())).shape[:2]
    plan, rows = Plan(spec, tuple(spec.groups)), torch.arange(families)
    members = [_member(aligned, plan, rows, torch.full((families,), k)) for k in range(count)]
    to_each_other(members, plan, 1)
    return {
        g: perm[g].gather(-1, torch.stack([member.index[g] for member in members], 1)) for g in perm
    }


def test_no_sweep_raises_the_objective(network, objective):
    members = network.draw(1, 5, dtype=torch.float64)
    perm = network.spec.random(torch.Generator().manual_seed(0), (1, 5))
    costs = [float(objective(members, network.spec, perm))]
    for _ in range(12):
        perm = one_pass(members, network.spec, perm)
        costs.append(float(objective(members, network.spec, perm)))
    rounding = 1e-12 * costs[0]
    assert all(after <= before + rounding for before, after in pairwise(costs))
    assert costs[1] < 0.99 * costs[0]
    assert costs[-1] == costs[-2]


@pytest.mark.parametrize("seed", range(5))
def test_no_sweep_raises_the_objective_of_a_group_on_both_axes_of_a_matrix(objective, seed):
    # There a step is no exact minimum: it takes the other axis to stay as it was.
    spec = PermutationSpec({"g": 3}, {"w": ((Factor("g", 3),), (Factor("g", 3),))}, {})
    generator = torch.Generator().manual_seed(seed)
    members = {"w": torch.randn(1, 3, 3, 3, generator=generator, dtype=torch.float64)}
    perm = spec.random(generator, (1, 3))
    costs = [float(objective(members, spec, perm))]
    for _ in range(6):
        perm = one_pass(members, spec, perm)
        costs.append(float(objective(members, spec, perm)))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(costs))


def test_at_rest_no_member_can_come_closer_to_the_rest(network):
    members = network.draw(2, 4)
    perm = weight_matching(members, network.spec)
    exact = {key: members[key].double() for key in network.spec.axes}
    longer = weight_matching(members, network.spec, sweeps=60)
    for f in range(2):
        own = {group: index[f : f + 1] for group, index in perm.items()}
        again = one_pass({k: t[f : f + 1] for k, t in exact.items()}, network.spec, own)
        for group in network.spec.groups:
            assert torch.equal(again[group], own[group])
            assert torch.equal(longer[group], perm[group])


@pytest.mark.parametrize("seed", range(8))
def test_groups_taken_singly_do_not_hold_each_other_up(seed):
    both = PermutationSpec({"g": 4}, {"w": ((Factor("g", 4),), (Factor("g", 4),))}, {})
    free = PermutationSpec({"h": 4}, {"v": ((Factor("h", 4),),)}, {})
    spec = PermutationSpec({**both.groups, **free.groups}, {**both.axes, **free.axes}, {})
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": (2, 4, 4, 4), "v": (2, 4, 4)}  # [f, m, ...]
    weights = {k: torch.randn(s, generator=generator).double() for k, s in weights.items()}
    rows, found = torch.arange(2), []
    for own in (spec, both, free):
        plan = Plan(own, tuple(own.groups))
        given = {key: weights[key] for key in own.axes}
        members = [_member(given, plan, rows, torch.full((2,), k)) for k in range(4)]
        to_each_other(members, plan, 30, singly=True)
        found.append({g: torch.stack([m.index[g] for m in members], 1) for g in own.groups})
    together, alone = found[0], {**found[1], **found[2]}
    assert all(torch.equal(together[group], alone[group]) for group in spec.groups)
