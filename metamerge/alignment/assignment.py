"""Linear assignment of units to slots, and cheaper ways to it where a good one is known."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Array = NDArray[np.float64]

_SMALL = 64  # units up to which assigning anew is cheaper than proving that nothing is better
_ROUNDS = 12  # of prices, before it is assigned anew from where they are
_ROUNDING = 1e-12  # relative: what sums of equally good assignments may differ by


def assign(gain: Tensor) -> Tensor:
    """The assignment of the largest total gain.

    Where no two slots gain most by the same unit, each takes its own, and nothing has to be solved.

    Args:
        gain: What it is worth to put unit ``j`` into slot ``i``, ``[*, n, n]``.

    Returns:
        Unit of every slot, ``[*, n]``, on the CPU.
    """
    count = gain.shape[-1]
    index = gain.argmax(-1).cpu()
    plain = (index.sort(-1).values == torch.arange(count)).all(-1)
    if not plain.all():
        flat, costs = index.view(-1, count), gain.reshape(-1, count, count)
        for row in (~plain).flatten().nonzero()[:, 0].tolist():
            solved = linear_sum_assignment(costs[row].cpu().numpy(), maximize=True)[1]
            flat[row] = torch.from_numpy(solved)
    return index


def reassign(gain: Tensor, prices: Sequence[Array] | None) -> tuple[Tensor, list[Array] | None]:
    """The assignment of the largest total gain, where each unit has a slot that may be its best.

    Args:
        gain: What it is worth to put unit ``j``, now in slot ``j``, into slot ``i``, ``[f, n, n]``.
        prices: What this returned for gains much like these.

    Returns:
        Unit of every slot, ``[f, n]``, and prices of the slots, for the next time.
    """
    families, count = gain.shape[:2]
    if count <= _SMALL:
        return assign(gain), None
    prices = prices or [np.zeros(count)] * families
    solved = [_resolved(*pair) for pair in zip(gain.cpu().numpy(), prices, strict=True)]
    return torch.stack([torch.from_numpy(index) for index, _ in solved]), [p for _, p in solved]


def _resolved(gain: Array, prices: Array) -> tuple[Array, Array]:
    """``reassign`` for one family.

    Units are in their best slots if and only if there are prices at which no slot would rather have
    another unit than its own: Bellman-Ford finds them, or goes on for ever. Prices that are nearly
    right make a new assignment cheap: in what is left of the gains most slots differ in their best.

    Returns:
        Unit of every slot ``[n]``, and prices of the slots.
    """
    loss = gain.diagonal() - gain  # [slot, unit]
    least = _ROUNDING * max(float(np.abs(gain.diagonal()).mean()), np.finfo(float).tiny)
    for _ in range(_ROUNDS):
        lower = (loss + prices).min(1)
        if (prices - lower).max() <= least:
            return np.arange(len(gain)), prices
        prices = lower
    left = loss + prices
    index = linear_sum_assignment(left - left.min(1, keepdims=True))[1]
    return index, left[np.arange(len(gain)), index]
