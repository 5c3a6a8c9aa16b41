"""The same architecture with other numbers of units: its program, and where entries go.

A traced program holds sizes in the arguments of its operators: those of a reshape, the groups of a
convolution. All of them follow from what the axes of values carry, so a network can be widened or
narrowed without the code that made it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from metamerge.errors import StructureError
from metamerge.structure.axes import Axis, Parts, Resolved
from metamerge.structure.factors import AxisSpec, Concat, axis_length
from metamerge.structure.lockstep import run
from metamerge.structure.program import Node, Program, operator
from metamerge.structure.spec import PermutationSpec
from metamerge.structure.walk import Walk
from metamerge.weights import Weights

Widths = Mapping[str, int]
"""Group -> number of units; a group that is left out keeps its own."""


def resized(program: Program, spec: PermutationSpec, widths: Widths) -> Program:
    """The program of a network that has other numbers of units and is the same in all else.

    Args:
        program: The traced network.
        spec: Its permutation spec.
        widths: Numbers of units.

    Returns:
        The program. What a shape cannot tell, such as the factor in an attention's scores, stays.

    Raises:
        StructureError: If a group is unknown or would have no units, or the network holds a size
            that cannot be followed.
    """
    unknown = sorted(set(widths) - set(spec.groups))
    if unknown or min(widths.values(), default=1) < 1:
        raise StructureError(
            f"widths: {dict(widths)}; expected 1 or more units for each of {sorted(spec.groups)}."
        )
    sizing = _Sizing(program, spec, widths)
    made = replace(
        program,
        nodes=tuple(sizing.node(node) for node in program.nodes),
        sizes={name: sizing.shape(name) for name in program.sizes},
    )
    _check(made)
    return made


def places(axis: AxisSpec, widths: Widths, first: Widths) -> Tensor:
    """Where the entries of an axis are on the same axis of a wider network.

    Args:
        axis: Factors of the axis.
        widths: Numbers of units of the wider network.
        first: Group -> the unit of the wider network that its first unit is; 0 if left out.

    Returns:
        One place per entry, ``[size]``.
    """
    found = torch.zeros(1, dtype=torch.long)
    for factor in axis:
        if isinstance(factor, Concat):
            lengths = [wide_length(part, widths) for part in factor.axes]
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            parts = zip(starts, factor.axes, strict=True)
            own = torch.cat([start + places(part, widths, first) for start, part in parts])
            size = sum(lengths)
        else:
            own = torch.arange(factor.size) + first.get(factor.group, 0)
            size = widths.get(factor.group, factor.size)
        found = (found[:, None] * size + own).flatten()
    return found


def wide_length(axis: AxisSpec, widths: Widths) -> int:
    """Number of entries of an axis with other numbers of units."""
    return prod(
        sum(wide_length(part, widths) for part in factor.axes)
        if isinstance(factor, Concat)
        else widths.get(factor.group, factor.size)
        for factor in axis
    )


def narrowed(weights: Weights, spec: PermutationSpec, widths: Widths) -> Weights:
    """The first units of every group, cut out of all axes that carry it.

    Args:
        weights: One state dict.
        spec: Its permutation spec.
        widths: Numbers of units to keep.

    Returns:
        New weights; tensors that carry none of the groups are copied.
    """
    made = {}
    for key, tensor in weights.items():
        kept = tensor
        for number, axis in enumerate(spec.axes.get(key, ())):
            index = places(_with_sizes(axis, widths), spec.groups, {})
            if len(index) < axis_length(axis):
                kept = kept.index_select(number, index.to(kept.device))
        made[key] = kept.clone() if kept is tensor else kept
    return made


def _with_sizes(axis: AxisSpec, widths: Widths) -> AxisSpec:
    return tuple(
        Concat(tuple(_with_sizes(part, widths) for part in factor.axes))
        if isinstance(factor, Concat)
        else replace(factor, size=widths.get(factor.group, factor.size))
        for factor in axis
    )


@dataclass(frozen=True)
class _Sizing:
    """Sizes of a program's values when groups have other numbers of units."""

    program: Program
    spec: PermutationSpec
    widths: Widths

    @cached_property
    def walk(self) -> Walk:
        walk = Walk(self.program, partial=bool(self.spec.pinned))
        walk.spec()  # resolves axes and names their atoms
        return walk

    def length(self, axis: Axis) -> int:
        """New number of entries of an axis."""
        return self._length(self.walk.axes.resolve(axis))

    def _length(self, axis: Resolved) -> int:
        return prod(
            sum(self._length(part) for part in item.axes)
            if isinstance(item, Parts)
            else self._atom(item)
            for item in axis
        )

    def _atom(self, atom: int) -> int:
        group = self.walk.names.get(atom)
        return self.widths.get(group, self.walk.axes.sizes[atom])

    def shape(self, name: str) -> tuple[int, ...]:
        """New shape of a value; an axis that grows with the batch stays negative."""
        axes, sizes = self.walk.values.get(name), self.program.sizes[name]
        if axes is None:
            return sizes
        pairs = zip(axes, sizes, strict=True)
        return tuple(self.length(axis) * (-1 if size < 0 else 1) for axis, size in pairs)

    def node(self, node: Node) -> Node:
        """The operator call with new sizes."""
        known = node.op.startswith(("python.", "sym_size")) or node.op not in _SIZED
        return node if known else _SIZED[node.op](self, node)

    def axes(self, node: Node, argument: str) -> list[Axis]:
        """Axes of a tensor that a call reads."""
        return self.walk.values[node.arguments[argument].name]

    def leading(self, axis: Axis, blocks: int) -> int:
        """New number of blocks of an axis that consists of some."""
        made, total = 1, 1
        for item in self.walk.axes.resolve(axis):
            if total == blocks:
                break
            sizes = self.walk.axes.sizes
            total *= self._old((item,)) if isinstance(item, Parts) else sizes[item]
            made *= self._length((item,))
        if total != blocks:
            raise StructureError(f"blocks of {blocks} are no factor of an axis")
        return made

    def _old(self, axis: Resolved) -> int:
        return prod(
            sum(self._old(part) for part in item.axes)
            if isinstance(item, Parts)
            else self.walk.axes.sizes[item]
            for item in axis
        )

    def bound(self, axis: Axis, place: int) -> int:
        """Where a slice begins or ends on the new axis."""
        old, new = self.walk.axes.size(axis), self.length(axis)
        if old == new or not 0 < place < old:
            return place if place <= 0 or old == new else max(place, new)
        first, *rest = self.walk.axes.resolve(axis)
        block, wide = self._old(tuple(rest)), self._length(tuple(rest))
        offset, start = 0, 0
        for part in first.axes if isinstance(first, Parts) else ():
            if offset == place:
                break
            offset += self._old(part) * block
            start += self._length(part) * wide
        if offset != place:
            raise StructureError(f"a slice that begins or ends at entry {place} cuts units")
        return start


