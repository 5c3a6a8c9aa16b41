"""Cut the kernels of every layer into two groups that interact as little as possible, or most.

Paper: Kernighan and Lin, "An Efficient Heuristic Procedure for Partitioning Graphs", Bell System
Technical Journal 49(2), 1970; the start is spectral, after Fiedler (1973). Here kernels change
sides in pairs of one layer, so every layer keeps its shares.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_GAIN = 1e-9  # of the sum of all affinities: what an exchange has to win


def cut(affinity: Tensor, side: Tensor) -> Tensor:
    """Sum of the affinities between the two groups.

    Args:
        affinity: ``[kernels, kernels]``, symmetric.
        side: Which group each belongs to, bool ``[..., kernels]``.

    Returns:
        ``[...]``.
    """
    one = side.to(affinity)
    return torch.einsum("...i,ij,...j->...", one, affinity, 1 - one)


def two_groups(
    affinity: Tensor,
    counts: Sequence[int],
    *,
    share: float = 0.5,
    strong: bool = False,
    starts: int = 8,
    generator: torch.Generator,
) -> Tensor:
    """Cut kernels into two groups with the smallest sum of affinities between them.

    Args:
        affinity: How much kernels have to do with each other, ``[kernels, kernels]``, symmetric;
            its diagonal has no say.
        counts: Kernels of each layer, one layer after the other.
        share: Part of every layer in the first group; at least one kernel is.
        strong: Whether the sum is to be the largest instead.
        starts: Random starts beside the spectral one; the best end counts.
        generator: Of the random starts.

    Returns:
        Which kernels are in the first group, bool ``[kernels]``.
    """
    matrix = affinity.double() - affinity.double().diag().diag()
    matrix = -matrix if strong else matrix
    layer = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    keys = [_fiedler(matrix)]
    keys += [
        torch.rand(len(layer), generator=generator, dtype=torch.float64) for _ in range(starts)
    ]
    ends = [_exchanged(matrix, layer, _first(key, counts, share)) for key in keys]
    return min(ends, key=lambda side: float(cut(matrix, side)))


def _first(key: Tensor, counts: Sequence[int], share: float) -> Tensor:
    """The share of every layer with the smallest keys."""
    ranks = [own.argsort(stable=True).argsort() for own in key.split(list(counts))]
    return torch.cat([rank < max(1, round(share * len(rank))) for rank in ranks])


def _fiedler(matrix: Tensor) -> Tensor:
    """Eigenvector of the second smallest eigenvalue of the graph's Laplacian."""
    laplacian = matrix.sum(1).diag() - matrix
    return torch.linalg.eigh(laplacian).eigenvectors[:, min(1, len(matrix) - 1)]


def _exchanged(matrix: Tensor, layer: Tensor, side: Tensor) -> Tensor:
    """Exchange the best pair of one layer until none makes the cut smaller."""
    least = _GAIN * float(matrix.abs().sum())
    same_layer = layer[:, None] == layer
    while True:
        signs = 2 * side.to(matrix) - 1
        outer = -signs * (matrix @ signs)  # to the other group, less to the own
        gain = outer[:, None] + outer - 2 * matrix  # [kernels, kernels]
        allowed = same_layer & side[:, None] & ~side
        best = gain.masked_fill(~allowed, -torch.inf).flatten().argmax()
        if not allowed.flatten()[best] or gain.flatten()[best] <= least:
            return side
        one, other = divmod(int(best), len(side))
        side = side.clone()
        side[one], side[other] = False, True
