"""Refit: rebuild fused weights layer by layer until units compute what their members' mixture does.

The target of a unit is the mean of its aligned members' pre-activations, rescaled to their mean
spread; the fused layer is the ridge regression of that target on the fused network's *own* inputs.
The idea of restoring the spread is REPAIR's (Jordan et al., "REPAIR: REnormalizing Permuted
Activations for Interpolation Repair", ICLR 2023, arXiv:2211.08403); regressing on the merged
network's inputs is close to RegMean (Jin et al., ICLR 2023, arXiv:2212.09849) and PLeaS (Nasery et
al., arXiv:2407.02447). We regress the *correction* to the fused weights, so that a strong ridge
gives them back unchanged, and every step can be differentiated through.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.registry import correction
from metamerge.structure import Execution, Layer, Layout
from metamerge.structure.lockstep import Lane
from metamerge.structure.program import Node
from metamerge.weights import Weights

MAX_ROWS = 4096  # regression rows per layer; positions of feature maps are subsampled to stay below


class Target(NamedTuple):
    """What a layer is fitted to: pre-activations ``[f, r, o]``, and how far to go, from 0 to 1."""

    value: Tensor
    strength: Tensor | float


Targets = Callable[[Layer, Tensor], Target]
"""Layer and members' pre-activations ``[f, m, r, o]`` -> target."""


@correction()
def refit(
    fused: Weights,
    members: Weights,
    layout: Layout,
    inputs: Tensor,
    *,
    targets: Targets | None = None,
    ridge: Tensor | float = 1e-2,
) -> Weights:
    """Fit every layer of fused weights to its members' mixture on the given inputs.

    The first layer, whose inputs are those of the members, is only rescaled: there the mixture is
    exact. What is no layer (embeddings, positional parameters, normalisations, recurrent cells)
    stays as it comes in, and so does a layer that is used twice or shares a weight with another.

    Args:
        fused: Starting weights of ``f`` families, ``[f, ...]``.
        members: Their aligned members, ``[f, m, ...]``.
        layout: Layers of the architecture.
        inputs: Calibration inputs or learned probes, ``[b, ...]``.
        targets: Targets per layer; by default the rescaled mean of the members.
        ridge: Strength of the pull towards the starting weights, relative to the mean square of the
            inputs.

    Returns:
        New weights ``[f, ...]``.
    """
    observed = observe(members, layout, inputs)
    return construct(fused, observed, layout, inputs, targets=targets or mean_target, ridge=ridge)


def observe(members: Weights, layout: Layout, inputs: Tensor) -> dict[str, Tensor]:
    """Pre-activations of every layer of every member.

    Args:
        members: Aligned members of ``f`` families, ``[f, m, ...]``.
        layout: Layers of the architecture.
        inputs: ``[b, ...]``.

    Returns:
        Node of the layer -> ``[f, m, r, o]``, where rows are images, or images by positions,
        subsampled.
    """
    families, count = next(iter(members.values())).shape[:2]
    flat = {key: tensor.flatten(0, 1) for key, tensor in members.items()}
    execution = Execution(layout.program, flat, [inputs], stacked=True)
    observed = {}
    for node in layout.program.nodes:
        lane = execution.step(node)
        if node.name in layout.by_node:
            rows = _rows(lane.value, layout.by_node[node.name])  # [f*m, r, o]
            observed[node.name] = rows.unflatten(0, (families, count))
    return observed


def construct(
    fused: Weights,
    observed: dict[str, Tensor],
    layout: Layout,
    inputs: Tensor,
    *,
    targets: Targets,
    ridge: Tensor | float,
) -> Weights:
    """The second half of ``refit``: run the fused network and fit each layer as it is reached.

    Args:
        fused: Starting weights, ``[f, ...]``.
        observed: What ``observe`` returned.
        layout: Layers of the architecture.
        inputs: The inputs that were observed, ``[b, ...]``.
        targets: Targets per layer.
        ridge: See ``refit``.

    Returns:
        New weights ``[f, ...]``.
    """
    fitted = dict(fused)
    execution = Execution(layout.program, fitted, [inputs], stacked=True)
    for node in layout.program.nodes:
        layer = layout.by_node.get(node.name)
        if layer is not None and not layer.shared:
            target = targets(layer, observed[node.name])
            current = _rows(execution.peek(node).value, layer)  # [f, r, o]
            lane = execution.argument(node, 0)
            if lane.stacked and layer.regressable:
                changed = _regress(node, layer, lane, fitted, current, target, ridge)
            else:
                changed = _rescale(layer, fitted, current, target)
            fitted.update(changed)
            mean_key = layout.running_means.get(node.name)
            if (
                layer.bias is None and mean_key
            ):  # the normalisation behind takes the shift that a bias would
                reached = _rows(execution.peek(node).value, layer).mean(1)
                before = current.mean(1)
                wanted = before + target.strength * (target.value.mean(1) - before)
                fitted[mean_key] = fitted[mean_key] + reached - wanted
        execution.step(node)
    for alias, key in layout.program.tied.items():
        if alias in fitted:
            fitted[alias] = fitted[key]
    return fitted


