"""Transport plans between units, and what they make of the axes of tensors."""

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metamerge.structure.factors import AxisSpec

_ITERATIONS = 1_000_000  # of the network simplex: far more than a few thousand units need
_SINKHORN = {"method": "sinkhorn_log", "numItermax": 1000, "stopThr": 1e-6, "warn": False}


def group_of(axis: AxisSpec) -> str | None:
    """The group that an axis carries, where it has one at most."""
    return next((factor.group for factor in axis if factor.group is not None), None)


def surroundings(axis: AxisSpec) -> tuple[int, int]:
    """Entries before and after the group's factor of an axis: it has ``before * n * after``."""
    place = next(i for i, factor in enumerate(axis) if factor.group is not None)
    return prod(f.size for f in axis[:place]), prod(f.size for f in axis[place + 1 :])


def units_first(tensor: Tensor, axis: int, factors: AxisSpec) -> Tensor:
    """View a tensor as one row per unit, ``[n, rest]``; ``n`` need not be the spec's."""
    before, after = surroundings(factors)
    split = tensor.movedim(axis, -1).unflatten(-1, (before, -1, after))
    return split.movedim(-2, 0).flatten(1)


def carry(tensor: Tensor, axis: int, factors: AxisSpec, matrix: Tensor) -> Tensor:
    """Replace the units along an axis by mixtures of them.

    Args:
        tensor: The tensor.
        axis: Axis that carries ``n`` units.
        factors: What that axis is made of.
        matrix: New units by old ones, ``[n', n]``.

    Returns:
        The tensor with ``n'`` units along the axis.
    """
    before, after = surroundings(factors)
    split = tensor.movedim(axis, -1).unflatten(-1, (before, -1, after))
    mixed = torch.einsum("...bna,in->...bia", split, matrix.to(split))
    return mixed.flatten(-3).movedim(-1, axis)


def plan(cost: Tensor, *, hard: bool, regularisation: float) -> Tensor:
    """The cheapest way to move units onto others, where all units of either side weigh the same.

    Args:
        cost: Of moving one unit onto another, ``[n, n']``, at least 0.
        hard: Whether to solve the problem itself rather than with an entropy.
        regularisation: Weight of the entropy, relative to the mean cost.

    Returns:
        Share of each unit that goes to each other, ``[n, n']``, summing to 1; an exact permutation
        over ``n`` where it is hard and both sides have ``n`` units.
    """
    here, there = cost.shape
    costs = cost.double().cpu().numpy()
    if hard and here == there:  # a corner of the polytope is a permutation, found exactly here
        moved = np.zeros_like(costs)
        moved[linear_sum_assignment(costs)] = 1 / here
        return torch.from_numpy(moved)
    import ot  # takes a second

    marginals = np.full(here, 1 / here), np.full(there, 1 / there)
    if hard:
        return torch.from_numpy(ot.emd(*marginals, costs, numItermax=_ITERATIONS))
    scaled = costs / max(costs.mean(), np.finfo(float).tiny)
    return torch.from_numpy(ot.sinkhorn(*marginals, scaled, regularisation, **_SINKHORN))


def transported(
    tensor: Tensor,
    axes: tuple[AxisSpec, ...],
    plans: Mapping[str, Tensor],
    *,
    reading: bool,
    keep: int | None = None,
) -> Tensor:
    """Move one tensor's units by the plans of their groups.

    What makes units is averaged over the units that come together in one place; what reads them is
    shared out, as much as of the unit goes there.

    Args:
        tensor: The tensor.
        axes: What its axes are made of.
        plans: Group -> ``[n, n']``; other groups stay in place.
        reading: Whether axis 1 is that of the columns of a layer, which read units.
        keep: An axis that is left as it is.

    Returns:
        The tensor at the widths of the target, in the dtype that it was given in.
    """
    computing = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    for axis, factors in enumerate(axes):
        moved = plans.get(group_of(factors))
        if moved is not None and axis != keep:
            whole = moved.sum(1 if reading and axis == 1 else 0, keepdim=True)
            computing = carry(computing, axis, factors, (moved / whole).T)
    return computing.to(tensor.dtype)