def _with(node: Node, **changed: Any) -> Node:
    """The call with other values of some arguments."""
    names = [argument.name for argument in operator(node.op)._schema.arguments]
    args = [changed.get(name, value) for name, value in zip(names, node.args, strict=False)]
    left = {n: v for n, v in changed.items() if n not in names[: len(args)]}
    return replace(node, args=tuple(args), kwargs={**node.kwargs, **left})


def _shaped(argument: str) -> Callable[[_Sizing, Node], Node]:
    """Operators that are told the shape of what they make."""

    def change(sizing: _Sizing, node: Node) -> Node:
        made, told = sizing.shape(node.name), node.arguments[argument]
        new = [
            size if not isinstance(size, int) or size < 0 else abs(found)
            for size, found in zip(told, made, strict=True)
        ]
        return _with(node, **{argument: tuple(new)})

    return change


def _unflattened(sizing: _Sizing, node: Node) -> Node:
    told, made = node.arguments["sizes"], sizing.shape(node.name)
    start = node.arguments["dim"] % (len(made) - len(told) + 1)
    found = made[start : start + len(told)]
    new = [abs(f) if isinstance(s, int) and s > 0 else s for s, f in zip(told, found, strict=True)]
    return _with(node, sizes=tuple(new))


def _split(sizing: _Sizing, node: Node) -> Node:
    several, dim = sizing.walk.values[node.name], node.arguments["dim"]
    new = tuple(sizing.length(axes[dim % len(axes)]) for axes in several)
    if "split_sizes" in node.arguments:
        return _with(node, split_sizes=new)
    told = node.arguments["split_size"]
    if isinstance(told, tuple):
        return _with(node, split_size=new)
    if len({*new[:-1]}) > 1 or new[-1] > new[0]:
        raise StructureError(f"{node.title}: pieces of one size would become pieces of {new}.")
    return _with(node, split_size=new[0])