def mean_target(layer: Layer, observed: Tensor) -> Target:
    """The plain mean of the members, rescaled to their mean standard deviation."""
    weights = torch.full_like(observed[:, :, :1, :1].squeeze(2), 1 / observed.shape[1])
    return Target(mixed_target(observed, weights), 1.0)


def mixed_target(
    observed: Tensor, mixing: Tensor, gain: Tensor | float = 1.0, known: Tensor | None = None
) -> Tensor:
    """Mix the members' pre-activations per unit and restore the spread that mixing lost.

    Args:
        observed: ``[f, m, r, o]``.
        mixing: Coefficients that sum to 1 over members, ``[f, m, o]`` or ``[f, m, 1]``.
        gain: Factor on the restored spread, ``[f, o]`` or a number.
        known: Variance of what is observed over rows, ``[f, m, o]``, where that is known.

    Returns:
        ``[f, r, o]``.
    """
    mixed = (observed * mixing[:, :, None]).sum(1)  # [f, r, o]
    mean, narrowed = moments(mixed, 1)  # [f, o]
    spread = _root(variance(observed, 2) if known is None else known)  # [f, m, o]
    wanted = (spread * mixing).sum(1) * gain  # [f, o]
    return mean[:, None] + (mixed - mean[:, None]) * (wanted / _root(narrowed))[:, None]


def _root(squares: Tensor) -> Tensor:
    """Standard deviation that can be differentiated where a unit is constant."""
    return (squares + 1e-8).sqrt()


def variance(values: Tensor, dim: int) -> Tensor:
    """Variance along any axis but the last, for which ``torch.var`` takes several times as long.

    Args:
        values: Any tensor.
        dim: The axis.

    Returns:
        The same without that axis.
    """
    return moments(values, dim)[1]


