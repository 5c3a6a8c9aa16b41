"""Matching members to each other: one after the other is matched to the sum of the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.alignment.descent import Member, follow, inner, squares, sweep
from metamerge.alignment.plan import Plan
from metamerge.weights import Weights

_ROUNDING = 1e-12  # relative: what inner products of equally good permutations may differ by


def to_each_other(
    members: list[Member], plan: Plan, sweeps: int, *, singly: bool = False
) -> list[Tensor]:
    """Match the members of every family to each other, until none comes any closer.

    One after the other is matched to the sum of the rest. Leaving it out of the sum matters:
    independent members are nearly orthogonal, so that in a sum with itself a member is matched to
    itself, wherever it is.

    Args:
        members: The members of all families, moved in place.
        plan: The order of the work.
        sweeps: Upper bound on passes over all members.
        singly: Whether a move of one group is taken or refused by itself, and not with those of
            the member's other groups: a group on two axes of a tensor cannot hold up the others.

    Returns:
        Matching cost ``[f]`` after each pass.
    """
    steps = [(group,) for group in plan.groups] if singly else [plan.groups]
    total = {key: sum(m.tensors[key].double() for m in members) for key in members[0].tensors}
    costs: list[Tensor] = []
    while len(costs) < sweeps:
        moved = torch.zeros_like(members[0].norm, dtype=torch.bool)
        for k in range(len(members)):
            for step in steps:
                moved |= _one_closer(members, k, total, plan, step)
        costs.append(cost_of(members, total))
        if not moved.any():
            break
        if 2 * int(moved.sum()) <= len(moved):  # the other families are at rest
            left = sweeps - len(costs)
            return costs + _of_some(members, moved, plan, left, costs[-1], singly)
    return costs


def _of_some(
    members: list[Member], some: Tensor, plan: Plan, sweeps: int, cost: Tensor, singly: bool
) -> list[Tensor]:
    """``to_each_other`` for some of the families."""
    taken = [member.of(some) for member in members]
    costs = to_each_other(taken, plan, sweeps, singly=singly)
    for member, own in zip(members, taken, strict=True):
        for group, index in own.index.items():
            member.index[group] = member.index[group].clone()
            member.index[group][some] = index
    return [cost.masked_scatter(some, own) for own in costs]


def _one_closer(
    members: list[Member], k: int, total: Weights, plan: Plan, some: Sequence[str]
) -> Tensor:
    """Match groups of one member to the sum of the others where that brings it closer, ``[f]``."""
    member, here = members[k], members[k].tensors
    trial, rest = member.copy(), _Rest(total, here)
    groups = sweep(trial, rest, plan, some)
    keys = dict.fromkeys(key for group in groups for key in plan.keys[group])
    change = {key: trial.tensors[key].double() - here[key] for key in keys}
    # no gain is possible where a group has two axes of a tensor, or two ways are as good
    gain = sum((inner(added, rest[key]) for key, added in change.items()), torch.zeros(1))
    better = gain > _ROUNDING * member.norm
    if not better.any():
        member.settled |= {*some}
        members[k] = member if groups else trial
        return better
    if not better.all():
        change = trial.undo(member, change, ~better)
    members[k] = trial
    for key, added in change.items():
        total[key] += added
    others = members[:k] + members[k + 1 :]
    for other in others:
        other.settled -= set().union(*(plan.near[group] for group in groups))
    follow(others, plan, change)
    return better


class _Rest(dict[str, Tensor]):
    """The sum of the other members, tensor by tensor as they are asked for."""

    def __init__(self, total: Weights, own: Weights):
        super().__init__()
        self.total, self.own = total, own

    def __missing__(self, key: str) -> Tensor:
        self[key] = self.total[key] - self.own[key]
        return self[key]


def cost_of(members: Sequence[Member], total: Weights | None = None) -> Tensor:
    """Matching cost of members in their slots.

    The spread about a mean is what the mean lacks of the members' norms, which stay what they are.

    Args:
        members: The members.
        total: State-dict key -> their sum, where it is at hand.

    Returns:
        One number per family, ``[f]``.
    """
    sums = (
        sum(m.tensors[key].double() for m in members) if total is None else total[key]
        for key in members[0].tensors
    )
    size = len(members) * sum(member.norm for member in members)
    return ((size - squares(sums)) / size.clamp_min(1e-300)).clamp_min(0)
