"""Coordinate descent of one member towards fixed weights: group after group is assigned anew.

A member is kept in its slots, so that the present assignment is always the identity and only what
moves is moved. Products of its units with those of the target are kept as long as neither changes,
and a group is left alone as long as nothing about it has moved.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from metamerge.alignment.assignment import Array, assign, reassign
from metamerge.alignment.blocks import assign_blocks, cluster
from metamerge.alignment.plan import Plan, Use, permuted
from metamerge.structure import Permutation
from metamerge.weights import Weights

_KEPT = 2**18  # multiplications from which on a product is kept
_PIECE = 2**22  # numbers of a tensor that are brought to float64 at a time


@dataclass
class Member:
    """One member of every family, in its slots.

    Attributes:
        tensors: State-dict key -> ``[f, ...]``, all groups in place.
        index: Group -> ``[f, *blocks, n]``, how it came there.
        products: Inner products of its units (columns) with those of the target, ``[f, n, n]``.
        prices: Group -> what the last assignment leaves for the next one.
        settled: Groups that no assignment could bring closer before something else moves.
    """

    tensors: Weights
    index: Permutation
    products: dict[Use, Tensor] = field(default_factory=dict)
    prices: dict[str, list[Array] | None] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)

    @cached_property
    def norm(self) -> Tensor:
        """Squared norm of its tensors, ``[f]``: no permutation changes it."""
        return squares(self.tensors.values())

    def copy(self) -> "Member":
        """A member that can go on from here without changing this one."""
        twin = copy(self)
        twin.products, twin.prices = dict(self.products), dict(self.prices)
        twin.settled = set(self.settled)
        return twin

    def of(self, families: Tensor) -> "Member":
        """The member in some families only."""
        tensors = {key: tensor[families.to(tensor.device)] for key, tensor in self.tensors.items()}
        index = {group: index[families] for group, index in self.index.items()}
        return Member(tensors, index)

    def undo(self, before: "Member", change: Weights, families: Tensor) -> Weights:
        """Go back to where the member was, in some families.

        Args:
            before: The member before it moved.
            change: What was added to its tensors.
            families: Where to go back, ``[f]``.

        Returns:
            What is left of the change.
        """
        self.products.clear()
        self.index = {group: index.clone() for group, index in self.index.items()}
        for group, index in self.index.items():
            index[families] = before.index[group][families]
        self.tensors, left = dict(self.tensors), {}
        for key, added in change.items():
            back = families.to(added.device).reshape(-1, *[1] * (added.ndim - 1))
            self.tensors[key] = self.tensors[key].where(~back, before.tensors[key])
            left[key] = added.masked_fill(back, 0)
        return left


def first_pass(member: Member, target: Weights, plan: Plan) -> None:
    """Assign every group once, by what does not depend on the order of units not known yet.

    Args:
        member: The member, changed in place.
        target: State-dict key -> ``[f, ...]``.
        plan: The order of the work.
    """
    sizes = {key: target[key].numel() for key in plan.spec.axes}
    for group, keys in plan.first(sizes):
        if len(cluster(plan.spec, group)) > 1:
            step = _block_step(member, target, plan, group, keys)
        else:
            gain = _gain(member, target, plan, [u for u in plan.uses(group) if u[0] in keys])
            step = {group: assign(gain)}
        _move(member, target, plan, group, step)
        if group in plan.exact and len(keys) == len(plan.keys[group]):
            member.settled.add(group)


def sweep(
    member: Member, target: Weights, plan: Plan, some: Sequence[str] | None = None
) -> list[str]:
    """Assign every group once that something has moved about.

    Args:
        member: The member, changed in place.
        target: State-dict key -> ``[f, ...]``.
        plan: The order of the work.
        some: The groups that are looked at; None for all.

    Returns:
        The groups that moved.
    """
    groups = []
    for group in plan.groups if some is None else some:
        if group in member.settled:
            continue
        if len(cluster(plan.spec, group)) > 1:
            step = _block_step(member, target, plan, group, plan.keys[group])
        else:
            gain = _gain(member, target, plan, plan.uses(group))
            index, member.prices[group] = reassign(gain, member.prices.get(group))
            step = {group: index}
        member.settled.add(group)
        if _move(member, target, plan, group, step):
            groups.append(group)
    return groups


def follow(members: Sequence[Member], plan: Plan, change: Weights) -> None:
    """Bring the kept products of members up to date after the target of all has changed.

    Args:
        members: The members, changed in place.
        plan: The order of the work.
        change: State-dict key -> what was added to the target, ``[f, ...]``.
    """
    kept = dict.fromkeys(use for member in members for use in member.products if use[0] in change)
    for use in kept:
        added = plan.rows(use, change[use[0]])
        units = added.any(-1).any(0).nonzero()[:, 0]
        few = len(members) * len(units) <= added.shape[1]  # each changes between two uses
        some = units if few else _columns(added)
        for member in [member for member in members if use in member.products]:
            own = plan.rows(use, member.tensors[use[0]])
            if few:
                member.products[use][:, units] += _product(added[:, units], own)
            else:
                _add(member, use, added, own, some, len(members))


def _move(member: Member, target: Weights, plan: Plan, group: str, step: Permutation) -> bool:
    """Permute a member's units in place; whether there was anything to permute."""
    if all(bool((index == torch.arange(index.shape[-1])).all()) for index in step.values()):
        return False
    before = member.tensors
    member.tensors = plan.moved(before, plan.keys[group], step)
    own = {g: member.index[g] for g in step}
    member.index = {**member.index, **permuted(plan.frame, own, step)}
    for use in [use for use in member.products if use[0] in plan.keys[group]]:
        if use[2] == group and group in plan.exact:
            kept = member.products[use]
            index = step[group].to(kept.device)[:, None].expand_as(kept)
            member.products[use] = kept.gather(-1, index)
        elif use[2] == group:
            del member.products[use]
        else:
            was, now = (plan.rows(use, t[use[0]]).double() for t in (before, member.tensors))
            wanted, change = plan.rows(use, target[use[0]]), now - was
            _add(member, use, wanted, change, _columns(change), 1)
    member.settled -= plan.near[group] - ({group} & plan.exact)
    return True


