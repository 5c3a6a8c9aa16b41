"""Weight matching beside what it should find: given permutations, all of them, a slow descent."""

from importlib import import_module
from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from metamerge.alignment import matching_cost, weight_matching
from metamerge.alignment.medoid import distances
from metamerge.alignment.plan import Plan
from metamerge.structure import discover_program, trace

NOISE = 0.05  # of the standard deviation of a weight


def permuted_copies(network, count, noise, seed):
    """Noisy copies of one network with hidden units in random order, and how they were permuted."""
    generator = torch.Generator().manual_seed(seed)
    origin = network.draw(1, 1, seed=seed)
    copies = {
        key: t + noise * torch.randn(1, count, *t.shape[2:], generator=generator)
        for key, t in origin.items()
    }
    perm = network.spec.random(generator, (1, count))
    return network.spec.permute(copies, perm), perm


def drawn_perceptron(count, seed):
    """Spec of a perceptron 3-4-2, and members drawn at random."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(seed)
    members = {
        key: torch.randn(1, count, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    return discover_program(trace(model, torch.zeros(2, 3))), members


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_permuted_noisy_copies_are_matched_back_exactly(network, objective, count, seed):
    members, given = permuted_copies(network, count, NOISE, seed)
    found = weight_matching(members, network.spec)
    for group in network.spec.groups:
        # What was given and what was found, one after the other, is the same for all members.
        whole = given[group].gather(-1, found[group])
        assert torch.equal(whole, whole[:, :1].expand_as(whole)), group
    # Copies differ by noise of variance NOISE**2; about its mean 1 - 1/count of that is left.
    left = objective(members, network.spec, found) / sum(
        members[key].numel() for key in network.spec.axes
    )
    assert float(left) == pytest.approx(NOISE**2 * (1 - 1 / count), rel=0.25)


def test_exact_copies_are_aligned_without_a_remainder(network):
    members, _ = permuted_copies(network, 4, 0.0, seed=0)
    found = weight_matching(members, network.spec)
    assert float(matching_cost(members, network.spec, network.spec.identity())) > 0.3
    assert float(matching_cost(members, network.spec, found)) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_two_members_with_one_hidden_layer_reach_the_best_of_all_permutations(objective, seed):
    spec, members = drawn_perceptron(2, seed)
    best = min(
        float(objective(members, spec, {"0": torch.tensor([[[0, 1, 2, 3], order]])}))
        for order in permutations(range(4))
    )
    found = float(objective(members, spec, weight_matching(members, spec)))
    assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_single_member_of_four_can_be_permuted_any_better(objective, seed):
    spec, members = drawn_perceptron(4, seed)
    perm = weight_matching(members, spec)["0"]
    found = float(objective(members, spec, {"0": perm}))
    for k in range(4):
        for order in permutations(range(4)):
            other = perm.clone()
            other[0, k] = torch.tensor(order)
            assert float(objective(members, spec, {"0": other})) >= found * (1 - 1e-12)


def plain_weight_matching(weights, spec, order, sweeps=30):
    """The descent, slowly: whole tensors permuted, all products made anew, scipy for all groups.

    For groups that are not nested and do not meet themselves on a tensor; one family.
    """
    perms = [{g: torch.arange(n) for g, n in spec.groups.items()} for _ in order]
    ranked = [{key: weights[key][0, k].double() for key in spec.axes} for k in order]

    def assigned(k, target, group, keys):
        others = {g: index for g, index in perms[k].items() if g != group}
        gain = torch.zeros(spec.groups[group], spec.groups[group], dtype=torch.float64)
        for key, axis in spec.touching(group):
            if key in keys:
                placed = spec.permute_tensor(key, ranked[k][key], others)
                wanted = spec.unit_rows(key, axis, group, target[key])
                gain += wanted @ spec.unit_rows(key, axis, group, placed).T
        return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])

    def matched(k, target):
        before = dict(perms[k])
        for group in spec.groups:
            perms[k][group] = assigned(k, target, group, spec.axes)
        return any(not torch.equal(before[g], perms[k][g]) for g in before)

    sizes = {key: tensor.numel() for key, tensor in ranked[0].items()}
    for group, keys in Plan(spec, tuple(spec.groups)).first(sizes):
        for k in range(1, len(order)):
            perms[k][group] = assigned(k, ranked[0], group, keys)
    for k in range(1, len(order)):
        any(not matched(k, ranked[0]) for _ in range(sweeps))
    for _ in range(sweeps):
        moved = False
        for k in range(len(order)):
            aligned = [spec.permute(own, perm) for own, perm in zip(ranked, perms, strict=True)]
            rest = {key: sum(a[key] for j, a in enumerate(aligned) if j != k) for key in aligned[k]}
            moved |= matched(k, rest)
        if not moved:
            break
    return perms


@pytest.mark.parametrize(("widths", "count"), [((80, 70), 2), ((70, 66), 4), ((12, 9, 7), 6)])
def test_the_descent_is_that_of_plain_assignments_on_whole_tensors(widths, count):
    layers, before = [], 20
    for width in widths:
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    model = nn.Sequential(*layers, nn.Linear(before, 4))
    spec = discover_program(trace(model, torch.zeros(2, 20)))
    generator = torch.Generator().manual_seed(0)
    members = {
        key: torch.randn(1, count, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    order = distances(members, spec).argsort(-1)[0].tolist()
    expected = plain_weight_matching(members, spec, order)
    found = weight_matching(members, spec)
    for rank, k in enumerate(order):
        for group in spec.groups:
            assert torch.equal(found[group][0, k], expected[rank][group])


def test_members_too_large_for_float64_are_matched_alike(network, monkeypatch):
    members = network.draw(2, 4)
    expected = weight_matching(members, network.spec)
    monkeypatch.setattr(import_module("metamerge.alignment.weight_matching"), "_EXACT", 0)
    monkeypatch.setattr(import_module("metamerge.alignment.descent"), "_PIECE", 64)
    found = weight_matching(members, network.spec)
    assert all(torch.equal(found[group], expected[group]) for group in expected)
