"""How alike networks are, in their weights and in what they say.

Shape comments: n networks, p parameters.
"""

import torch
from torch import Tensor

from metamerge.weights import Weights
from zoo.weight_space import gram


def cosines(weights: Weights) -> Tensor:
    """Cosines between the weight vectors of networks, without laying them out in one piece.

    Args:
        weights: ``[n, ...]``; what is not floating does not count.

    Returns:
        ``[n, n]`` in float64; NaN for a network of zeros.
    """
    inner = gram(weights, centred=False)
    norms = inner.diagonal().sqrt()
    return inner / (norms[:, None] * norms)


def distances(weights: Weights) -> Tensor:
    """Euclidean distances between the weight vectors of networks.

    Args:
        weights: ``[n, ...]``; what is not floating does not count.

    Returns:
        ``[n, n]`` in float64.
    """
    inner = gram(weights, centred=True)  # what all networks share would drown the difference
    squares = inner.diagonal()
    return (squares[:, None] + squares - 2 * inner).clamp_min(0).sqrt().fill_diagonal_(0.0)


def relative_distances(weights: Weights) -> Tensor:
    """Distances between the weight vectors of networks over the mean of their norms.

    Args:
        weights: ``[n, ...]``.

    Returns:
        ``[n, n]`` in float64; the square root of 2 for independent networks of one size.
    """
    norms = gram(weights, centred=False).diagonal().sqrt()
    return distances(weights) / norms.mean()


def output_cosines(outputs: Tensor) -> Tensor:
    """Cosines between what networks say, each answer taken relative to its mean over classes.

    Args:
        outputs: Logits ``[n, b, c]``.

    Returns:
        ``[n, n]``.
    """
    centred = (outputs - outputs.mean(-1, keepdim=True)).flatten(1)
    flat = torch.nn.functional.normalize(centred, dim=1)
    return flat @ flat.T


def mean_of_pairs(matrix: Tensor) -> Tensor:
    """Mean over pairs of different networks.

    Args:
        matrix: ``[..., n, n]``, n at least 2.

    Returns:
        ``[...]``.
    """
    count = matrix.shape[-1]
    own = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (matrix.sum((-2, -1)) - own) / (count * (count - 1))
