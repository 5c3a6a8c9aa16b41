"""Which weights of a network are trained; all others are fixed.

A subset names, for every tensor that takes part, its live rows or its live single weights. Live
weights travel as tensors of their own, ``[n, k, ...]``, so an optimizer that is given these holds
nothing for the others and cannot touch them.

Shape comments: n networks, k live rows or weights of a tensor.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.subsets.kernels import Kernels
from metamerge.weights import Weights


class Live(NamedTuple):
    """What is live of one tensor.

    Attributes:
        index: Live rows, or live weights of the flattened tensor, ``[n, k]``; None for all of it.
        single: Whether these are single weights.
    """

    index: Tensor | None = None
    single: bool = False


Subset = Mapping[str, Live]
"""State-dict key -> what is live of it; tensors that are not named are fixed."""


def window(order: Tensor, share: float, draw: int = 0) -> Tensor:
    """Cut the live part out of an order; later draws go on where the one before ended.

    Args:
        order: Numbers of kernels or weights, ``[..., o]``.
        share: Part that is live; at least one is.
        draw: Number of the draw: with half of them live, draws alternate between the halves.

    Returns:
        Ascending numbers, ``[..., k]``.
    """
    count = order.shape[-1]
    live = max(1, round(share * count))
    places = (draw * live + torch.arange(live)) % count
    return order[..., places].sort(-1).values


def rows_subset(kernels: Sequence[Kernels], live: Sequence[Tensor]) -> dict[str, Live]:
    """Train some kernels of every layer.

    Args:
        kernels: Of the network.
        live: For each layer, its live kernels ``[n, k]``.

    Returns:
        The subset.
    """
    return {key: Live(index) for own, index in zip(kernels, live, strict=True) for key in own.keys}


def single_subset(live: Weights) -> dict[str, Live]:
    """Train some single weights: those of each tensor that are named, ``[n, k]``."""
    return {key: Live(index, single=True) for key, index in live.items()}


def taken(weights: Weights, subset: Subset) -> Weights:
    """Take out what is live.

    Args:
        weights: ``[n, ...]``.
        subset: What is live.

    Returns:
        ``[n, k, ...]`` for every tensor of the subset, ``[n, k]`` of single weights.
    """
    found = {}
    for key, (index, single) in subset.items():
        tensor = weights[key]
        if index is None:
            found[key] = tensor.clone()
        else:
            found[key] = _lines(tensor, single).gather(1, _spread(index, tensor, single))
    return found


def placed(weights: Weights, live: Weights, subset: Subset) -> Weights:
    """Put live weights where they belong; gradients flow to them alone.

    Args:
        weights: ``[n, ...]``, not modified.
        live: What ``taken`` gives.
        subset: What is live.

    Returns:
        Weights with new tensors for what is live; the others are those given.
    """
    found = dict(weights)
    for key, values in live.items():
        (index, single), tensor = subset[key], weights[key]
        if index is None:
            found[key] = values
        else:
            put = _lines(tensor, single).scatter(1, _spread(index, tensor, single), values)
            found[key] = put.reshape(tensor.shape)
    return found


def masks(weights: Weights, subset: Subset) -> Weights:
    """Which weights are live, bool ``[n, ...]`` for every tensor."""
    nothing = {key: torch.zeros_like(tensor, dtype=torch.bool) for key, tensor in weights.items()}
    live = {key: torch.ones_like(own) for key, own in taken(nothing, subset).items()}
    return placed(nothing, live, subset)


def live_weights(weights: Weights, subset: Subset) -> int:
    """Number of live weights of one network."""
    return sum(tensor[0].numel() for tensor in taken(weights, subset).values())


def _lines(tensor: Tensor, single: bool) -> Tensor:
    return tensor.flatten(1) if single else tensor


def _spread(index: Tensor, tensor: Tensor, single: bool) -> Tensor:
    """Numbers of rows, repeated for every weight in them: ``[n, k, ...]``."""
    index = index.to(tensor.device)
    if single or tensor.ndim == 2:
        return index
    rest = tensor.shape[2:]
    return index.reshape(*index.shape, *[1] * len(rest)).expand(*index.shape, *rest)
