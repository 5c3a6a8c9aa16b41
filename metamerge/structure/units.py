"""Which units of which spaces lie along the axes of a tensor, and what is computed along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metamerge.structure.factors import Place
from metamerge.structure.spec import PermutationSpec
from metamerge.weights import Weights

if TYPE_CHECKING:
    from metamerge.structure.layout import Layout

FIXED = "fixed:"


@dataclass(frozen=True, eq=False)
class Units:
    """What the entries of an axis belong to.

    Attributes:
        spaces: Spaces that the axis carries, in the order in which they come up along it.
        sizes: Number of units of each.
        index: Unit of every entry, ``[entries]``, counted through the spaces one after another.
    """

    spaces: tuple[str, ...]
    sizes: tuple[int, ...]
    index: Tensor

    @cached_property
    def plain(self) -> bool:
        """Whether entry ``i`` is unit ``i``."""
        return _counts_up(self.index) and len(self.index) == sum(self.sizes)

    @cached_property
    def table(self) -> Tensor:
        """Entries of every unit, ``[units, rest]``; one past the last where a unit has fewer."""
        counts = self.index.bincount(minlength=sum(self.sizes))
        order = self.index.argsort(stable=True)
        unit = self.index[order]
        turn = torch.arange(len(order)) - (counts.cumsum(0) - counts)[unit]
        table = torch.full((len(counts), int(counts.max())), len(order))
        table[unit, turn] = order
        return table

    def part(self, space: str) -> slice:
        """Where the units of one of the spaces are among all of them."""
        place = self.spaces.index(space)
        start = sum(self.sizes[:place])
        return slice(start, start + self.sizes[place])

    def joined(self, values: Mapping[str, Tensor], dim: int) -> Tensor:
        """Values of the units of each space -> of all units, one space after another."""
        parts = [values[space] for space in self.spaces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def spread(self, values: Tensor, dim: int) -> Tensor:
        """Values of all units -> of the entries that belong to them."""
        return values if self.plain else values.index_select(dim, self.index.to(values.device))

    def collected(self, values: Tensor, dim: int, space: str | None = None) -> Tensor:
        """Values of entries -> by unit: axis ``dim`` becomes ``units, rest``.

        Args:
            values: ``[..., entries, ...]``.
            dim: The axis of the entries, counted from the front.
            space: One of the spaces, whose units are wanted; by default those of all.

        Returns:
            ``[..., units, rest, ...]``; zeros where a unit has fewer entries than those of other
            spaces that are asked for as well.
        """
        table, count = self.table, len(self.index)
        if space is not None:
            table = table[self.part(space)]
            table = table[:, (table < count).any(0)]
        order = table.flatten()
        if bool((order == count).any()):
            values = torch.cat([values, torch.zeros_like(values.narrow(dim, 0, 1))], dim)
        if len(order) < count or not _counts_up(order):
            values = values.index_select(dim, order.to(values.device))
        return values.unflatten(dim, table.shape)


def units_along(spec: PermutationSpec, places: Sequence[Place], length: int, fixed: str) -> Units:
    """Read off what an axis carries.

    Entries with one group are units of the space of that name; entries with several (heads and the
    units inside them) are units of the space of the whole nest, ``heads x units``, whichever of
    them is the outer one on this axis. Parts of a concatenation that carry the same are entries of
    the same units.

    Args:
        spec: The permutation spec.
        places: The permuted factors of the axis.
        length: Number of entries.
        fixed: Space of the entries that no group permutes, each of which is a unit.

    Returns:
        The units.
    """
    places = sorted(places, key=lambda place: spec.order.index(place.group))
    everywhere = torch.zeros(length, dtype=torch.long)
    labels = torch.stack([*(place.labels for place in places), everywhere])
    patterns, kind = (labels >= 0).unique(dim=1, return_inverse=True)
    number, names, sizes = torch.empty(length, dtype=torch.long), {}, {}
    for which, pattern in enumerate(patterns[:-1].T):
        here = pattern.nonzero().flatten().tolist()
        groups = [places[i].group for i in here]
        at = kind == which
        name = names[which] = " x ".join(groups) or fixed
        sizes[name] = prod(spec.groups[group] for group in groups) if groups else int(at.sum())
        if not groups:
            number[at] = torch.arange(sizes[name])
            continue
        number[at] = 0
        for i in here:
            number[at] = number[at] * spec.groups[places[i].group] + labels[i, at]
    first = {names[which]: None for which in dict.fromkeys(kind.tolist())}
    starts, total = {}, 0
    for name in first:
        starts[name], total = total, total + sizes[name]
    start = torch.tensor([starts[names[which]] for which in range(len(names))], dtype=torch.long)
    return Units(tuple(first), tuple(sizes[name] for name in first), number + start[kind])


def mix_units(members: Weights, layout: Layout, mixing: Mapping[str, Tensor]) -> Weights:
    """Convex combinations of the members' units.

    Layers are mixed along their rows. A tensor that no layer owns (an embedding, a positional
    parameter, a normalisation, the matrices of a recurrent cell) is mixed along one axis that
    carries units with coefficients, and averaged where there is none; so is what is fixed.

    Args:
        members: Aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture.
        mixing: Space -> coefficients that sum to 1 over members, ``[f, m, n]``.

    Returns:
        ``[f, ...]``; integer tensors are those of the first member.
    """
    mixed = {}
    for key, tensor in members.items():
        axis, units = layout.carried.get(key, (0, None))
        if not tensor.is_floating_point():
            mixed[key] = tensor[:, 0]
        elif units is None:
            mixed[key] = tensor.mean(1)
        else:
            own = units.spread(units.joined(_completed(units, mixing), 2), 2)  # [f, m, entries]
            entries = tensor.movedim(2 + axis, 2)
            mixed[key] = torch.einsum("fme,fme...->fe...", own, entries).movedim(1, 1 + axis)
    tied = layout.program.tied.items() if layout.program else ()
    return {**mixed, **{alias: mixed[key] for alias, key in tied if alias in mixed}}


def _completed(units: Units, mixing: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Coefficients of all spaces along an axis: equal ones where a space has none."""
    known = next(mixing[space] for space in units.spaces if space in mixing)
    equal = known.new_full((*known.shape[:2], 1), 1 / known.shape[1])
    return {
        space: mixing[space]
        if space in mixing and not space.startswith(FIXED)
        else equal.expand(-1, -1, size)
        for space, size in zip(units.spaces, units.sizes, strict=True)
    }


def _counts_up(index: Tensor) -> bool:
    return bool((index == torch.arange(len(index))).all())
