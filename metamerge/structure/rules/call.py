"""One operator call, as the rules see it: arguments by name, and the axes of every tensor."""

from dataclasses import dataclass, field
from typing import Any

from metamerge.errors import StructureError
from metamerge.structure.axes import Axes, Axis
from metamerge.structure.program import Node, Program, Ref

POSITIONS = "positions"
"""Reason of axes along which neighbours matter: pixels, tokens, time steps, taps of a kernel."""

Values = dict[str, Any]
"""Value -> its axes, or a list of these where an operator has several outputs."""


@dataclass(frozen=True)
class Call:
    """An operator call whose effect on axes is to be worked out.

    Attributes:
        axes: The atoms of the program.
        node: The call.
        values: Axes of every value so far.
        program: The traced network.
        implied: Axes of tensors that operators compute inside, such as the statistics of a
            normalisation; what is nested in other axes must carry these there as well.
    """

    axes: Axes
    node: Node
    values: Values
    program: Program
    implied: list[list[Axis]] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        """Argument by its name in the operator's schema, defaults filled in."""
        return self.node.arguments[name]

    @property
    def where(self) -> str:
        """The operator and its place in the graph, for messages."""
        return f"{self.node.op} ({self.node.name})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output, as traced."""
        return self.program.shape(self.node.name)

    def axes_of(self, argument: Any) -> list[Axis] | None:
        """Axes of an argument's value; None where it is no tensor."""
        found = self.values.get(argument.name) if isinstance(argument, Ref) else None
        return None if found is None else [self.axes.read(axis) for axis in found]

    def tensor(self, name: str = "self") -> list[Axis]:
        """Axes of a tensor argument.

        Args:
            name: Its name in the schema.

        Returns:
            Its axes.

        Raises:
            StructureError: If the argument is no tensor.
        """
        found = self.axes_of(self[name])
        if found is None:
            raise StructureError(f"{self.where}: argument {name!r} is no tensor.")
        return found

    def optional(self, name: str) -> list[Axis] | None:
        """Axes of a tensor argument, or None where it was left out."""
        return self.axes_of(self.node.arguments.get(name))

    def tensors(self) -> list[list[Axis]]:
        """Axes of every tensor that is read, in order."""
        found = (self.axes_of(Ref(name)) for name in self.node.refs)
        return [axes for axes in found if axes is not None]

    def reads_output(self, index: int) -> bool:
        """Whether any operator takes this one of several outputs."""
        taken = (Ref(self.node.name), index)
        return any(n.op == "python.getitem" and n.args == taken for n in self.program.nodes)

    def number(self, value: Any) -> int:
        """A size that may have been computed from the batch."""
        if isinstance(value, Ref):
            raise StructureError(f"{self.where}: a size that is computed is not followed.")
        return value

    def unify(self, one: Axis, other: Axis) -> None:
        """Tie two axes; one of a single entry is broadcast and ties nothing."""
        if self.axes.size(one) != 1 and self.axes.size(other) != 1:
            self.axes.unify(one, other, self.where)

    def match(self, one: list[Axis], other: list[Axis]) -> None:
        """Tie two lists of axes, one by one."""
        for a, b in zip(one, other, strict=True):
            self.unify(a, b)

    def fix(self, *axes: Axis, reason: str = POSITIONS) -> None:
        """Forbid permuting the axes."""
        for axis in axes:
            self.axes.fix(axis, reason)

    def fresh(self, size: int) -> Axis:
        """A new axis whose entries are all alike, so that any order is as good."""
        return self.axes.fresh(size, alike=True)

    def ordered(self, size: int, reason: str = POSITIONS) -> Axis:
        """A new axis whose entries keep their place."""
        axis = self.axes.fresh(size)
        self.axes.fix(axis, reason)
        return axis

    def broadcast(self, *tensors: list[Axis]) -> list[Axis]:
        """Axes of tensors that are combined entry by entry, aligned at the last axis."""
        width = max(len(axes) for axes in tensors)
        padded = [[()] * (width - len(axes)) + list(axes) for axes in tensors]
        result = []
        for column in zip(*padded, strict=True):
            wide = [axis for axis in column if self.axes.size(axis) != 1]
            for axis in wide[1:]:
                self.axes.unify(wide[0], axis, self.where)
            result.append(wide[0] if wide else ())
        return result
