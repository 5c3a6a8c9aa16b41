"""A canonical order of members and units: the same whatever order they came in, and undone."""

import torch

from metamerge.mergers.ordering import in_canonical_order


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(found, expected):
    return all(torch.equal(found[key], expected[key]) for key in expected)


def test_members_and_units_in_another_order_come_into_the_same_one(case):
    spec, (families, count) = case.layout.spec, next(iter(case.members.values())).shape[:2]
    expected, _ = in_canonical_order(case.members, case.layout)
    order = torch.randperm(count, generator=seeded())
    perm = spec.random(seeded(1), (families,))  # one for all members of a family
    every = {g: p[:, None].expand(-1, count, *p.shape[1:]) for g, p in perm.items()}
    turned = spec.permute({key: t[:, order] for key, t in case.members.items()}, every)
    assert not same(turned, case.members)
    found, _ = in_canonical_order(turned, case.layout)
    assert same(found, expected)


def test_the_permutation_of_the_units_can_be_undone(case):
    ordered, perm = in_canonical_order(case.members, case.layout)
    assert not same(ordered, case.members)
    mean = {key: t.double().mean(1) for key, t in ordered.items()}
    plain = {key: t.double().mean(1) for key, t in case.members.items()}
    back = case.layout.spec.unpermute(mean, perm)
    assert all(torch.allclose(back[key], plain[key], atol=1e-14) for key in plain)


def test_units_are_sorted_by_size(mlp_case):
    ordered, _ = in_canonical_order(mlp_case.members, mlp_case.layout)
    first, second = (layer.weight for layer in mlp_case.layout.layers)
    bias = mlp_case.layout.layers[0].bias
    incoming = ordered[first].double().square().sum((1, 3))
    outgoing = ordered[second].double().square().sum((1, 2))
    size = incoming + outgoing
    size = size + ordered[bias].double().square().sum(1)
    assert (size.diff(dim=1) >= 0).all()
