"""Model stock: go from the base towards the average as far as the members' angles say.

Paper: Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024,
arXiv:2403.19522 (equation 7, tensor by tensor). A mean cosine below 0, where the equation would
lead away from all members, counts as 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.methods._directions import combine_by_angles
from metamerge.registry import merge_method
from metamerge.weights import Weights


@merge_method(paper="arXiv:2403.19522", align=None, per_tensor={})
def model_stock(
    weights: Sequence[Weights], *, base: Weights, report: dict | None = None
) -> Weights:
    """Interpolate between the base and the members' average, for every tensor on its own.

    With N members whose task vectors have the mean cosine c, the average counts ``N c / (1 + (N-1)
    c)`` and the base the rest. Running statistics are averaged.

    Args:
        weights: One state dict per member, fine-tuned from ``base``; a single one comes back.
        base: What they were fine-tuned from.
        report: Takes the mean over all tensors of the average's share, ``ratio``.

    Returns:
        New state dict with the members' names, shapes and dtypes.
    """
    ratios: list[float] = []

    def choose(products: Tensor) -> Tensor:
        ratio = _ratio(products)
        ratios.append(float(ratio.detach()))
        return (ratio / len(products)).expand(len(products))

    shares = [1 / len(weights)] * len(weights)
    fused = combine_by_angles(weights, choose, scope="tensor", shares=shares, base=base)
    if report is not None and ratios:
        report["ratio"] = round(sum(ratios) / len(ratios), 6)
    return fused


def _ratio(products: Tensor) -> Tensor:
    """Share of the average, from inner products of task vectors ``[m, m]``."""
    members, squares = len(products), products.diagonal()
    if members == 1:
        return products.new_ones(())
    moved = squares > 0
    inverse = moved / torch.where(moved, squares, 1).sqrt()
    cosines = inverse[:, None] * products * inverse
    pairs = cosines.triu(1).sum() / (members * (members - 1) / 2)
    mean = pairs.clamp(0, 1)
    return members * mean / (1 + (members - 1) * mean)
