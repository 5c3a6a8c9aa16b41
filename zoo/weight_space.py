"""Networks as points: inner products of their weights, and the plane in which they differ most."""

from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.weights import Weights

_COLUMNS = 2**18  # parameters at a time


class Components(NamedTuple):
    """Networks on their principal components.

    Attributes:
        places: Coordinates, ``[n, k]``, in units of distance between weights.
        coefficients: The axes as mixtures of the networks, ``[n, k]``; their columns sum to 0, so a
            point of the plane is ``1 / n + coefficients @ place``, a mixture that sums to 1.
        share: Of the squared distances from the mean that lie along the components.
    """

    places: Tensor
    coefficients: Tensor
    share: float


def gram(weights: Weights, *, centred: bool) -> Tensor:
    """Inner products of the weight vectors of networks, without laying them out in one piece.

    Args:
        weights: ``[n, ...]``; what is not floating does not count.
        centred: Whether to take the differences from the networks' mean, which are small.

    Returns:
        ``[n, n]`` in float64.
    """
    count = len(next(iter(weights.values())))
    total = torch.zeros(count, count, dtype=torch.float64)
    for tensor in weights.values():
        if tensor.is_floating_point():
            for some in tensor.reshape(count, -1).split(_COLUMNS, 1):
                own = some.double().cpu()
                own = own - own.mean(0) if centred else own
                total += own @ own.T
    return total


def principal_components(weights: Weights, count: int = 2) -> Components:
    """The directions in which networks differ most.

    Args:
        weights: ``[n, ...]``.
        count: Number of components; where there are fewer, the others are 0.

    Returns:
        Where the networks lie along them.
    """
    values, vectors = torch.linalg.eigh(gram(weights, centred=True))  # of networks: few
    total = float(values.clamp_min(0).sum())
    found = min(count, len(values))
    values, vectors = values[-found:].flip(0), vectors[:, -found:].flip(1)
    there = values > 1e-12 * total
    size = values.clamp_min(0).sqrt()
    places = torch.where(there, vectors * size, 0.0)
    coefficients = torch.where(there, vectors / size.where(there, 1.0), 0.0)
    missing = (0, count - found)
    return Components(
        torch.nn.functional.pad(places, missing).float(),
        torch.nn.functional.pad(coefficients, missing).float(),
        float(values.clamp_min(0).sum() / total) if total else 1.0,
    )