def _slice(sizing: _Sizing, node: Node) -> Node:
    axes = sizing.axes(node, "self")
    axis = axes[node.arguments["dim"] % len(axes)] if axes else ()
    size, step = sizing.walk.axes.size(axis), node.arguments["step"]
    if size == sizing.length(axis):
        return node
    if step != 1:
        raise StructureError(f"{node.title}: takes every {step}-th of the units.")
    told = [node.arguments[name] for name in ("start", "end")]
    bounds = [b + size if isinstance(b, int) and b < 0 else b for b in told]
    start, end = (b if b is None else sizing.bound(axis, b) for b in bounds)
    return _with(node, start=start, end=end)


def _grouped(sizing: _Sizing, node: Node) -> Node:
    groups = node.arguments["groups"]
    if groups == 1:
        return node
    weight = sizing.axes(node, "weight")
    spatial = len(weight) - 2
    channels = sizing.axes(node, "input")[-spatial - 1]
    return _with(node, groups=sizing.length(channels) // sizing.length(weight[1]))


def _group_norm(sizing: _Sizing, node: Node) -> Node:
    blocks = node.arguments["num_groups"]
    return _with(node, num_groups=sizing.leading(sizing.axes(node, "input")[1], blocks))


def _layer_norm(sizing: _Sizing, node: Node) -> Node:
    told = node.arguments["normalized_shape"]
    made = sizing.shape(node.name)[-len(told) :]
    return _with(node, normalized_shape=tuple(map(abs, made)))


_CONVOLUTIONS = [f"conv{d}d.{form}" for d in (1, 2, 3) for form in ("default", "padding")]
_SIZED: dict[str, Callable[[_Sizing, Node], Node]] = {
    "reshape.default": _shaped("shape"),
    **dict.fromkeys(("expand.default", "broadcast_to.default"), _shaped("size")),
    **dict.fromkeys(("zeros.default", "ones.default", "full.default"), _shaped("size")),
    **{f"new_{kind}.default": _shaped("size") for kind in ("zeros", "ones", "full", "empty")},
    "unflatten.int": _unflattened,
    **dict.fromkeys(("split.Tensor", "split_with_sizes.default", "split.sizes"), _split),
    "slice.Tensor": _slice,
    **dict.fromkeys(_CONVOLUTIONS, _grouped),
    "group_norm.default": _group_norm,
    **dict.fromkeys(("layer_norm.default", "rms_norm.default"), _layer_norm),
}


def _check(program: Program) -> None:
    """Run the new program without numbers: a size that was not followed does not fit."""
    told = program.indices or program.examples or program.constants
    home = "cpu" if told else "meta"  # without values there is nothing to be computed
    weights = {
        key: program.indices.get(key, torch.zeros(program.shape(value), device=home))
        for value, key in program.parameters.items()
    }
    inputs = [
        program.examples.get(name, torch.zeros(program.shape(name), device=home))
        for name in program.inputs
    ]
    try:
        made = run(program, weights, inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise StructureError(
            f"The network holds a size that does not follow its units: {error} Write the size in "
            "forward() in terms of the tensors' own shapes."
        ) from error
    if tuple(made.shape) != program.shape(program.output):
        raise StructureError(
            f"The network puts out {tuple(made.shape)} with other numbers of units, expected "
            f"{program.shape(program.output)}."
        )
