"""What a permutation spec says about the order in which groups are assigned, and by what."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from metamerge.alignment.blocks import cluster, comparable, touched
from metamerge.structure import Factor, Permutation, PermutationSpec
from metamerge.weights import Weights

Use = tuple[str, int, str]
"""A tensor, one of its axes, and a group that permutes it."""


@dataclass(frozen=True)
class Plan:
    """What a spec says about the order of the work.

    Attributes:
        spec: The permutation spec.
        groups: The groups that are nested in no other, in the order in which they are assigned.
    """

    spec: PermutationSpec
    groups: tuple[str, ...]

    def in_order(self, groups: Sequence[str]) -> "Plan":
        """The same work in another order of groups."""
        return replace(self, groups=tuple(groups))

    @cached_property
    def keys(self) -> dict[str, list[str]]:
        """Group -> tensors that it, or what is nested in it, permutes."""
        return {g: touched(self.spec, cluster(self.spec, g)) for g in self.groups}

    @cached_property
    def near(self) -> dict[str, set[str]]:
        """Group -> groups that share a tensor with it, itself included."""
        return {g: {h for h in self.groups if {*self.keys[g]} & {*self.keys[h]}} for g in self.keys}

    @cached_property
    def exact(self) -> set[str]:
        """Groups that one assignment brings to their best: each of their tensors has one axis."""
        return {
            g
            for g in self.groups
            if len(cluster(self.spec, g)) == 1
            and all(self._carried(key).count(g) == 1 for key in self.keys[g])
        }

    @cached_property
    def frame(self) -> PermutationSpec:
        """The spec of a permutation's own indices, ``[*blocks, n]``: they move as units do."""
        axes = {
            g: tuple((Factor(o, self.spec.groups[o]),) for o in (*self.spec.outer(g), g))
            for g in self.spec.groups
        }
        return PermutationSpec(self.spec.groups, axes, self.spec.within)

    def first(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
        """Every group once, with the tensors whose other axes keep their place or are known.

        Next is always the group of whose weights the largest share can be compared already, so
        this usually goes from the inputs to the outputs.

        Args:
            sizes: State-dict key -> number of elements.

        Yields:
            A group and the tensors to match it by.
        """
        known: set[str] = set()
        waiting = list(self.groups)
        while waiting:
            ready = {g: comparable(self.spec, cluster(self.spec, g), known) for g in waiting}
            share = {g: _total(sizes, ready[g]) / _total(sizes, self.keys[g]) for g in waiting}
            group = max(waiting, key=share.__getitem__)
            yield group, ready[group] or self.keys[group]
            known |= {*cluster(self.spec, group)}
            waiting.remove(group)

    def uses(self, group: str) -> list[Use]:
        """Every tensor and axis that a group permutes."""
        return [(key, axis, group) for key, axis in self.spec.touching(group)]

    def rows(self, use: Use, tensor: Tensor) -> Tensor:
        """``[f, n, r]``: a tensor with one row per unit."""
        key, axis, group = use
        factors = self.spec.axes[key][axis]
        if len(factors) == 1 and isinstance(factors[0], Factor):  # the whole axis: only a view
            return tensor.movedim(1 + axis, 1)[..., None].flatten(2)
        return self.spec.unit_rows(key, axis, group, tensor)

    def moved(self, tensors: Weights, keys: Sequence[str], step: Permutation) -> Weights:
        """Some tensors ``[f, ...]`` after a step; all others are passed through."""
        return {**tensors, **permuted(self.spec, {key: tensors[key] for key in keys}, step)}

    def _carried(self, key: str) -> list[str]:
        return [p.group for axis in self.spec.carriers(key).values() for p in axis]


def permuted(spec: PermutationSpec, tensors: Weights, step: Permutation) -> Weights:
    """``spec.permute`` of stacks ``[f, ...]``; one family is cheaper to move than several."""
    if len(next(iter(step.values()))) > 1:
        return spec.permute(tensors, step)
    one = spec.permute(
        {key: tensor[0] for key, tensor in tensors.items()},
        {g: index[0] for g, index in step.items()},
    )
    return {key: tensor[None] for key, tensor in one.items()}


def _total(sizes: Mapping[str, int], keys: Sequence[str]) -> int:
    return sum(sizes[key] for key in keys)