def _add(
    member: Member, use: Use, wanted: Tensor, own: Tensor, columns: Tensor, times: int
) -> None:
    """Add to a kept product what comes of some weights (columns) of the units.

    Where these are many, it is dropped, to be computed anew when it is needed.
    """
    kept = member.products.pop(use)
    if times * len(columns) <= own.shape[2]:
        member.products[use] = kept + _product(wanted[..., columns], own[..., columns])


def _columns(rows: Tensor) -> Tensor:
    """Columns of ``[f, n, r]`` that are not zero."""
    return rows.any(1).any(0).nonzero()[:, 0]


def _gain(member: Member, target: Weights, plan: Plan, uses: Sequence[Use]) -> Tensor:
    """Inner product of every unit of the target and every unit of a member, ``[f, n, n]``."""
    gain = torch.zeros((), dtype=torch.float64)
    for use in uses:
        product = member.products.get(use)
        if product is None:
            wanted, own = (plan.rows(use, t[use[0]]) for t in (target, member.tensors))
            product = _product(wanted, own)
            _, units, width = wanted.shape
            if units <= 2 * width and units * units * width >= _KEPT:
                member.products[use] = product
        gain = gain + product
    return gain


def _product(wanted: Tensor, own: Tensor) -> Tensor:
    """``wanted @ own.mT`` in float64, of large matrices piece by piece."""
    width = max(1, _PIECE // max(1, own.shape[0] * own.shape[1]))
    pieces = zip(wanted.split(width, -1), own.split(width, -1), strict=True)
    return sum(a.double() @ b.double().mT for a, b in pieces)


def _block_step(
    member: Member, target: Weights, plan: Plan, group: str, keys: Sequence[str]
) -> Permutation:
    placed = {key: member.tensors[key][:, None].double() for key in keys}
    centre = {key: target[key].double() for key in keys}
    step = assign_blocks(placed, plan.spec, centre, group)
    return {g: index[:, 0] for g, index in step.items()}


def squares(tensors: Iterable[Tensor]) -> Tensor:
    """Squared norm of tensors ``[f, ...]`` together, ``[f]``, on the CPU."""
    return sum(inner(tensor.double(), tensor) for tensor in tensors)


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each family's tensors, ``[f]``, on the CPU."""
    return (one * other).reshape(len(one), -1).sum(1).cpu()
