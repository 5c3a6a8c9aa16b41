"""Union-find over the axes of a program's tensors, where an axis is made of factors and of parts.

Flattening a ``(channel, height, width)`` map makes one axis of three *factors*; the linear layer
behind it then has weights whose columns carry the channels' permutation in blocks. Concatenating
two maps makes one axis of two *parts*. Axes that an operator ties together are unified entry by
entry, and a factor that meets a finer one is split (into factors) or cut (into parts).

A factor that was split off another is *nested*: the units of an attention head may be permuted in
each head on their own, as long as every tensor that carries them carries the heads as well.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

from metamerge.errors import StructureError

Axis = tuple[int, ...]
"""Factors of an axis, outermost first, each the number of an atom in ``Axes``."""


@dataclass(frozen=True)
class Parts:
    """Axes that lie one behind the other; each is resolved."""

    axes: tuple["Resolved", ...]


Resolved = tuple["int | Parts", ...]
"""An axis in terms of today's atoms: factors, outermost first, any of which may have parts."""


@dataclass
class Axes:
    """Atoms, the indivisible factors, that must be permuted together; one ``Axes`` per program.

    An atom is a number; atoms that were unified share a root. A root may be refined: ``factors``
    (outer, inner) or ``parts`` (one axis behind the other). ``outer`` lists, for every root, the
    sets of atoms that it may be nested in, one per atom that was unified; what they share counts.
    ``copies`` holds, for an atom that is nested in one that was cut, its own copy for each part.
    ``alike`` are atoms of a tensor of equal entries: any order is as good, so they tie nothing.
    """

    sizes: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    factors: dict[int, Axis] = field(default_factory=dict)
    parts: dict[int, tuple[Axis, ...]] = field(default_factory=dict)
    outer: dict[int, list[frozenset[int]]] = field(default_factory=dict)
    copies: dict[int, tuple[int, Axis]] = field(default_factory=dict)
    fixed: dict[int, str] = field(default_factory=dict)
    alike: set[int] = field(default_factory=set)

    def fresh(self, size: int, *, alike: bool = False) -> Axis:
        """A new axis of one factor with ``size`` entries (none at all where size is 1)."""
        return () if size == 1 else self._atom(size, alike=alike)

    def _atom(self, size: int, *, alike: bool = False) -> Axis:
        atom = len(self.parents)
        self.sizes.append(size)
        self.parents.append(atom)
        self.outer[atom] = []
        if alike:
            self.alike.add(atom)
        return (atom,)

    def read(self, axis: Axis) -> Axis:
        """The axis for one use of its tensor: where entries are equal, each use is on its own."""
        return tuple(
            self._atom(self.sizes[atom], alike=True)[0] if self._root(atom) in self.alike else atom
            for atom in axis
        )

    def size(self, axis: Axis) -> int:
        """Number of entries along the axis."""
        return prod(self.sizes[atom] for atom in axis)

    def resolve(self, axis: Axis) -> Resolved:
        """The axis in terms of today's atoms, outermost first."""
        return self._resolved(axis)

    def atoms(self, axis: Axis) -> list[int]:
        """Today's atoms of an axis, in order, those of all parts included."""
        return list(leaves(self.resolve(axis)))

    def unify(self, one: Axis, other: Axis, where: str) -> None:
        """Tie two axes of equal size, entry by entry.

        Args:
            one: First axis.
            other: Second axis.
            where: The operator that ties them, for the message.

        Raises:
            StructureError: If the sizes cannot be matched.
        """
        if self.size(one) != self.size(other):
            raise StructureError(
                f"{where} ties an axis of {self.size(one)} entries to one of {self.size(other)}."
            )
        left, right = self._wide(one), self._wide(other)
        while left and right:
            a, b = left[0], right[0]
            if a == b:
                left, right = left[1:], right[1:]
            elif self.sizes[a] == self.sizes[b] and not {a, b} & self.parts.keys():
                self._union(a, b)
            elif {a, b} & self.parts.keys():
                self._unify_parts(left, right, where)
                return
            else:
                self._split_larger(a, b, where)
            left, right = self._wide(tuple(left)), self._wide(tuple(right))

    def fix(self, axis: Axis, reason: str) -> None:
        """Forbid permuting the axis; the reason is kept for the report."""
        for atom in self.atoms(axis):
            self.fixed.setdefault(atom, reason)
            self.alike.discard(atom)

    def take(self, factors: list[int], size: int, where: str) -> Axis:
        """Remove factors from the front of ``factors`` that together make ``size`` entries.

        Args:
            factors: Roots, outermost first; shortened in place.
            size: Wanted number of entries.
            where: The operator, for the message.

        Returns:
            The axis made of the removed factors.

        Raises:
            StructureError: If the factors cannot be cut at that size.
        """
        taken: list[int] = []
        total = 1
        while total < size:
            if not factors:
                raise StructureError(f"{where} reshapes axes in a way that cannot be followed.")
            first, wanted = factors.pop(0), size // total
            if size % total == 0 and wanted % self.sizes[first] == 0:
                taken.append(first)
                total *= self.sizes[first]
            elif size % total == 0 and self.sizes[first] % wanted == 0:
                outer, inner = self.split(first, wanted, where)
                factors[:0] = self._roots(inner)
                taken += outer
                total *= wanted
            else:
                raise StructureError(
                    f"{where} cuts an axis of {self.sizes[first]} entries unevenly."
                )
        return tuple(taken)

    def roots(self, axis: Axis) -> list[int]:
        """Factors of an axis, those that have parts left whole."""
        return list(self._roots(axis))

    def split(self, atom: int, outer: int, where: str) -> tuple[Axis, Axis]:
        """Split a root of ``n`` into ``outer`` blocks of ``n / outer`` entries.

        Args:
            atom: The root.
            outer: Number of blocks.
            where: The operator, for the message.

        Returns:
            The two factors.

        Raises:
            StructureError: If the atom has parts that do not consist of whole blocks.
        """
        inner = self.sizes[atom] // outer
        if atom in self.parts:
            return self._split_parts(atom, inner, where)
        alike = atom in self.alike
        self.alike.discard(atom)
        pair = (self.fresh(outer, alike=alike), self.fresh(inner, alike=alike))
        self.factors[atom] = (*pair[0], *pair[1])
        for factor in pair[0]:
            self.outer[factor] = list(self.outer[atom])
        for factor in pair[1]:
            self.outer[factor] = [s | set(pair[0]) for s in self.outer[atom]] or [
                frozenset(pair[0])
            ]
        self._inherit(atom, self.factors[atom])
        return pair

    def joined(self, axes: Sequence[Axis]) -> Axis:
        """An axis whose parts are the given ones, one behind the other."""
        axes = [axis or self._atom(1) for axis in axes if self.size(axis) > 0]
        if len(axes) == 1:
            return tuple(axes[0])
        whole = self.fresh(sum(self.size(axis) for axis in axes))
        if whole:
            self.parts[whole[0]] = tuple(tuple(axis) for axis in axes)
        return whole

    def pick(self, axes: Sequence[Axis], dim: int, start: int, length: int, where: str) -> list:
        """Narrow one axis of a tensor, ``tensor.narrow(dim, start, length)``.

        Args:
            axes: Axes of the tensor.
            dim: The axis to narrow.
            start: First entry.
            length: Number of entries.
            where: The operator, for the message.

        Returns:
            Axes of the narrowed tensor; other axes change where they are nested in the narrowed.

        Raises:
            StructureError: If the piece does not consist of whole factors.
        """
        axes = list(axes)
        if not start and length == self.size(axes[dim]):
            return axes
        if not length:
            axes[dim] = self.fresh(0, alike=True)
            return axes
        first, *rest = self._wide(axes[dim])
        block = self.size(tuple(rest))
        if first not in self.parts:
            stop = start + length
            if start % block == 0 and stop % block == 0:
                self.cut(first, [start // block, stop // block])
            elif start // block == (stop - 1) // block:
                self.cut(first, [start // block, start // block + 1])
            else:
                return self._pick_across(axes, dim, start, length, where)
        offset = 0
        for index, part in enumerate(self.parts[first]):
            size = self.size(part) * block
            if offset <= start and start + length <= offset + size:
                axes = [self._of_part(axis, first, index) for axis in axes]
                axes[dim] = (*part, *self._of_part(tuple(rest), first, index))
                return self.pick(axes, dim, start - offset, length, where)
            offset += size
        return self._pick_across(axes, dim, start, length, where)

    def cut(self, atom: int, points: Iterable[int]) -> None:
        """Cut a root that has no parts yet before the given entries.

        Args:
            atom: The root.
            points: Where parts begin.
        """
        bounds = sorted({0, self.sizes[atom], *points})
        if len(bounds) == 2:
            return
        nested = [other for other in self._nested() if atom in self.nesting(other)]
        alike = atom in self.alike
        self.alike.discard(atom)
        parts = tuple(self._atom(b - a, alike=alike) for a, b in pairwise(bounds))
        self.parts[atom] = parts
        for part in parts:
            for factor in part:
                self.outer[factor] = list(self.outer[atom])
                self._inherit(atom, part)
        for other in nested:
            self.copies[other] = (atom, tuple(self._atom(self.sizes[other])[0] for _ in parts))
        for other in nested:
            for index, own in enumerate(self.copies[other][1]):
                self.outer[own] = [
                    frozenset(f for o in inner for f in self._of_part((o,), atom, index)) - {atom}
                    | frozenset(parts[index])
                    for inner in self.outer[other]
                ]
                self._inherit(other, (own,))

    def stacked(self, axes: Sequence[Axis]) -> tuple[Axis, Axis]:
        """Two axes of a tensor made of several, each with units of its own, stacked at the front.

        Args:
            axes: The units of each, all of one factor and of one size.

        Returns:
            The new axis, and the axis of the units, which is another for every entry of the first.
        """
        front = self.fresh(len(axes))
        units = self.fresh(self.size(axes[0]))
        self.parts[front[0]] = ((),) * len(axes)
        self.copies[units[0]] = (front[0], tuple(axis[0] for axis in axes))
        return front, units

    def nesting(self, atom: int) -> set[int]:
        """Today's atoms that a root may be nested in, by its own history alone."""
        sets = [
            {leaf for outer in inner for leaf in self.atoms_of_root(outer)}
            for inner in self.outer[atom]
        ]
        return set.intersection(*sets) - {atom} if sets else set()

    def atoms_of_root(self, atom: int) -> list[int]:
        """Atoms that an atom became, without giving up what is nested."""
        root = self._root(atom)
        if root in self.factors:
            return [leaf for factor in self.factors[root] for leaf in self.atoms_of_root(factor)]
        return [root]

    def carried(self, axis: Axis) -> set[int]:
        """Today's atoms of an axis, all copies of what is nested included; nothing is given up."""
        found: set[int] = set()
        for root in self._roots(axis, collapse=False):
            if root in self.copies:
                found |= self.carried(self.copies[root][1])
            elif root in self.parts:
                for part in self.parts[root]:
                    found |= self.carried(part)
            else:
                found.add(root)
        return found

    def give_up_copies(self, axes: Sequence[Axis]) -> None:
        """Tie the copies of what is nested in an axis that this tensor does not carry."""
        roots = {root for axis in axes for root in self._roots(axis, collapse=False)}
        for root in roots:
            if root in self.copies and self.copies[root][0] not in roots:
                self._collapse(root)

    def holds_nested(self, atom: int) -> bool:
        """Whether other atoms may be permuted on their own in each entry of a root."""
        return any(atom in self.nesting(other) for other in self._nested())

    def _wide(self, axis: Axis) -> list[int]:
        """Factors of an axis, but those of a single entry; that alone if there are no others."""
        roots = list(self._roots(axis))
        wide = [root for root in roots if self.sizes[root] > 1]
        return wide or roots[:1]

    def _nested(self) -> list[int]:
        """Roots that may be nested in others and are not refined yet."""
        refined = self.factors.keys() | self.parts.keys() | self.copies.keys() | self.fixed.keys()
        return [
            a for a, sets in self.outer.items() if sets and a not in refined and self.sizes[a] > 1
        ]

    def _roots(self, axis: Axis, *, collapse: bool = True) -> tuple[int, ...]:
        """Factors of an axis in terms of roots that are no products; parts stay whole."""
        found: list[int] = []
        pending = list(axis)
        while pending:
            root = self._root(pending.pop(0))
            if root in self.factors:
                pending[:0] = self.factors[root]
            elif collapse and root in self.copies and self.copies[root][0] not in found:
                self._collapse(root)
                pending.insert(0, root)
            else:
                found.append(root)
        return tuple(found)

    def _collapse(self, root: int) -> None:
        """Make the copies of a nested atom one again: it is permuted alike in every part."""
        _, copies = self.copies.pop(root)
        for copy in copies:
            self.unify((root,), (copy,), "a nested axis")

    def _resolved(self, axis: Axis) -> Resolved:
        out: list[int | Parts] = []
        roots = self._roots(axis)
        for place, root in enumerate(roots):
            if root not in self.parts:
                out.append(root)
                continue
            rest = roots[place + 1 :]
            nested = any(self.copies.get(r, (None,))[0] == root for r in rest)
            follow = rest if nested else ()
            parts = [
                self._resolved((*part, *self._of_part(follow, root, index)))
                for index, part in enumerate(self.parts[root])
            ]
            out.append(Parts(tuple(inner for part in parts for inner in _inlined(part))))
            if nested:
                break
        wide = tuple(i for i in out if isinstance(i, Parts) or self.sizes[i] > 1)
        return wide or tuple(out[:1])

    def _of_part(self, axis: Axis, cut: int, index: int) -> Axis:
        """The axis for entries of one part of a cut atom: nested atoms become their copies."""
        return tuple(
            self.copies[root][1][index]
            if root in self.copies and self.copies[root][0] == cut
            else root
            for root in self._roots(axis, collapse=False)
        )

    def _pick_across(
        self, axes: list[Axis], dim: int, start: int, length: int, where: str
    ) -> list[Axis]:
        """``pick`` for a piece that has a share in several parts."""
        first, *rest = self._wide(axes[dim])
        for root in {r for axis in axes for r in self._roots(axis, collapse=False)}:
            if root in self.copies and self.copies[root][0] == first:
                self._collapse(root)
        block, stop = self.size(tuple(rest)), start + length
        bounds = {b for b in self._bounds([first, *rest]) if start < b < stop}
        if first not in self.parts:  # what sticks out on either side of whole blocks
            bounds = {-(-start // block) * block, stop // block * block}
        cuts = [start, *sorted(b for b in bounds if start < b < stop), stop]
        whole = axes[dim]
        axes[dim] = self.joined(
            [self.pick([whole], 0, low, high - low, where)[0] for low, high in pairwise(cuts)]
        )
        return axes

    def _unify_parts(self, left: list[int], right: list[int], where: str) -> None:
        """Unify two axes of which one begins with parts: cut both at the other's bounds."""
        bounds = sorted({*self._bounds(left), *self._bounds(right)})
        for low, high in pairwise(bounds):
            one = self.pick([tuple(left)], 0, low, high - low, where)[0]
            other = self.pick([tuple(right)], 0, low, high - low, where)[0]
            self.unify(one, other, where)

    def _bounds(self, roots: list[int]) -> list[int]:
        if not roots or roots[0] not in self.parts:
            return [0, self.size(tuple(roots))]
        block = self.size(tuple(roots[1:]))
        bounds = [0]
        for part in self.parts[roots[0]]:
            bounds += [bounds[-1] + b * block for b in self._bounds(list(self._roots(part)))[1:]]
        return bounds

    def _split_larger(self, a: int, b: int, where: str) -> None:
        large, small = (a, b) if self.sizes[a] > self.sizes[b] else (b, a)
        if self.sizes[large] % self.sizes[small]:
            raise StructureError(
                f"{where} ties an axis of {self.sizes[a]} entries to one of {self.sizes[b]}, "
                "and neither divides the other."
            )
        self.split(large, self.sizes[small], where)

    def _split_parts(self, atom: int, inner: int, where: str) -> tuple[Axis, Axis]:
        """Split an axis of parts into blocks: the entries of all blocks are permuted alike."""
        for root in [r for r, (cut, _) in self.copies.items() if cut == atom]:
            self._collapse(root)
        sizes = [self.size(part) for part in self.parts[atom]]
        if any(size % inner for size in sizes):
            raise StructureError(f"{where} splits parts of {sizes} into blocks of {inner}.")
        within = self.fresh(inner)
        blocks = [self.fresh(size // inner) for size in sizes]
        for part, block in zip(self.parts[atom], blocks, strict=True):
            self.unify(part, (*block, *within), where)
        outer = self.joined(blocks)
        self.parts.pop(atom)
        self.factors[atom] = (*outer, *within)
        return outer, within

    def _root(self, atom: int) -> int:
        while self.parents[atom] != atom:
            atom = self.parents[atom]
        return atom

    def _union(self, a: int, b: int) -> None:
        keep, drop = min(a, b), max(a, b)
        self.parents[drop] = keep
        self.outer[keep] = self.outer[keep] + self.outer.pop(drop)
        if not {a, b} <= self.alike:
            self.alike -= {a, b}
        if drop in self.fixed:
            self.fixed.setdefault(keep, self.fixed.pop(drop))

    def _inherit(self, atom: int, children: Axis) -> None:
        if atom in self.fixed:
            for child in children:
                self.fixed.setdefault(child, self.fixed[atom])


def _inlined(part: Resolved) -> tuple[Resolved, ...]:
    """Parts of a part are parts."""
    return part[0].axes if len(part) == 1 and isinstance(part[0], Parts) else (part,)


def leaves(resolved: Resolved) -> Iterable[int]:
    """Atoms of a resolved axis in order, those of all parts included."""
    for item in resolved:
        if isinstance(item, Parts):
            for axis in item.axes:
                yield from leaves(axis)
        else:
            yield item
