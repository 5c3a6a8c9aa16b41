"""What the axes of a tensor are made of: factors and parts, each permuted as a group or fixed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A factor of an axis: ``size`` entries, permuted as ``group``; fixed where that is None.

    ``reason`` says why a fixed factor keeps its place.
    """

    group: str | None
    size: int
    reason: str = ""


@dataclass(frozen=True)
class Concat:
    """A factor of an axis that is made of axes one behind the other."""

    axes: tuple["AxisSpec", ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(axis_length(axis) for axis in self.axes)


AxisSpec = tuple["Factor | Concat", ...]
"""Factors of an axis, outermost first."""


class Place(NamedTuple):
    """One factor of one axis, entry by entry: which unit of its group each entry belongs to.

    ``labels`` ``[size]`` is -1 where an entry belongs to other parts; ``stride`` is the distance
    between entries of neighbouring units.
    """

    group: str
    labels: Tensor
    stride: Tensor


def axis_length(axis: AxisSpec) -> int:
    """Number of entries along an axis."""
    return prod(factor.size for factor in axis)


def axis_factors(axis: AxisSpec) -> Iterator[Factor]:
    """Every factor of an axis, those of its parts included."""
    for factor in axis:
        if isinstance(factor, Concat):
            for part in factor.axes:
                yield from axis_factors(part)
        else:
            yield factor


def axis_places(axis: AxisSpec) -> Iterator[Place]:
    """Every permuted factor of an axis with its labels and strides."""
    size, inner = axis_length(axis), axis_length(axis)
    for factor in axis if size else ():  # an axis without entries permutes nothing
        inner //= factor.size
        if isinstance(factor, Concat):
            yield from _places_of_parts(factor, size, inner)
        elif factor.group is not None:
            labels = torch.arange(size) // inner % factor.size
            yield Place(factor.group, labels, torch.full((size,), inner))


def _places_of_parts(concat: Concat, size: int, inner: int) -> Iterator[Place]:
    """Places of the parts, spread over an axis where the concatenation is one factor."""
    entry = torch.arange(size) // inner % concat.size
    offset = 0
    for part in concat.axes:
        length = axis_length(part)
        for place in axis_places(part):
            whole = torch.full((concat.size,), -1)
            whole[offset : offset + length] = place.labels
            stride = torch.ones(concat.size, dtype=torch.long)
            stride[offset : offset + length] = place.stride * inner
            yield Place(place.group, whole[entry], stride[entry])
        offset += length


def labels_of(places: Sequence[Place], group: str) -> Tensor:
    """Labels of a group along an axis, -1 where an entry is not of the group."""
    return torch.stack([place.labels for place in places if place.group == group]).amax(0)


def pin(axis: AxisSpec, group: str, why: str) -> AxisSpec:
    """The axis with a group made fixed."""
    return tuple(
        Concat(tuple(pin(part, group, why) for part in factor.axes))
        if isinstance(factor, Concat)
        else Factor(None, factor.size, why)
        if factor.group == group
        else factor
        for factor in axis
    )


def axis_to_json(axis: AxisSpec) -> list[Any]:
    """Plain types only; read back by ``axis_from_json``."""
    return [
        {"concat": [axis_to_json(part) for part in factor.axes]}
        if isinstance(factor, Concat)
        else [factor.group, factor.size, *([factor.reason] if factor.reason else [])]
        for factor in axis
    ]


def axis_from_json(axis: Sequence[Any]) -> AxisSpec:
    """Read back what ``axis_to_json`` wrote."""
    return tuple(
        Concat(tuple(axis_from_json(part) for part in factor["concat"]))
        if isinstance(factor, Mapping)
        else Factor(*factor)
        for factor in axis
    )
