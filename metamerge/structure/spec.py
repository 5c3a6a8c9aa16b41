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
from metamerge.structure import moving
from metamerge.structure.factors import (
    AxisSpec,
    Concat,
    Place,
    axis_factors,
    axis_from_json,
    axis_length,
    axis_places,
    axis_to_json,
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

    def carriers(self, key: str) -> dict[int, list[Place]]:
        """Axes of a tensor that carry groups, with their permuted factors, outer groups first."""
        return self._places.get(key, {})

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
        return moving.unit_rows(self, key, axis, group, tensor)

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
        return moving.permute_tensor(self, key, tensor, perm, keep=keep)

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
        return moving.rescale_tensor(self, key, tensor, scaling, factors)

    def inverse(self, perm: Permutation) -> Permutation:
        """The permutation that undoes another.

        Args:
            perm: Group -> ``[*batch, *blocks, n]``.

        Returns:
            Group -> ``[*batch, *blocks, n]``.
        """
        return moving.inverse(self, perm)

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
