"""Batch normalisation: running statistics of fused weights, measured anew.

Averaged networks do not have averaged statistics: their running means and variances have to be
those of their own pre-activations (Ainsworth et al., arXiv:2209.04836, and Jordan et al.,
arXiv:2211.08403, section 4.1, name this as what makes or breaks networks with BatchNorm).
"""

from collections.abc import Iterator
from typing import NamedTuple

from einops import rearrange
from torch import Tensor

from metamerge.registry import correction
from metamerge.structure import Execution, Layout, Program
from metamerge.structure.lockstep import Lane
from metamerge.structure.program import Node
from metamerge.weights import Weights

_CHUNK = 256  # inputs at a time
_KEPT = 2**28  # entries that are kept of all inputs at a normalisation: 1 GiB


@correction(paper="arXiv:2211.08403")
def batch_norm(fused: Weights, members: Weights, layout: Layout, inputs: Tensor) -> Weights:
    """Set every running mean and variance to the fused network's own statistics on the inputs.

    Args:
        fused: Fused weights of ``f`` families, ``[f, ...]``.
        members: Not read; here because every correction gets them.
        layout: The architecture.
        inputs: Calibration inputs, ``[b, ...]``.

    Returns:
        New weights ``[f, ...]``; those of networks without running statistics are the same.
    """
    return recalibrate(fused, layout.program, inputs)


def recalibrate(weights: Weights, program: Program, inputs: Tensor) -> Weights:
    """Measure running statistics of ``n`` networks, layer after layer.

    Every normalisation gets mean and unbiased variance of what it reads in evaluation, behind those
    measured before it; exact however many inputs there are. Inputs go through in chunks, all of
    them to the first normalisation, then all to the next one. Where what they are there fits into
    memory, they go on from it; where it does not, they set out again, so that many inputs take
    longer and not more memory.

    Args:
        weights: Stacked networks, every tensor ``[n, ...]``.
        program: Their architecture.
        inputs: ``[b, ...]``, all of which count alike.

    Returns:
        New dict; tensors other than running statistics are passed through.
    """
    measured, count = dict(weights), len(next(iter(weights.values())))
    chunks = [_Point(some, 0, None) for some in inputs.split(_CHUNK)]
    for node, *keys in normalisations(program):
        there, moments, kept = [], [], 0
        for start in chunks:
            execution = start.execution(program, measured)
            position = _advance(execution, start.position, node)
            moments.append(_moments(execution.argument(node, 0), count))
            point = _Point(start.inputs, position, execution.values)
            kept += point.entries()
            there = [*there, point] if kept <= _KEPT else []
        measured.update(zip(keys, _pooled(moments), strict=True))
        chunks = there if len(there) == len(chunks) else chunks
    return measured


class _Point(NamedTuple):
    """How far some inputs have come: up to a node, with the values that are needed from there."""

    inputs: Tensor
    position: int
    values: dict[str, Lane] | None

    def execution(self, program: Program, weights: Weights) -> Execution:
        """Go on from here; the point itself stays."""
        execution = Execution(program, weights, [self.inputs], stacked=True)
        if self.values is not None:
            execution.values = dict(self.values)
        return execution

    def entries(self) -> int:
        """Number of entries of all values."""
        lanes = (self.values or {}).values()
        return sum(lane.value.numel() for lane in lanes if isinstance(lane.value, Tensor))


class _Moments(NamedTuple):
    """Number of rows, their mean and the mean square distance from it, ``[n, c]``."""

    rows: int
    mean: Tensor
    variance: Tensor


def _advance(execution: Execution, position: int, goal: Node) -> int:
    """Run every node before a goal; its position."""
    nodes = execution.program.nodes
    while nodes[position].name != goal.name:
        execution.step(nodes[position])
        position += 1
    return position


def _moments(lane: Lane, count: int) -> _Moments:
    value = lane.value if lane.stacked else lane.value[None]
    rows = rearrange(value, "n b c ... -> n c (b ...)").expand(count, -1, -1)
    return _Moments(rows.shape[-1], rows.mean(-1), rows.var(-1, correction=0))


def _pooled(parts: list[_Moments]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all rows; that of a single one is 0."""
    total = sum(part.rows for part in parts)
    mean = sum(part.mean * (part.rows / total) for part in parts)
    spread = sum(
        (part.variance + (part.mean - mean).square()) * (part.rows / total) for part in parts
    )
    return mean, spread * (total / max(1, total - 1))


def normalisations(program: Program) -> Iterator[tuple[Node, str, str]]:
    """Batch normalisations with running statistics.

    Args:
        program: The architecture.

    Yields:
        The operator call, and the keys of its running mean and variance.
    """
    for node in program.nodes:
        if node.op == "batch_norm.default" and node.args[3] is not None:
            yield node, *(program.parameters[node.args[position].name] for position in (3, 4))
