"""The walk through a traced network: which axes of which values belong together, and the spec."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from metamerge.errors import StructureError
from metamerge.structure.axes import Axes, Axis, Parts, Resolved, leaves
from metamerge.structure.factors import AxisSpec, Concat, Factor
from metamerge.structure.program import Program
from metamerge.structure.rules import GATES, LOOKED_UP, POSITIONS, TAPS, Call, rule_of
from metamerge.structure.rules.call import Values
from metamerge.structure.spec import PermutationSpec

INPUTS, OUTPUT_AXES, CONSTANTS = "inputs", "outputs", "constants"
ALONE = "no other unit is like it"
_NO_UNITS = {INPUTS, OUTPUT_AXES, POSITIONS, TAPS, GATES, LOOKED_UP}
"""Reasons of axes that hold no hidden units at all."""


@dataclass
class Walk:
    """One pass through a program, and what it found."""

    program: Program
    partial: bool

    def __post_init__(self) -> None:
        self.axes = Axes()
        self.values: Values = {}
        self.pinned: list[str] = []
        self.implied: list[list[Axis]] = []
        self._begin()
        for node in self.program.nodes:
            self._follow(Call(self.axes, node, self.values, self.program, self.implied))
        for name in self.program.outputs:
            for axis in self.values.get(name, ()):
                self.axes.fix(axis, OUTPUT_AXES)
        for axes in self._tensors():
            self.axes.give_up_copies(axes)

    def spec(self) -> PermutationSpec:
        """The permutation spec of what was found.

        Returns:
            The spec, not proved yet.
        """
        resolved = self._resolved()
        self.names = self._names(resolved)
        axes = {key: tuple(map(self._axis_spec, found)) for key, found in resolved.items()}
        axes |= {alias: axes[key] for alias, key in self.program.tied.items()}
        groups = {name: self.axes.sizes[atom] for atom, name in self.names.items()}
        hidden = self._hidden(resolved)
        return PermutationSpec(
            groups, axes, self._within(), pinned=tuple(self.pinned), hidden=hidden
        )

    def _resolved(self) -> dict[str, list[Resolved]]:
        """Axes of all parameters; resolving one may tie copies that another holds, so twice."""
        found: dict[str, list[Resolved]] = {}
        while True:
            before, found = (
                found,
                {
                    key: [self.axes.resolve(axis) for axis in self.values[value]]
                    for value, key in self.program.parameters.items()
                },
            )
            if found == before:
                return found

    def carried(self, spec: PermutationSpec) -> dict[str, list[list[str]]]:
        """Groups that each axis of each value carries.

        Args:
            spec: The spec whose groups are asked for.

        Returns:
            Value -> for each axis the names of its groups, one per factor.
        """
        return {
            value: [
                [self.names[a] for a in self.axes.carried(axis) if self.names.get(a) in spec.groups]
                for axis in axes
            ]
            for value, axes in self.values.items()
            if isinstance(axes, list) and not _several(axes)
        }

    def _begin(self) -> None:
        """Axes of everything that is there before the first operator."""
        for value, key in self.program.parameters.items():
            self.values[value] = [self.axes.fresh(n) for n in self.program.shape(value)]
            if key in self.program.indices:
                self._fix(value, LOOKED_UP)
        for value, tensor in self.program.constants.items():
            self.values[value] = [
                self.axes.fresh(size, alike=bool((tensor == tensor.narrow(d, 0, 1)).all()))
                for d, size in enumerate(tensor.shape)
            ]
            for axis in self.values[value]:
                if not {*axis} <= self.axes.alike:
                    self.axes.fix(axis, CONSTANTS)
        for value in self.program.inputs:
            self.values[value] = [self.axes.fresh(n) for n in self.program.shape(value)]
            self._fix(value, INPUTS)

    def _follow(self, call: Call) -> None:
        """Work out the axes of one node's output."""
        node = call.node
        if node.op == "python.getitem":
            self._take_output(call)
            return
        if node.op.startswith(("python.", "sym_size")):
            return  # a size, not a tensor
        rule = rule_of(node.op)
        try:
            if rule is None:
                raise StructureError("it has no rule")
            found = rule(call)
            self._check(call, found)
        except StructureError as error:
            found = self._give_up(call, error)
        self.values[node.name] = found

    def _take_output(self, call: Call) -> None:
        source, index = call.node.args
        several = self.values.get(source.name)
        shape = call.shape
        if several is None:
            self.values[call.node.name] = [call.ordered(size) for size in shape]
            return
        self.values[call.node.name] = [
            call.ordered(size) if axis is None else axis
            for axis, size in zip(several[index], shape, strict=True)
        ]

    def _check(self, call: Call, found: list) -> None:
        """A rule whose axes do not have the sizes that were traced is wrong about the operator."""
        if _several(found):
            return
        sizes = tuple(self.axes.size(axis) for axis in found)
        if sizes != call.shape:
            raise StructureError(f"its rule finds axes of {sizes}, the network has {call.shape}")

    def _give_up(self, call: Call, error: StructureError) -> list | None:
        """Pin the units at an operator that cannot be followed, where that is allowed.

        Operators on nothing but fixed axes (masks, positions) need no rule.

        Returns:
            Axes of the output, all fixed; None where there are several outputs.

        Raises:
            StructureError: If units are touched and ``partial`` is off.
        """
        node = call.node
        read = [axes for name in node.refs if (axes := self.values.get(name)) is not None]
        atoms = {
            atom
            for axes in read
            for axis in (_flat(axes) if _several(axes) else axes)
            for atom in self.axes.atoms(axis)
        }
        free = {a for a in atoms if a not in self.axes.fixed and a not in self.axes.alike}
        carriers = [
            f"{key} {self.program.shape(value)}"
            for value, key in self.program.parameters.items()
            if free & {a for axis in self.values[value] for a in self.axes.atoms(axis)}
        ]
        if carriers and not self.partial:
            raise StructureError(
                f"Operator {node.title} cannot be followed: {error}. It reads "
                f"{[self.program.parameters.get(ref, ref) for ref in node.refs]} and touches units "
                f"of {carriers[:4]}. Pass partial=True to pin these units and go on."
            ) from error
        if carriers:
            self.pinned.append(f"units of {', '.join(carriers[:4])} at {node.title}: {error}")
        for atom in free:
            self.axes.fix((atom,), f"{node.title.split()[0]} cannot be followed")
        if node.name not in self.program.sizes:
            return None
        return [call.ordered(size) for size in call.shape]

    def _fix(self, value: str, reason: str) -> None:
        for axis in self.values[value]:
            self.axes.fix(axis, reason)

    def _tensors(self) -> Iterable[list[Axis]]:
        for axes in self.values.values():
            if axes is not None and not _several(axes):
                yield axes
        yield from self.implied

    def _names(self, resolved: dict[str, list[Resolved]]) -> dict[int, str]:
        """Group names: the module that a unit is first seen in."""
        names: dict[int, str] = {}
        taken: Counter[str] = Counter()
        for key, axes in resolved.items():
            base = key.rpartition(".")[0] or key
            for atom in (a for axis in axes for a in leaves(axis)):
                if atom in self.axes.fixed or atom in names or self.axes.sizes[atom] == 1:
                    continue
                taken[base] += 1
                names[atom] = base if taken[base] == 1 else f"{base}#{taken[base]}"
        return names

    def _within(self) -> dict[str, tuple[str, ...]]:
        """What each group is nested in: only blocks that every tensor with the group carries."""
        nested = {atom: self.axes.nesting(atom) & self.names.keys() for atom in self.names}
        for axes in self._tensors():
            here = {atom for axis in axes for atom in self.axes.carried(axis)}
            for atom in here & nested.keys():
                nested[atom] &= here
        order = {atom: i for i, atom in enumerate(self.names)}
        _close(nested, order)
        return {
            self.names[atom]: tuple(self.names[o] for o in sorted(outer, key=order.__getitem__))
            for atom, outer in nested.items()
            if outer
        }

    def _axis_spec(self, axis: Resolved) -> AxisSpec:
        return tuple(
            Concat(tuple(self._axis_spec(part) for part in item.axes))
            if isinstance(item, Parts)
            else Factor(self.names.get(item), self.axes.sizes[item], self._reason(item))
            for item in axis
        ) or (Factor(None, 1),)

    def _reason(self, atom: int) -> str:
        """Why an atom keeps its place; nothing where it does not."""
        return self.axes.fixed.get(atom, ALONE * (self.axes.sizes[atom] == 1))

    def _hidden(self, resolved: dict[str, list[Resolved]]) -> tuple[int, int]:
        """Hidden units, and those of them that some group moves.

        A hidden unit is an entry of an axis of weights that is not an input, an output, a position,
        a tap or a word of the vocabulary; the same unit in several tensors counts once.

        Returns:
            Number of hidden units, and of the free ones.
        """
        terms = {t for axes in resolved.values() for axis in axes for t in _terms(axis)}
        hidden = free = 0
        for term in terms:
            atoms = list(leaves(term))
            if not atoms or all(self.axes.fixed.get(a) in _NO_UNITS for a in atoms):
                continue
            size = _entries(term, self.axes.sizes)
            hidden += size
            free += size * any(a in self.names for a in atoms)
        return hidden, free


