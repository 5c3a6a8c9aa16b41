"""Rank average: members count by how well they do on calibration data, half as much per rank.

No paper: the coefficients 1/2, 1/4, 1/8, ... depend on the order of the losses only, so one member
whose loss is of another size cannot take all or nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.calibration import Batches, collect, losses
from metamerge.methods._combination import combine
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights


@merge_method()
def rank_average(weights: Sequence[Weights], *, layout: Layout, batches: Batches) -> Weights:
    """Average all members with coefficients that halve from the best member to the worst.

    The member with the lowest loss gets 1/2, the next 1/4, and so on; the last gets what is left,
    so that the sum is 1. Members of equal loss share what they get together.

    Args:
        weights: One state dict per member, of one architecture.
        layout: That architecture.
        batches: Calibration inputs with labels.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If the batches have no labels or do not fit the network.
    """
    inputs, labels = collect(batches, labelled=True)
    return combine(weights, _shares(losses(weights, layout, inputs, labels)).tolist())


def _shares(loss: Tensor) -> Tensor:
    """Coefficient of every member by the rank of its loss, ``[m]`` -> ``[m]``."""
    by_rank = 0.5 ** torch.arange(1, len(loss) + 1, dtype=torch.float64)
    by_rank[-1] = 1 - by_rank[:-1].sum()
    ranks = loss.argsort(stable=True).argsort().cpu()
    equal = (loss[:, None] == loss).double().cpu()  # [m, m]
    return (equal @ by_rank[ranks]) / equal.sum(1)
