"""How far members are from each other, aligned, and whatever the order of their units."""

import torch

from metamerge.alignment import matching_cost, medoid

DRAWS = 20


def test_the_cost_is_the_objective_over_the_squared_norm(network, objective):
    members = network.draw(2, 3)
    perm = network.spec.random(torch.Generator().manual_seed(0), (2, 3))
    size = sum(members[key].double().square().flatten(1).sum(1) for key in network.spec.axes)
    expected = objective(members, network.spec, perm) / size
    assert torch.allclose(matching_cost(members, network.spec, perm), expected, rtol=1e-10)


def test_the_medoid_is_the_same_member_in_any_order_of_members_and_units(network):
    members = network.draw(DRAWS, 5)
    generator = torch.Generator().manual_seed(1)
    expected = medoid(members, network.spec)
    perm = network.spec.random(generator, (DRAWS, 5))
    assert torch.equal(medoid(network.spec.permute(members, perm), network.spec), expected)
    order = torch.randperm(5, generator=generator)
    moved = medoid({key: t[:, order] for key, t in members.items()}, network.spec)
    assert torch.equal(order[moved], expected)
    assert len(expected.unique()) > 1  # not always the first


def test_the_medoid_is_the_member_between_the_others(perceptron):
    # Members 0, 1 and 4 times apart along a line: the second is nearest to all.
    one, step = perceptron.draw(1, 1, seed=0), perceptron.draw(1, 1, seed=1)
    members = {
        key: torch.cat([one[key] + 0.02 * far * step[key] for far in (0.0, 1.0, 4.0)], 1)
        for key in one
    }
    perm = perceptron.spec.random(torch.Generator().manual_seed(0), (1, 3))
    assert medoid(perceptron.spec.permute(members, perm), perceptron.spec).tolist() == [1]