def _close(nested: dict[int, set[int]], order: dict[int, int]) -> None:
    """Leave only nestings that are consistent.

    Who is nested in a block is nested in whatever the block is nested in, or not in the block: the
    block's units move with it. Of two atoms that could be nested in each other, the first is outer.
    """
    pending = True
    while pending:
        pending = False
        for atom, outer in nested.items():
            for other in sorted(outer, key=order.__getitem__):
                mutual = atom in nested[other]
                if mutual and order[atom] > order[other]:
                    nested[other].discard(atom)
                    pending = True
                elif mutual or not nested[other] <= outer:
                    outer.discard(other)
                    pending = True
                    break


def _several(axes: list) -> bool:
    """Whether these are the axes of several outputs rather than of one."""
    return any(isinstance(axis, list) for axis in axes)


def _flat(axes: list) -> list[Axis]:
    return [axis for one in axes for axis in one if axis is not None]


def _terms(axis: Resolved) -> Iterable[Resolved]:
    """The parts of an axis, each on its own."""
    if len(axis) == 1 and isinstance(axis[0], Parts):
        for part in axis[0].axes:
            yield from _terms(part)
    else:
        yield axis


def _entries(axis: Resolved, sizes: list[int]) -> int:
    total = 1
    for item in axis:
        total *= (
            sum(_entries(part, sizes) for part in item.axes)
            if isinstance(item, Parts)
            else sizes[item]
        )
    return total
