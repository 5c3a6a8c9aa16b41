"""Layers fitted one by one to mixtures of what their members read and put out.

Shape comments: m models, b inputs, r rows (inputs, or inputs by positions), i and o entries of the
two axes of a fused layer.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.corrections.batch_norm import normalisations
from metamerge.corrections.refit import solve_ridge
from metamerge.methods._slots import Grouping, assemble, entries, mixed
from metamerge.methods._units import MAX_ROWS, sampled, voted
from metamerge.structure import OUTPUTS, Execution, Layer, Layout
from metamerge.structure.lockstep import Lane
from metamerge.structure.program import Node
from metamerge.weights import Weights


def fitted_layers(
    stacked: Weights,
    layout: Layout,
    inputs: Tensor,
    groupings: Mapping[str, Grouping],
    *,
    outputs: str,
    ridge: float,
) -> Weights:
    """Fit every layer to map the mixture of what members read to that of what they put out.

    The fused network is never run, so it may be of any width. First layers read the same in all
    members, and their mixed weights are the solution. Variances of batch normalisations shrink by
    what mixing took from the variance of the units that they normalise.

    Args:
        stacked: Members ``[m, ...]``.
        layout: Their architecture.
        inputs: Calibration inputs ``[b, ...]``.
        groupings: Group -> which units make a slot.
        outputs: One of ``OUTPUT_TARGETS``.
        ridge: Pull towards the mixed weights, relative to the mean square of what a layer reads.

    Returns:
        Fused weights; tensors that are not floating are left out.
    """
    fused = assemble(stacked, layout, groupings)
    variances = {n.refs[0]: key for n, _, key in normalisations(layout.program)}
    execution = Execution(layout.program, stacked, [inputs], stacked=True)
    for node in layout.program.nodes:
        layer = layout.by_node.get(node.name)
        read = execution.argument(node, 0) if layer else None
        made = execution.step(node)
        if layer is None:
            continue
        rows = entries(layout.spec, layer.weight, 0, groupings)
        dim = -1 if layer.linear else 2
        target = mixed(made.value, dim, rows)
        if layer.target == OUTPUTS and outputs == "votes":
            target = voted(made.value.movedim(dim, -1)).movedim(-1, dim if dim < 0 else dim - 1)
        if read.stacked and layer.regressable:
            columns = entries(layout.spec, layer.weight, 1, groupings)
            fused.update(
                _fitted(node, layer, fused, mixed(read.value, dim, columns), target, ridge)
            )
        if node.name in variances and node.name in layout.running_means:
            key = variances[node.name]
            fused[key] = fused[key] * _kept(made, target, dim, layout, key, groupings)
    return fused


def _fitted(
    node: Node, layer: Layer, fused: Weights, features: Tensor, target: Tensor, ridge: float
) -> Weights:
    """Ridge regression of what the mixed weights miss; with a bias, both sides are centred."""
    weight, bias = fused[layer.weight], fused.get(layer.bias)
    target = (target if layer.linear else target.movedim(1, -1)).flatten(0, -2)
    index = sampled(len(target), MAX_ROWS, target.device)
    kernel = weight.shape[2:]
    rows = (
        features.flatten(0, -2)[index] if layer.linear else _patches(node, features, index, kernel)
    )
    miss = target[index] - F.linear(rows, weight.flatten(1), bias)  # [r, o]
    centre = rows.mean(0) if bias is not None else torch.zeros_like(rows[0])
    offset = miss.mean(0) if bias is not None else torch.zeros_like(miss[0])
    change = solve_ridge((rows - centre)[None], (miss - offset)[None], ridge)[0]  # [i, o]
    made = {layer.weight: weight + change.mT.reshape(weight.shape)}
    return made if bias is None else {**made, layer.bias: bias + offset - centre @ change}


def _patches(node: Node, maps: Tensor, index: Tensor, kernel: tuple[int, int]) -> Tensor:
    """What a convolution reads for some of its outputs, ``[b, c, h, w]`` -> ``[r, i]``."""
    stride, padding, dilation = (
        _pair(node.argument(position, default)) for position, default in ((3, 1), (4, 0), (5, 1))
    )
    maps = F.pad(maps, (padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        maps = maps.unfold(2 + axis, reach, stride[axis])
    windows = maps[..., :: dilation[0], :: dilation[1]]  # [b, c, h, w, *kernel], a view
    shape = (windows.shape[0], *windows.shape[2:4])
    image, top, left = torch.unravel_index(index, shape)
    return windows[image, :, top, left].flatten(1)


def _pair(value: Any) -> tuple[int, int]:
    pair = (value,) if isinstance(value, int) else tuple(value)
    return pair * 2 if len(pair) == 1 else pair


def _kept(
    made: Lane,
    target: Tensor,
    dim: int,
    layout: Layout,
    key: str,
    groupings: Mapping[str, Grouping],
) -> Tensor:
    """Variance of mixed units over the mixture of their variances, from 0 to 1; 1 for constants."""
    units = made.value.movedim(dim, 1).flatten(2)  # [m, o, r]
    before = mixed(units.var(2, correction=0), 1, entries(layout.spec, key, 0, groupings))
    after = target.movedim(dim if dim < 0 else dim - 1, 0).flatten(1).var(1, correction=0)
    alive = before > 0
    return torch.where(alive, after / torch.where(alive, before, 1.0), 1.0)
