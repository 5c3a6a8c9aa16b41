"""Weight matching: by hand, and what must not change its result."""

from importlib import import_module

import pytest
import torch
from torch import nn

from metamerge.alignment import matching_cost, medoid, weight_matching
from metamerge.registry import get_alignment
from metamerge.structure import Factor, PermutationSpec, discover_program, trace

DRAWS = 20


def test_two_units_by_hand():
    # Member 1 stores units 5 and 1 in the other order. Squares about the mean: (1 - 1.5)**2 twice
    # and (5 - 5)**2, over 1 + 25 + 25 + 4; unaligned 2 * (2**2 + 1.5**2).
    spec = PermutationSpec({"g": 2}, {"w": ((Factor("g", 2),),)}, {})
    members = {"w": torch.tensor([[[1.0, 5.0], [5.0, 2.0]]])}
    perm = weight_matching(members, spec)
    aligned = spec.permute(members, perm)["w"]
    assert aligned.tolist() in ([[[1.0, 5.0], [2.0, 5.0]]], [[[5.0, 1.0], [5.0, 2.0]]])
    assert float(matching_cost(members, spec, perm)) == pytest.approx(0.5 / 55)
    unaligned = matching_cost(members, spec, spec.identity())
    assert float(unaligned) == pytest.approx(2 * (2**2 + 1.5**2) / 55)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_independent_members_come_closer_than_they_were(network, objective, count):
    members = network.draw(DRAWS, count)
    found = objective(members, network.spec, weight_matching(members, network.spec))
    before = objective(members, network.spec, network.spec.identity())
    assert (found < before).all()


@pytest.mark.parametrize("count", [2, 4])
def test_neither_the_order_of_members_nor_that_of_their_units_changes_the_merged_function(
    network, count
):
    members, inputs = network.draw(DRAWS, count), network.inputs()
    generator = torch.Generator().manual_seed(1)
    expected = network.fused(members, inputs)
    size = (expected - expected.mean(1, keepdim=True)).flatten(1).norm(dim=1)

    def differences(other):
        return (network.fused(other, inputs) - expected).flatten(1).norm(dim=1) / size

    order = torch.randperm(count, generator=generator)
    assert differences({key: t[:, order] for key, t in members.items()}).max() < 1e-4
    perm = network.spec.random(generator, (DRAWS, count))
    assert differences(network.spec.permute(members, perm)).max() < 1e-4
    # That would not hold of any alignment: it fails for the plain average.
    plain = network.fused(network.spec.permute(members, perm), inputs, network.spec.identity())
    unaligned = network.fused(members, inputs, network.spec.identity())
    assert ((plain - unaligned).flatten(1).norm(dim=1) / size).min() > 1e-2


def test_families_are_matched_independently_of_each_other(network):
    members = network.draw(4, 3)
    together = weight_matching(members, network.spec)
    for f in range(4):
        alone = weight_matching({key: t[f : f + 1] for key, t in members.items()}, network.spec)
        for group in network.spec.groups:
            assert torch.equal(together[group][f], alone[group][0])


def test_families_may_be_matched_in_any_number_at_a_time(network, monkeypatch):
    members = network.draw(5, 4)
    together = weight_matching(members, network.spec)
    monkeypatch.setattr(import_module("metamerge.alignment.weight_matching"), "_CACHED", 1)
    one_by_one = weight_matching(members, network.spec)
    assert all(torch.equal(together[group], one_by_one[group]) for group in together)


def test_the_order_of_classes_changes_nothing(perceptron):
    members = perceptron.draw(DRAWS, 5)
    classes = torch.tensor([2, 0, 1])
    renamed = {
        **members,
        "6.weight": members["6.weight"][:, :, classes],
        "6.bias": members["6.bias"][:, :, classes],
    }
    assert torch.equal(medoid(renamed, perceptron.spec), medoid(members, perceptron.spec))
    found, expected = (weight_matching(w, perceptron.spec) for w in (renamed, members))
    assert all(torch.equal(found[group], expected[group]) for group in expected)


def test_one_member_stays_as_it_is(network):
    members = network.draw(2, 1)
    perm = weight_matching(members, network.spec)
    for group, n in network.spec.groups.items():
        assert torch.equal(perm[group], torch.arange(n).expand(2, 1, n))
    assert torch.equal(matching_cost(members, network.spec, perm), torch.zeros(2).double())


def test_identical_members_stay_aligned(network):
    members = {key: t.expand(1, 3, *t.shape[2:]) for key, t in network.draw(1, 1).items()}
    perm = weight_matching(members, network.spec)
    for index in perm.values():
        assert torch.equal(index, index[:, :1].expand_as(index))


def test_every_index_is_a_permutation_with_an_axis_of_families_and_members(network):
    perm = weight_matching(network.draw(2, 3), network.spec)
    assert list(perm) == list(network.spec.groups)
    for group, n in network.spec.groups.items():
        assert perm[group].shape == (2, 3, n)
        assert torch.equal(perm[group].sort(-1).values, torch.arange(n).expand(2, 3, n))


def test_members_stay_as_they_are(network):
    members = network.draw(2, 3)
    before = {key: tensor.clone() for key, tensor in members.items()}
    perm = weight_matching(members, network.spec)
    matching_cost(members, network.spec, perm)
    medoid(members, network.spec)
    assert all(torch.equal(members[key], before[key]) for key in before)


def test_the_result_does_not_hang_on_the_global_seed(network):
    members = network.draw(2, 3)
    torch.manual_seed(0)
    first = weight_matching(members, network.spec)
    torch.manual_seed(1)
    second = weight_matching(members, network.spec)
    assert all(torch.equal(first[group], second[group]) for group in first)


def test_a_network_without_groups_has_nothing_to_permute():
    spec = discover_program(trace(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3)))
    members = {"0.weight": torch.randn(2, 3, 2, 3), "0.bias": torch.randn(2, 3, 2)}
    assert weight_matching(members, spec) == {}


def test_the_alignment_is_found_by_its_name():
    assert get_alignment("weight_matching").function is weight_matching
