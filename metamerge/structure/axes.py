"""Union-find over the axes of a program's tensors, where an axis may be a product of factors.

Flattening a ``(channel, height, width)`` map makes one axis of three factors; the linear layer
behind it then has weights whose columns carry the channels' permutation in blocks. Two axes that an
operator ties together are unified factor by factor, and a factor that meets a finer one is split.
"""

from dataclasses import dataclass, field

from metamerge.errors import StructureError

Axis = tuple[int, ...]
"""Factors of an axis, outermost first, each the number of a class in ``Axes``."""

BATCH = -1
"""The size of a batch factor: unknown, and equal only to itself."""


@dataclass
class Axes:
    """Classes of factors that must be permuted together; one ``Axes`` per program."""

    sizes: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    splits: dict[int, Axis] = field(default_factory=dict)
    fixed: dict[int, str] = field(default_factory=dict)

    def fresh(self, size: int) -> Axis:
        """A new axis of one factor with ``size`` entries (none at all where size is 1)."""
        if size == 1:
            return ()
        self.sizes.append(size)
        self.parents.append(len(self.parents))
        return (len(self.parents) - 1,)

    def resolve(self, axis: Axis) -> Axis:
        """The axis in terms of today's classes, outermost first."""
        return tuple(leaf for factor in axis for leaf in self._leaves(factor))

    def size(self, axis: Axis) -> int:
        """Number of entries along the axis; ``BATCH`` if it holds the batch."""
        total = 1
        for factor in self.resolve(axis):
            if self.sizes[factor] == BATCH:
                return BATCH
            total *= self.sizes[factor]
        return total

    def unify(self, one: Axis, other: Axis, where: str) -> Axis:
        """Tie two axes of equal size, entry by entry.

        Args:
            one: First axis.
            other: Second axis.
            where: The operator that ties them, for the message.

        Returns:
            The common axis.

        Raises:
            StructureError: If the sizes cannot be matched, or the batch meets another axis.
        """
        left, right = list(self.resolve(one)), list(self.resolve(other))
        common = []
        while left and right:
            a, b = left.pop(0), right.pop(0)
            if self.sizes[a] == self.sizes[b]:
                common.append(self._union(a, b))
            elif BATCH in (self.sizes[a], self.sizes[b]):
                raise StructureError(f"{where} mixes the batch axis with another.")
            elif self.sizes[a] > self.sizes[b] and self.sizes[a] % self.sizes[b] == 0:
                left = [*self._split(a, self.sizes[b]), *left]
                right = [b, *right]
            elif self.sizes[b] % self.sizes[a] == 0:
                left = [a, *left]
                right = [*self._split(b, self.sizes[a]), *right]
            else:
                raise StructureError(
                    f"{where} ties an axis of {self.sizes[a]} entries to one of {self.sizes[b]}, "
                    "and neither divides the other."
                )
            left, right = list(self.resolve(tuple(left))), list(self.resolve(tuple(right)))
        if left or right:
            raise StructureError(f"{where} ties axes of different sizes.")
        return self.resolve(tuple(common))

    def fix(self, axis: Axis, reason: str) -> None:
        """Forbid permuting the axis; the reason is kept for the report."""
        for factor in self.resolve(axis):
            self.fixed.setdefault(factor, reason)

    def take(self, factors: list[int], size: int, where: str) -> Axis:
        """Remove factors from the front of ``factors`` that together make ``size`` entries.

        Args:
            factors: Resolved factors, outermost first; shortened in place.
            size: Wanted number of entries, or ``BATCH``.
            where: The operator, for the message.

        Returns:
            The axis made of the removed factors.

        Raises:
            StructureError: If the factors cannot be cut at that size.
        """
        taken: list[int] = []
        total = 1
        while total != size:
            if not factors:
                raise StructureError(f"{where} reshapes axes in a way that cannot be followed.")
            first = factors.pop(0)
            if self.sizes[first] == BATCH:
                taken.append(first)
                total = BATCH
            elif total == BATCH or size == BATCH:
                raise StructureError(f"{where} mixes the batch axis with another.")
            elif (size // total) % self.sizes[first] == 0:
                taken.append(first)
                total *= self.sizes[first]
            elif self.sizes[first] % (size // total) == 0 and size % total == 0:
                factors[:0] = self._split(first, size // total)
            else:
                raise StructureError(
                    f"{where} cuts an axis of {self.sizes[first]} entries unevenly."
                )
        return tuple(taken)

    def _leaves(self, factor: int) -> Axis:
        root = self._root(factor)
        return self.resolve(self.splits[root]) if root in self.splits else (root,)

    def _root(self, factor: int) -> int:
        while self.parents[factor] != factor:
            factor = self.parents[factor]
        return factor

    def _union(self, a: int, b: int) -> int:
        keep, drop = min(a, b), max(a, b)
        self.parents[drop] = keep
        if drop in self.fixed:
            self.fixed.setdefault(keep, self.fixed.pop(drop))
        return keep

    def _split(self, factor: int, outer: int) -> Axis:
        """Cut a class of ``n`` into ``outer`` blocks of ``n / outer``."""
        parts = (*self.fresh(outer), *self.fresh(self.sizes[factor] // outer))
        self.splits[factor] = parts
        if factor in self.fixed:
            self.fix(parts, self.fixed[factor])
        return parts
