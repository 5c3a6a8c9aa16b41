"""The permutation spec, which axes of which tensors are permuted together, and permutations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from json import dumps
from math import prod
from typing import Any

import torch
from torch import Tensor

from metamerge.errors import IncompatibleWeights, Unreadable
from metamerge.weights import Weights

Permutation = dict[str, Tensor]
"""Group -> index tensor ``[..., n]``; once for the whole package: ``aligned[i] = w[perm[i]]``."""


@dataclass(frozen=True)
class Factor:
    """A factor of an axis: ``size`` entries, permuted as ``group``; fixed where that is None."""

    group: str | None
    size: int


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes carry which permutable units.

    Attributes:
        groups: Group -> number of units ``n``; a group is a hidden space of the network.
        axes: State-dict key -> axis -> factors, outermost first. Tensors without an entry are never
            permuted.
        fixed: Reason -> number of axes that stay in place for it.
    """

    groups: Mapping[str, int]
    axes: Mapping[str, tuple[tuple[Factor, ...], ...]]
    fixed: Mapping[str, int]

    def touching(self, group: str) -> list[tuple[str, int]]:
        """Every ``(tensor, axis)`` that a group permutes."""
        return [
            (key, axis)
            for key, factored in self.axes.items()
            for axis, factors in enumerate(factored)
            if any(f.group == group for f in factors)
        ]

    def unit_rows(self, key: str, axis: int, group: str, tensor: Tensor) -> Tensor:
        """View a tensor as one row per unit of a group.

        Args:
            key: Name of the tensor in the state dict.
            axis: Axis that the group permutes.
            group: The group.
            tensor: One tensor, or a stack with leading axes ``[*batch]``.

        Returns:
            ``[*batch, n, rest]``: everything that belongs to unit ``i`` in row ``i``.
        """
        factors = self.axes[key][axis]
        lead = tensor.ndim - len(self.axes[key])
        place = next(i for i, f in enumerate(factors) if f.group == group)
        split = tensor.unflatten(lead + axis, [f.size for f in factors])
        return split.movedim(lead + axis + place, lead)[..., None].flatten(lead + 1)

    def row_group(self, key: str) -> str | None:
        """Group of a tensor's first axis, or None where its rows are fixed."""
        factored = self.axes.get(key, ())
        return factored[0][0].group if factored and len(factored[0]) == 1 else None

    def identity(self) -> Permutation:
        """The permutation that changes nothing."""
        return {group: torch.arange(n) for group, n in self.groups.items()}

    def random(self, generator: torch.Generator, batch: Sequence[int] = ()) -> Permutation:
        """Uniform permutations, independent for every group and every index of ``batch``.

        Args:
            generator: Source of randomness.
            batch: Leading shape.

        Returns:
            Group -> ``[*batch, n]``.
        """
        return {
            group: torch.rand(*batch, n, generator=generator).argsort(-1)
            for group, n in self.groups.items()
        }

    def permute(self, weights: Weights, perm: Permutation) -> Weights:
        """Apply a permutation: ``aligned[i] = w[perm[i]]`` along every axis of every group.

        Args:
            weights: One state dict, or a stack of them with leading axes ``[*batch]``.
            perm: Group -> ``[*batch, n]``, or ``[n]`` for all.

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
            perm: Group -> ``[*batch, n]`` or ``[n]``.
            keep: An axis and the group that is left in place on it.

        Returns:
            The permuted tensor.
        """
        factored = self.axes.get(key, ())
        lead = tensor.ndim - len(factored)
        for axis, factors in enumerate(factored):
            skip = keep[1] if keep and keep[0] == axis else None
            if any(f.group not in (None, skip) for f in factors):
                tensor = _take(tensor, _axis_index(factors, perm, skip), lead + axis)
        return tensor

    def unpermute(self, weights: Weights, perm: Permutation) -> Weights:
        """Undo ``permute`` with the same permutation."""
        return self.permute(weights, {group: p.argsort(-1) for group, p in perm.items()})

    def check_weights(self, name: str, weights: Weights) -> None:
        """Refuse weights that do not fit this spec.

        Args:
            name: Where the weights came from, for the message.
            weights: One state dict.

        Raises:
            IncompatibleWeights: If a tensor is missing or an axis has another size.
        """
        for key, factored in self.axes.items():
            expected = tuple(prod(f.size for f in factors) for factors in factored)
            found = tuple(weights[key].shape) if key in weights else "nothing"
            if found != expected:
                raise IncompatibleWeights(
                    f"{name}: {key!r} has shape {found}, the permutation spec expects {expected}. "
                    "Use the spec of the network that these weights belong to."
                )

    @property
    def digest(self) -> str:
        """Hash of the spec."""
        return sha256(dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain types only, for ``json.dumps``."""
        axes = {
            key: [[[f.group, f.size] for f in factors] for factors in factored]
            for key, factored in self.axes.items()
        }
        return {"groups": dict(self.groups), "axes": axes, "fixed": dict(self.fixed)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PermutationSpec":
        """Read back what ``to_json`` wrote.

        Args:
            data: The parsed JSON.

        Returns:
            The spec.

        Raises:
            Unreadable: If the data is no spec.
        """
        try:
            axes = {
                key: tuple(
                    tuple(Factor(group, size) for group, size in factors) for factors in factored
                )
                for key, factored in data["axes"].items()
            }
            return cls(dict(data["groups"]), axes, dict(data["fixed"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unreadable(
                f"This is no permutation spec written by metamerge: {error!r}."
            ) from error

    def __str__(self) -> str:
        lines = [
            f"PermutationSpec: {len(self.groups)} groups, {sum(self.groups.values())} free units"
        ]
        for group, n in self.groups.items():
            places = ", ".join(f"{key}[{axis}]" for key, axis in self.touching(group))
            lines.append(f"  {group} ({n} units): {places}")
        return "\n".join(lines)


def _axis_index(factors: Sequence[Factor], perm: Permutation, skip: str | None) -> Tensor:
    """Index along one axis whose factors are permuted each on its own, ``[*batch, size]``."""
    index = torch.zeros(1, dtype=torch.long)
    for factor in factors:
        own = torch.arange(factor.size)
        if factor.group not in (None, skip):
            own = perm[factor.group]
        index = index.to(own.device)[..., :, None] * factor.size + own[..., None, :]
        index = index.flatten(-2)
    return index


def _take(tensor: Tensor, index: Tensor, axis: int) -> Tensor:
    """``tensor[..., index, ...]`` along ``axis``, for every leading index of ``index``."""
    if index.ndim == 1:
        return tensor.index_select(axis, index.to(tensor.device))
    lead = index.ndim - 1
    shape = [1] * tensor.ndim
    shape[:lead], shape[axis] = index.shape[:-1], index.shape[-1]
    expanded = index.to(tensor.device).reshape(shape)
    return torch.take_along_dim(tensor, expanded, dim=axis)