def moments(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and variance along any axis but the last, see ``variance``, with one way back for both.

    Args:
        values: Any tensor.
        dim: The axis.

    Returns:
        Both without that axis.
    """
    return _Moments.apply(values, dim)


class _Moments(torch.autograd.Function):
    """The derivatives of ``torch.var_mean``, and a way to its values by whole rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        mean = values.mean(dim)
        ctx.save_for_backward(values)
        ctx.dim = dim
        centre = mean.unsqueeze(dim).expand_as(values)
        return mean, F.mse_loss(values, centre, reduction="none").mean(dim)  # squares in one pass

    @staticmethod
    def backward(ctx: Any, to_mean: Tensor, to_variance: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        count = values.shape[ctx.dim]
        centred = values - values.mean(ctx.dim, keepdim=True)
        shift, slope = (to_mean / count).unsqueeze(ctx.dim), to_variance * (2 / count)
        return torch.addcmul(shift, centred, slope.unsqueeze(ctx.dim)), None


def _rescale(layer: Layer, weights: Weights, current: Tensor, target: Target) -> Weights:
    """Give each unit the target's mean and spread, not its direction; exact for shared inputs."""
    (aim, wide), (mean, narrow) = moments(target.value, 1), moments(current, 1)  # [f, o]
    factor = 1 + target.strength * (_root(wide) / _root(narrow) - 1)
    wanted = mean + target.strength * (aim - mean)
    bias = weights[layer.bias] if layer.bias else None
    weight, bias = fold(weights[layer.weight], bias, factor, mean, wanted)
    return {layer.weight: weight, **({layer.bias: bias} if layer.bias else {})}


def fold(
    weight: Tensor, bias: Tensor | None, factor: Tensor, mean: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scale a layer's units about their mean, and move that mean, by changing weight and bias.

    Args:
        weight: ``[f, o, ...]``.
        bias: ``[f, o]``; without one, units are only scaled, and their mean is scaled with them.
        factor: Scale of every unit, ``[f, o]``.
        mean: Mean of the unit's present pre-activations, ``[f, o]``.
        wanted: What the mean is to become, ``[f, o]``.

    Returns:
        New weight and bias.
    """
    scaled = weight * factor.reshape(*factor.shape, *[1] * (weight.ndim - 2))
    return scaled, None if bias is None else wanted + factor * (bias - mean)


def _regress(
    node: Node,
    layer: Layer,
    lane: Lane,
    weights: Weights,
    current: Tensor,
    target: Target,
    ridge: Tensor | float,
) -> Weights:
    """Ridge regression of what the layer misses on its own inputs."""
    weight = weights[layer.weight]
    rows = _inputs(node, layer, lane, weight)  # [f, r, i]
    miss = target.value - current  # [f, r, o]
    if layer.bias is None:
        change = solve_ridge(rows, miss, ridge)  # [f, i, o]
        return {layer.weight: weight + target.strength * change.mT.reshape(weight.shape)}
    # centring both sides is regression with a free bias
    centre, offset = rows.mean(1, keepdim=True), miss.mean(1, keepdim=True)
    change = solve_ridge(rows - centre, miss - offset, ridge)
    shift = (offset - torch.bmm(centre, change)).squeeze(1)
    return {
        layer.weight: weight + target.strength * change.mT.reshape(weight.shape),
        layer.bias: weights[layer.bias] + target.strength * shift,
    }


def solve_ridge(inputs: Tensor, targets: Tensor, ridge: Tensor | float) -> Tensor:
    """Ridge regression in closed form, in kernel form where inputs have more columns than rows.

    Args:
        inputs: ``[f, r, i]``.
        targets: ``[f, r, o]``.
        ridge: Relative to the mean square of the inputs.

    Returns:
        ``[f, i, o]``, minimising ``||X B - Y||^2 + ridge * r * mean(X^2) * ||B||^2``.
    """
    count, columns = inputs.shape[1:]
    penalty = ridge * count * inputs.square().mean((1, 2)) + 1e-8  # [f]
    kernel = columns > count
    gram = inputs @ inputs.mT if kernel else inputs.mT @ inputs
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + penalty[:, None, None] * eye)
    if kernel:
        return inputs.mT @ torch.cholesky_solve(targets, factor)
    return torch.cholesky_solve(inputs.mT @ targets, factor)


def unit_rows(value: Tensor, layer: Layer) -> Tensor:
    """View a layer's outputs as rows by units, where rows are images, or images by positions.

    Args:
        value: ``[n, b, ..., o]`` of a linear layer, ``[n, b, o, ...]`` of a convolution.
        layer: The layer.

    Returns:
        ``[n, r, o]``.
    """
    return (value if layer.linear else value.movedim(2, -1)).flatten(1, -2)


def fan_in_rows(node: Node, layer: Layer, lane: Lane, weight: Tensor) -> Tensor:
    """View the inputs of a regressable layer as rows by fan-in, in the order of ``unit_rows``.

    Args:
        node: The layer's operator call.
        layer: The layer.
        lane: Its inputs, stacked: ``[n, b, ..., i]`` of a linear layer, maps of a convolution.
        weight: Its weights, ``[n, o, ...]``.

    Returns:
        ``[n, r, i]``, where ``i`` counts the taps of a convolution too.
    """
    if layer.linear:
        return lane.value.flatten(1, -2)
    stride, padding, dilation = (
        node.argument(3, (1, 1)),
        node.argument(4, (0, 0)),
        node.argument(5, (1, 1)),
    )
    patches = F.unfold(lane.value.flatten(0, 1), weight.shape[3:], dilation, padding, stride)
    return patches.unflatten(0, lane.value.shape[:2]).mT.flatten(1, 2)


def sampled(rows: Tensor, most: int) -> Tensor:
    """The rows that take part: all, without a copy, or ``most`` that a fixed seed picks.

    Args:
        rows: ``[n, r, ...]``.
        most: Number of rows that are enough.

    Returns:
        ``[n, min(r, most), ...]``, in their order.
    """
    count = rows.shape[1]
    if count <= most:
        return rows
    generator = torch.Generator().manual_seed(count)
    index = torch.randperm(count, generator=generator)[:most].sort().values
    return rows.index_select(1, index.to(rows.device))


def _rows(value: Tensor, layer: Layer) -> Tensor:
    """The rows of ``unit_rows`` that take part, ``[n, r, o]``."""
    return sampled(unit_rows(value, layer), MAX_ROWS)


def _inputs(node: Node, layer: Layer, lane: Lane, weight: Tensor) -> Tensor:
    """Inputs of a regressable layer by fan-in, at the same rows as ``_rows``: ``[f, r, i]``."""
    return sampled(fan_in_rows(node, layer, lane, weight), MAX_ROWS)
