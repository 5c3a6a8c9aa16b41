"""One order of members and units, so that rounding errors do not depend on how they came.

Merging is free of any order in exact arithmetic; in floating point, sums in another order differ in
their last digits, and steps of descent let such differences grow. Members and units that are
brought into an order of their own first give the same result to the bit.
"""

import torch
from torch import Tensor

from metamerge.structure import Layout, Permutation
from metamerge.weights import Weights


def in_canonical_order(members: Weights, layout: Layout) -> tuple[Weights, Permutation]:
    """Sort the members of families, and their units, by sums of squares.

    Args:
        members: Aligned members, ``[f, m, ...]``.
        layout: Their architecture.

    Returns:
        The same members in another order, with their units in another order, and the permutation
        of the units, group -> ``[f, n]``, for ``spec.unpermute`` to undo; nested groups stay.
    """
    spec, order = layout.spec, member_order(members)
    rows = torch.arange(len(order), device=order.device)[:, None]
    members = {key: tensor[rows, order] for key, tensor in members.items()}
    perm = {
        group: index.expand(len(order), *index.shape) for group, index in spec.identity().items()
    }
    for group in spec.groups:
        if not spec.outer(group) and not spec.inner(group):
            perm[group] = _unit_sizes(members, layout, group).argsort(-1)
    every = {
        group: index[:, None].expand(-1, order.shape[1], *index.shape[1:])
        for group, index in perm.items()
    }
    return spec.permute(members, every), perm


def member_order(members: Weights) -> Tensor:
    """Members sorted by sums of squares.

    Args:
        members: ``[f, m, ...]``.

    Returns:
        Their numbers, ``[f, m]``.
    """
    floats = [tensor for tensor in members.values() if tensor.is_floating_point()]
    return sum(t.double().square().flatten(2).sum(-1) for t in floats).argsort(-1)


def _unit_sizes(members: Weights, layout: Layout, group: str) -> Tensor:
    """Sum of squares of all that belongs to a unit, over members, ``[f, n]``."""
    spec = layout.spec
    rows = (
        spec.unit_rows(key, axis, group, members[key]).double().square().sum((1, -1))
        for key, axis in spec.touching(group)
        if members[key].is_floating_point()
    )
    return sum(rows)
