"""The permutation spec, which axes of which tensors are permuted together, and permutations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from json import dumps
from math import prod
from typing import Any

import torch
from torch import Tensor

from metamerge.errors import IncompatibleWeights, Unreadable
from metamerge.structure.factors import (
    AxisSpec,
    Concat,
    Place,
    axis_factors,
    axis_from_json,
    axis_length,
    axis_places,
    axis_to_json,
    labels_of,
    pin,
)
from metamerge.weights import Weights

Permutation = dict[str, Tensor]
"""Group -> index tensor ``[..., n]``; once for the whole package: ``aligned[i] = w[perm[i]]``.

A group that is permuted on its own in every block of other groups has an axis for each of these
before its last: ``aligned[h, i] = w[perm_heads[h], perm_units[h, i]]``.
"""


@dataclass(frozen=True)
class Scaling:
    """A change of scale of the units of a group that leaves the network as it is.

    Attributes:
        group: The group; every unit may be scaled by a number of its own.
        kind: ``"positive"`` for factors above 0 (ReLU), ``"sign"`` for -1 and 1 (tanh), ``"real"``
            for any factor but 0 (linear paths).
        powers: State-dict key -> axis -> power of the factor that the entries are multiplied by.
    """

    group: str
    kind: str
    powers: Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes carry which permutable units.

    Attributes:
        groups: Group -> number of units ``n``; a group is a hidden space of the network.
        axes: State-dict key -> axis -> factors, outermost first. Tensors without an entry are never
            permuted.
        within: Group -> groups in each of whose blocks it is permuted on its own (the units of an
            attention head within the heads); groups without an entry are permuted as one.
        scalings: Changes of scale that the network allows besides.
        pinned: What is never permuted because it could not be followed or proved, in words.
        hidden: Number of hidden units, and how many of them are free to move.
    """

    groups: Mapping[str, int]
    axes: Mapping[str, tuple[AxisSpec, ...]]
    within: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scalings: tuple[Scaling, ...] = ()
    pinned: tuple[str, ...] = ()
    hidden: tuple[int, int] = (0, 0)

    @property
    def free_share(self) -> float:
        """Share of the hidden units that are free to move, in [0, 1]; 1 where there are none."""
        return self.hidden[1] / self.hidden[0] if self.hidden[0] else 1.0

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Groups in an order where each comes after those it is nested in."""
        done: dict[str, None] = {}
        while len(done) < len(self.groups):
            ready = [g for g in self.groups if g not in done and done.keys() >= {*self.outer(g)}]
            if not ready:
                raise Unreadable(
                    f"The permutation spec nests {[g for g in self.groups if g not in done]} in "
                    "each other, or in groups that it does not list."
                )
            done.update(dict.fromkeys(ready))
        return tuple(done)

    def outer(self, group: str) -> tuple[str, ...]:
        """Groups in each of whose blocks a group is permuted on its own."""
        return tuple(self.within.get(group, ()))

    def inner(self, group: str) -> tuple[str, ...]:
        """Groups that are permuted on their own in each block of a group."""
        return tuple(g for g in self.order if group in self.outer(g))

    def blocks(self, group: str) -> tuple[int, ...]:
        """Sizes of the groups that a group is nested in."""
        return tuple(self.groups[g] for g in self.outer(group))

    def touching(self, group: str) -> list[tuple[str, int]]:
        """Every ``(tensor, axis)`` that a group permutes."""
        return self._touching[group]

    def places(self, key: str, axis: int) -> list[Place]:
        """The factors of an axis that are permuted, entry by entry."""
        return self._places.get(key, {}).get(axis, [])

    def unit_rows(self, key: str, axis: int, group: str, tensor: Tensor) -> Tensor:
        """View a tensor as one row per unit of a group.

        Args:
            key: Name of the tensor in the state dict.
            axis: Axis that the group permutes.
            group: The group.
            tensor: One tensor, or a stack with leading axes ``[*batch]``.

        Returns:
            ``[*batch, *blocks, n, rest]``: everything that belongs to unit ``i`` in row ``i``, of
            each block where the group is nested in others.
        """
        lead = tensor.ndim - len(self.axes[key])
        wanted = [*self.outer(group), group]
        homes = {g: self._home(key, axis, g) for g in wanted}
        found: dict[str, int] = {}
        for number in sorted(set(homes.values()), reverse=True):
            here = [g for g in wanted if homes[g] == number]
            if (index := self._sorted(key, number, tuple(here))) is not None:
                tensor = tensor.index_select(lead + number, index.to(tensor.device))
            sizes = [self.groups[g] for g in here]
            tensor = tensor.unflatten(lead + number, (*sizes, -1))
            found = {g: d + (d > lead + number) * len(here) for g, d in found.items()}
            found.update({g: lead + number + i for i, g in enumerate(here)})
        count = len(wanted)
        rows = tensor.movedim([found[g] for g in wanted], list(range(lead, lead + count)))
        return rows[..., None].flatten(lead + count)

    def row_group(self, key: str) -> str | None:
        """Group of a tensor's first axis, or None where its rows are fixed or of several groups."""
        first = self.axes.get(key, ((),))[:1]
        if not first or len(first[0]) != 1 or isinstance(first[0][0], Concat):
            return None
        return first[0][0].group

    def identity(self) -> Permutation:
        """The permutation that changes nothing."""
        return {g: torch.arange(n).expand(*self.blocks(g), n) for g, n in self.groups.items()}

    def random(self, generator: torch.Generator, batch: Sequence[int] = ()) -> Permutation:
        """Uniform permutations, independent for every group, block and index of ``batch``.

        Args:
            generator: Source of randomness.
            batch: Leading shape.

        Returns:
            Group -> ``[*batch, *blocks, n]``.
        """
        return {
            group: torch.rand(*batch, *self.blocks(group), n, generator=generator).argsort(-1)
            for group, n in self.groups.items()
        }

    def permute(self, weights: Weights, perm: Permutation) -> Weights:
        """Apply a permutation: ``aligned[i] = w[perm[i]]`` along every axis of every group.

        Args:
            weights: One state dict, or a stack of them with leading axes ``[*batch]``.
            perm: Group -> ``[*batch, *blocks, n]``, or without ``batch`` for all; a group without
                an entry stays in place.

        Returns:
            New weights; tensors that no group touches are passed through.
        """
        return {key: self.permute_tensor(key, tensor, perm) for key, tensor in weights.items()}

    def permute_tensor(
        self, key: str, tensor: Tensor, perm: Permutation, *, keep: tuple[int, str] | None = None
    ) -> Tensor:
        """``permute`` for one tensor.

        Args:
            key: Its name in the state dict.
            tensor: ``[*batch, ...]``.
            perm: Group -> ``[*batch, *blocks, n]`` or ``[*blocks, n]``.
            keep: An axis and the group that is left in place on it.

        Returns:
            The permuted tensor.
        """
        lead = tensor.ndim - len(self.axes.get(key, ()))
        across, taken = [], []
        for axis, places in self._places.get(key, {}).items():
            moved = [p for p in places if p.group in perm and (axis, p.group) != keep]
            here = {p.group for p in places}
            alone = [p for p in moved if here >= {*self.outer(p.group)}]
            across += [(axis, p) for p in moved if not here >= {*self.outer(p.group)}]
            if alone:
                taken.append((lead + axis, self._index(places, alone, perm)))
        tensor = _taken(tensor, taken)
        rank = {group: i for i, group in enumerate(self.order)}
        across.sort(key=lambda item: rank[item[1].group])
        for axis, place in across:  # nested in groups of other axes, which are in order by now
            tensor = self._take_across(key, tensor, axis, place, perm)
        return tensor

    def rescale(self, weights: Weights, scaling: Scaling, factors: Tensor) -> Weights:
        """Change the scale of the units of a group; the network stays the same function.

        Args:
            weights: One state dict.
            scaling: One of ``scalings``.
            factors: ``[*blocks, n]``, of the scaling's kind.

        Returns:
            New weights; tensors that are not scaled are passed through.
        """
        return {
            key: self.rescale_tensor(key, tensor, scaling, factors)
            for key, tensor in weights.items()
        }

    def rescale_tensor(self, key: str, tensor: Tensor, scaling: Scaling, factors: Tensor) -> Tensor:
        """``rescale`` for one tensor.

        Args:
            key: Its name in the state dict.
            tensor: The tensor.
            scaling: One of ``scalings``.
            factors: ``[*blocks, n]``.

        Returns:
            The scaled tensor, or the same one where it is not scaled.
        """
        for axis, power in scaling.powers.get(key, {}).items():
            own = self._at_entries(key, axis, scaling.group, factors.to(tensor))
            tensor = tensor * own**power
        return tensor

    def inverse(self, perm: Permutation) -> Permutation:
        """The permutation that undoes another.

        Args:
            perm: Group -> ``[*batch, *blocks, n]``.

        Returns:
            Group -> ``[*batch, *blocks, n]``.
        """
        back: Permutation = {}
        for group in self.order:
            index, outer = perm[group], self.outer(group)
            if outer:
                lead = index.ndim - len(outer) - 1
                source = self._grid(outer, back, index.shape[:lead])
                flat = index.flatten(lead, -2)  # [*batch, blocks, n]
                chosen = source.reshape(*index.shape[:lead], -1)[..., None].expand_as(flat)
                index = flat.gather(-2, chosen).reshape(index.shape)
            back[group] = index.argsort(-1)
        return back

    def unpermute(self, weights: Weights, perm: Permutation) -> Weights:
        """Undo ``permute`` with the same permutation."""
        return self.permute(weights, self.inverse(perm))

    def without(self, group: str, why: str) -> "PermutationSpec":
        """The same spec with a group pinned.

        Args:
            group: The group that is never permuted any more.
            why: The reason, for the report.

        Returns:
            The spec; groups that were nested in the group are permuted alike in all its blocks.
        """
        axes = {
            key: tuple(pin(axis, group, why) for axis in axes) for key, axes in self.axes.items()
        }
        size = self.groups[group] * prod(self.blocks(group))
        return replace(
            self,
            groups={g: n for g, n in self.groups.items() if g != group},
            axes=axes,
            within={
                g: left
                for g, outer in self.within.items()
                if g != group and (left := tuple(o for o in outer if o != group))
            },
            scalings=tuple(s for s in self.scalings if s.group != group),
            pinned=(*self.pinned, f"{group} ({size} units): {why}"),
            hidden=(self.hidden[0], max(0, self.hidden[1] - size)),
        )

    def check_weights(self, name: str, weights: Weights) -> None:
        """Refuse weights that do not fit this spec.

        Args:
            name: Where the weights came from, for the message.
            weights: One state dict.

        Raises:
            IncompatibleWeights: If a tensor is missing or an axis has another size.
        """
        for key, axes in self.axes.items():
            expected = tuple(axis_length(axis) for axis in axes)
            found = tuple(weights[key].shape) if key in weights else "nothing"
            if found != expected:
                raise IncompatibleWeights(
                    f"{name}: {key!r} has shape {found}, the permutation spec expects {expected}. "
                    "Use the spec of the network that these weights belong to."
                )

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Reason -> number of axes that hold entries which stay in place for it."""
        counts: dict[str, int] = {}
        for axes in self.axes.values():
            for axis in axes:
                for reason in {f.reason for f in axis_factors(axis) if f.reason}:
                    counts[reason] = counts.get(reason, 0) + 1
        return counts

    @cached_property
    def digest(self) -> str:
        """Hash of the spec."""
        return sha256(dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain types only, for ``json.dumps``."""
        return {
            "groups": dict(self.groups),
            "axes": {key: [axis_to_json(axis) for axis in axes] for key, axes in self.axes.items()},
            "within": {group: list(outer) for group, outer in self.within.items()},
            "scalings": [
                [
                    s.group,
                    s.kind,
                    {k: {str(a): p for a, p in v.items()} for k, v in s.powers.items()},
                ]
                for s in self.scalings
            ],
            "pinned": list(self.pinned),
            "hidden": list(self.hidden),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PermutationSpec":
        """Read back what ``to_json`` wrote; everything but groups and axes may be left out.

        Args:
            data: The parsed JSON.

        Returns:
            The spec.

        Raises:
            Unreadable: If the data is no spec, or names groups that it does not list.
        """
        try:
            spec = cls(
                groups={str(group): int(n) for group, n in data["groups"].items()},
                axes={
                    key: tuple(axis_from_json(axis) for axis in axes)
                    for key, axes in data["axes"].items()
                },
                within={g: tuple(outer) for g, outer in data.get("within", {}).items()},
                scalings=tuple(
                    Scaling(
                        g, kind, {k: {int(a): p for a, p in v.items()} for k, v in powers.items()}
                    )
                    for g, kind, powers in data.get("scalings", ())
                ),
                pinned=tuple(data.get("pinned", ())),
                hidden=tuple(data.get("hidden", (0, 0))),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unreadable(
                f"This is no permutation spec written by metamerge: {error!r}."
            ) from error
        spec.check()
        return spec

    def check(self) -> None:
        """Refuse a spec that contradicts itself.

        Raises:
            Unreadable: If a factor names a group that is not listed or is of another size, a group
                is nested in itself, or lies outside the blocks that it is nested in.
        """
        for key, axes in self.axes.items():
            here = {f.group for axis in axes for f in axis_factors(axis)}
            for factor in (f for axis in axes for f in axis_factors(axis) if f.group is not None):
                if self.groups.get(factor.group) != factor.size:
                    raise Unreadable(
                        f"The permutation spec has {factor.size} units of {factor.group!r} in "
                        f"{key!r}, and {self.groups.get(factor.group)} in its list of groups."
                    )
                if not here >= {*self.outer(factor.group)}:
                    raise Unreadable(
                        f"The permutation spec nests {factor.group!r} in "
                        f"{self.outer(factor.group)}, but {key!r} carries only "
                        f"{sorted(here - {None})}."
                    )
        above: dict[str, set[str]] = {g: set(self.outer(g)) for g in self.groups}
        for _ in self.groups:
            for group, outer in above.items():
                outer |= {far for near in outer for far in above.get(near, ())}
                if group in outer:
                    raise Unreadable(f"The permutation spec nests {group!r} in itself.")

    def __str__(self) -> str:
        count = f"{len(self.groups)} group{'s' * (len(self.groups) != 1)}"
        lines = [
            f"PermutationSpec: {count}, {self.hidden[1]} of {self.hidden[0]} hidden units are free"
        ]
        kinds = {g: [s.kind for s in self.scalings if s.group == g] for g in self.groups}
        for group, n in self.groups.items():
            places = ", ".join(f"{key}[{axis}]" for key, axis in self.touching(group))
            inside = f" in each of {' x '.join(self.outer(group))}" if self.outer(group) else ""
            scaled = f", {' and '.join(dict.fromkeys(kinds[group]))} scaling" * bool(kinds[group])
            lines.append(f"  {group} ({n} units{inside}{scaled}): {places}")
        return "\n".join([*lines, *(f"  pinned: {text}" for text in self.pinned)])

    @cached_property
    def _places(self) -> dict[str, dict[int, list[Place]]]:
        tables: dict[str, dict[int, list[Place]]] = {}
        for key, axes in self.axes.items():
            for axis, factors in enumerate(axes):
                places = list(axis_places(factors))
                rank = {group: i for i, group in enumerate(self.order)}
                if places:
                    places.sort(key=lambda place: rank[place.group])
                    tables.setdefault(key, {})[axis] = places
        return tables

    @cached_property
    def _touching(self) -> dict[str, list[tuple[str, int]]]:
        found: dict[str, list[tuple[str, int]]] = {group: [] for group in self.groups}
        for key, axes in self._places.items():
            for axis, places in axes.items():
                for group in dict.fromkeys(place.group for place in places):
                    found[group].append((key, axis))
        return found

    def _home(self, key: str, axis: int, group: str) -> int:
        """The axis that carries a group, rather ``axis`` than another."""
        axes = [axis, *(other for other in self._places[key] if other != axis)]
        return next(a for a in axes if self._has(key, a, group))

    def _has(self, key: str, axis: int, group: str) -> bool:
        return any(place.group == group for place in self.places(key, axis))

    def _sorted(self, key: str, axis: int, groups: tuple[str, ...]) -> Tensor | None:
        """Entries of an axis ordered by their units; None where they are in that order already."""
        labels = torch.stack(
            [
                torch.stack([p.labels for p in self.places(key, axis) if p.group == g]).amax(0)
                for g in groups
            ]
        )  # [groups, size]
        number = torch.zeros_like(labels[0])
        for group, own in zip(groups, labels, strict=True):
            number = number * self.groups[group] + own
        index = number.argsort(stable=True)
        index = index[(labels >= 0).all(0)[index]]
        plain = len(index) == len(number) and bool((index == torch.arange(len(index))).all())
        return None if plain else index

    def _index(self, places: list[Place], moved: list[Place], perm: Permutation) -> Tensor:
        """Index along one axis, ``[*batch, size]``: the outer groups first, then what is nested."""
        index = torch.arange(len(places[0].labels))
        for place in moved:
            outer = [labels_of(places, group) for group in self.outer(place.group)]
            index = _composed(index, _step(place, perm[place.group], outer))
        return index

    def _take_across(
        self, key: str, tensor: Tensor, axis: int, place: Place, perm: Permutation
    ) -> Tensor:
        count = len(self.axes[key])
        outer = [self._spread_labels(key, axis, group) for group in self.outer(place.group)]
        shape = _alone(axis, count)
        wide = Place(place.group, place.labels.reshape(shape), place.stride.reshape(shape))
        index = _step(wide, perm[place.group].cpu(), outer)
        index = index.reshape(*[1] * (tensor.ndim - index.ndim), *index.shape)
        dim = tensor.ndim - count + axis
        return torch.take_along_dim(tensor, index.to(tensor.device), dim=dim)

    def _spread_labels(self, key: str, axis: int, group: str) -> Tensor:
        """Labels of a group along the axis that carries it, rather ``axis`` than another."""
        home = self._home(key, axis, group)
        labels = labels_of(self.places(key, home), group)
        return labels.reshape(_alone(home, len(self.axes[key])))

    def _at_entries(self, key: str, axis: int, group: str, factors: Tensor) -> Tensor:
        """One number per unit, spread over the entries of a tensor; 1 for other entries."""
        shape = _alone(axis, len(self.axes[key]))
        spread = torch.ones(1, dtype=factors.dtype, device=factors.device)
        outer = [self._spread_labels(key, axis, o).clamp_min(0) for o in self.outer(group)]
        for place in self.places(key, axis):
            if place.group == group:
                labels = place.labels.reshape(shape)
                own = factors[(*outer, labels.clamp_min(0))]
                spread = spread * own.where((labels >= 0).to(own.device), 1.0)
        return spread

    def _grid(self, outer: tuple[str, ...], back: Permutation, batch: Sequence[int]) -> Tensor:
        """Number of the block, of the groups before the change, for each block after it."""
        sizes = [self.groups[g] for g in outer]
        grid = torch.meshgrid(*[torch.arange(n) for n in sizes], indexing="ij")
        number = torch.zeros(*batch, *sizes, dtype=torch.long)
        for group, size in zip(outer, sizes, strict=True):
            at = tuple(grid[outer.index(o)] for o in self.outer(group))
            own = back[group][(..., *at, grid[outer.index(group)])]
            number = number * size + own
        return number


def _alone(axis: int, count: int) -> list[int]:
    """Shape of a row of numbers along one of ``count`` axes."""
    return [-1 if other == axis else 1 for other in range(count)]


def _step(place: Place, own: Tensor, outer: Sequence[Tensor]) -> Tensor:
    """Where each entry of an axis comes from when one group moves, ``[*batch, ...]``."""
    inside = place.labels >= 0
    at = tuple(labels.clamp_min(0) for labels in outer)
    chosen = own.cpu()[(..., *at, place.labels.clamp_min(0))]
    size = max(place.labels.shape, default=1)
    here = torch.arange(size).reshape(place.labels.shape)
    return torch.where(inside, here + (chosen - place.labels) * place.stride, here)


def _composed(first: Tensor, then: Tensor) -> Tensor:
    """``index[..., i] = first[..., then[..., i]]``."""
    if first.ndim == 1:
        return first[then]
    shape = torch.broadcast_shapes(first.shape, then.shape)
    return first.expand(shape).gather(-1, then.expand(shape))


def _taken(tensor: Tensor, indices: Sequence[tuple[int, Tensor]]) -> Tensor:
    """``_take`` along several axes; kernels are moved whole, without a copy in between."""
    if [axis for axis, _ in indices] == [0, 1] and tensor.ndim > 2:
        rows, columns = (index.to(tensor.device) for _, index in indices)
        if rows.ndim == columns.ndim == 1:
            return tensor[rows[:, None], columns]
    for axis, index in indices:
        tensor = _take(tensor, index, axis)
    return tensor


def _take(tensor: Tensor, index: Tensor, axis: int) -> Tensor:
    """``tensor[..., index, ...]`` along ``axis``, for every leading index of ``index``."""
    if index.ndim == 1:
        return tensor.index_select(axis, index.to(tensor.device))
    lead = index.ndim - 1
    shape = [1] * tensor.ndim
    shape[:lead], shape[axis] = index.shape[:-1], index.shape[-1]
    expanded = index.to(tensor.device).reshape(shape)
    return torch.take_along_dim(tensor, expanded, dim=axis)
