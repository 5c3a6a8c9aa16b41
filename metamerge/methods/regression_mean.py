"""Regression mean: the linear maps that are closest to all members' maps on their own inputs.

Paper: Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language
Models" (RegMean), ICLR 2023, arXiv:2212.09849: with the Gram matrix ``G`` of the inputs
that a layer has in each member, ``W = (sum G)^-1 (sum G W)``. We differ in three ways: convolutions
are linear maps of patches; all members see the same inputs, so in a first layer ``W`` is their
mean; and what is solved for is the difference from that mean, so that directions in which there
are no inputs get it.

Shape comments: m members, r rows, i fan-in, o units.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamerge.calibration import Batches, check_fit, collect
from metamerge.corrections.refit import fan_in_rows, sampled
from metamerge.methods._combination import combine, restore
from metamerge.options import check_number
from metamerge.registry import merge_method
from metamerge.structure import Execution, Layer, Layout
from metamerge.weights import Weights, stack, widened

_CHUNK = 32  # inputs per pass: patches of all members' feature maps have to fit into memory
_ROWS = 16384  # rows per layer and member; positions of feature maps are subsampled to stay below
_RIDGE = 1e-6  # of the diagonal: without decay there may be more columns than rows


class _Sums(NamedTuple):
    """What the solution is made of, in float64.

    Attributes:
        gram: Of all members, ``[i, i]``.
        squares: Diagonal of each member's Gram matrix, ``[m, i]``.
        wanted: Gram matrices times differences, over all members, ``[i, o]``.
        differences: Members' maps less their mean, ``[m, i, o]``.
    """

    gram: Tensor
    squares: Tensor
    wanted: Tensor
    differences: Tensor


@merge_method(paper="arXiv:2212.09849")
def regression_mean(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    batches: Batches,
    decay: float = 0.9,
    report: dict[str, Any] | None = None,
) -> Weights:
    """Solve for every layer whose outputs are nearest to its members', each on its own inputs.

    Linear maps and ungrouped convolutions are solved for; biases, first layers, weights that are
    used in several places and everything else are averaged.

    Args:
        weights: One state dict per member, of one architecture.
        layout: That architecture.
        batches: Calibration inputs; labels are not read.
        decay: Factor on the off-diagonals of the Gram matrices, in [0, 1]; 0 weights every input
            unit of a member by its mean square, 1 is least squares.
        report: Takes the names of the weights that were ``solved``, and the number of ``inputs``.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If ``decay`` is out of its range, or the batches do not fit the network.
        StructureError: If the network has layers that cannot be followed.
    """
    check_number("regression_mean", "decay", decay, "[0, 1]")
    if len(weights) == 1:
        return combine(weights, [1.0])
    inputs, _ = collect(batches, labelled=False)
    check_fit(layout.program, inputs)
    exact = {
        key: t.to(torch.promote_types(t.dtype, torch.float32))
        for key, t in stack(weights).items()
        if t.is_floating_point()
    }
    mean = {key: t.mean(0) for key, t in exact.items()}
    changes = _changes(stack(widened(weights)), layout, inputs, decay)
    if report is not None:
        report.update(solved=list(changes), inputs=len(inputs), decay=decay)
    return restore({**mean, **{key: mean[key] + changes[key] for key in changes}}, weights)


def _changes(members: Weights, layout: Layout, inputs: Tensor, decay: float) -> Weights:
    """Weight of a layer -> how its solution differs from the members' mean."""
    sums: dict[str, _Sums] = {}
    for some in inputs.split(_CHUNK):
        rows = max(1, _ROWS * len(some) // len(inputs))
        for layer, part in _observed(members, layout, some, rows):
            sums[layer.weight] = _added(sums[layer.weight], part) if layer.weight in sums else part
    return {
        key: _solved(own, decay).mT.reshape(members[key].shape[1:]).to(members[key].dtype)
        for key, own in sums.items()
    }


def _observed(
    members: Weights, layout: Layout, inputs: Tensor, most: int
) -> Iterator[tuple[Layer, _Sums]]:
    """Sums over at most so many rows of every layer that has inputs of its own in each member."""
    execution = Execution(layout.program, members, [inputs], stacked=True)
    for node in layout.program.nodes:
        layer = layout.by_node.get(node.name)
        lane = execution.argument(node, 0) if layer is not None else None
        if lane is not None and lane.stacked and layer.regressable and not layer.shared:
            weight = members[layer.weight]
            rows = sampled(fan_in_rows(node, layer, lane, weight), most)  # [m, r, i]
            yield layer, _sums(rows, (weight - weight.mean(0)).flatten(2).mT)
        execution.step(node)


def _sums(rows: Tensor, differences: Tensor) -> _Sums:
    # products of rows of all members at once: no member's Gram matrix is ever there by itself
    flat, outputs = rows.flatten(0, 1), (rows @ differences).flatten(0, 1)
    products = flat.mT @ flat, rows.square().sum(1), flat.mT @ outputs, differences
    return _Sums(*(t.double() for t in products))


def _added(one: _Sums, other: _Sums) -> _Sums:
    return _Sums(*map(torch.add, one[:3], other[:3]), one.differences)


def _solved(sums: _Sums, decay: float) -> Tensor:
    """Least squares with Gram matrices whose off-diagonals are smaller by ``decay``, ``[i, o]``."""
    squares = sums.squares.sum(0)
    diagonal = (1 - decay + _RIDGE) * squares
    diagonal = torch.where(squares > 0, diagonal, 1.0)  # inputs that are always 0 keep the mean
    own = (sums.squares[..., None] * sums.differences).sum(0)
    factor = torch.linalg.cholesky(decay * sums.gram + diagonal.diag())
    return torch.cholesky_solve(decay * sums.wanted + (1 - decay) * own, factor)
