"""Repair: give every unit of fused weights the mean and spread that its members' units have.

Paper: Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR: REnormalizing Permuted Activations for
Interpolation Repair", ICLR 2023, arXiv:2211.08403. We differ in two ways: the correction is folded
into weight and bias at once, so no normalisation layer is put in and taken out again; and layers
are corrected from input to output, each on what the corrected layers before it give.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.corrections.refit import fold, unit_rows
from metamerge.registry import correction
from metamerge.structure import OUTPUTS, Execution, Layer, Layout
from metamerge.weights import Weights

_CONSTANT = 1e-4  # spread, relative to the wanted one, below which there is nothing to scale


class _Moments(NamedTuple):
    """Mean and standard deviation of every unit, ``[n, o]``."""

    mean: Tensor
    spread: Tensor


@correction(paper="arXiv:2211.08403")
def repair(fused: Weights, members: Weights, layout: Layout, inputs: Tensor) -> Weights:
    """Rescale and shift the pre-activations of fused weights to their members' mean statistics.

    On the given inputs each unit gets the mean of its members' means and of their standard
    deviations. Left as they are: output layers (no other layer comes after them), layers that are
    used twice or share a weight, whatever is no layer (embeddings, recurrent cells), the scale of
    units that are constant in the fused network, and the mean of units without a bias. Where a
    batch normalisation reads a layer without a bias, its running mean takes the shift.

    Args:
        fused: Fused weights of ``f`` families, ``[f, ...]``.
        members: Their aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture.
        inputs: Calibration inputs, ``[b, ...]``.

    Returns:
        New weights ``[f, ...]``.
    """
    return match_moments(fused, members, layout, inputs, means=True)


def match_moments(
    fused: Weights, members: Weights, layout: Layout, inputs: Tensor, *, means: bool
) -> Weights:
    """Give hidden units their members' mean spread, and their mean too or its own again.

    Args:
        fused: Fused weights, ``[f, ...]``.
        members: Their aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture.
        inputs: ``[b, ...]``.
        means: Whether units also get the mean of their members' means; otherwise each keeps the one
            that it has in the network corrected so far.

    Returns:
        New weights ``[f, ...]``.
    """
    families, count = next(iter(members.values())).shape[:2]
    repaired = {key: tensor.clone() for key, tensor in fused.items()}
    flat = {key: tensor.flatten(0, 1) for key, tensor in members.items()}
    theirs = Execution(layout.program, flat, [inputs], stacked=True)
    own = Execution(layout.program, repaired, [inputs], stacked=True)
    for node in layout.program.nodes:
        read = {name: own.values[name] for name in node.refs if name in own.values}
        observed, current = theirs.step(node), own.step(node)
        layer = layout.by_node.get(node.name)
        if layer is None or layer.shared or layer.target == OUTPUTS:
            continue
        each = _moments(observed.value, layer)
        wanted = _Moments(*(m.unflatten(0, (families, count)).mean(1) for m in each))
        found = _moments(current.value, layer)
        wanted = wanted if means else wanted._replace(mean=found.mean)
        mean_key = layout.running_means.get(node.name)
        repaired.update(_matched(repaired, layer, found, wanted, mean_key))
        own.values.update(read)  # once more, now with the corrected layer
        own.step(node)
    for alias, key in layout.program.tied.items():
        if alias in repaired:
            repaired[alias] = repaired[key].clone()
    return repaired


def _moments(value: Tensor, layer: Layer) -> _Moments:
    rows = unit_rows(value, layer)  # [n, r, o]
    return _Moments(rows.mean(1), rows.var(1, correction=0).sqrt())


def _matched(
    weights: Weights, layer: Layer, current: _Moments, wanted: _Moments, running_mean: str | None
) -> Weights:
    """The layer's tensors, changed so that its units go from the current moments to the wanted."""
    scalable = current.spread > _CONSTANT * wanted.spread
    factor = torch.where(scalable, wanted.spread / current.spread.where(scalable, 1.0), 1.0)
    bias = weights[layer.bias] if layer.bias else None
    weight, bias = fold(weights[layer.weight], bias, factor, current.mean, wanted.mean)
    if bias is not None:
        return {layer.weight: weight, layer.bias: bias}
    if running_mean is None:
        return {layer.weight: weight}
    shift = wanted.mean - factor * current.mean
    return {layer.weight: weight, running_mean: weights[running_mean] - shift}
