"""Model breadcrumbs: keep the middle of every task vector, without its largest and smallest.

Paper: Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
Masks", ECCV 2024, arXiv:2312.06795 (section 3.2; masks are made tensor by tensor).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.methods._combination import dtypes, running
from metamerge.methods._selection import largest_magnitude
from metamerge.methods._task_vectors import add_task_vectors, agreed
from metamerge.options import check_choice, check_number
from metamerge.registry import merge_method
from metamerge.weights import Weights


@merge_method(
    paper="arXiv:2312.06795",
    align=None,
    neutral={"density": 1.0, "scale": 1.0, "gamma": 0.0},
    per_tensor={},
)
def breadcrumbs(
    weights: Sequence[Weights],
    *,
    base: Weights,
    density: float = 0.9,
    gamma: float = 0.01,
    scale: float = 1.0,
    elect: bool = False,
) -> Weights:
    """Add to the base the mean of task vectors without outliers and without noise.

    Of every tensor, the share ``gamma`` of largest magnitudes goes, and of the smallest so many
    that ``density`` is left, but at least one; fewer large ones go where otherwise less would be
    left.

    Args:
        weights: One state dict per member, fine-tuned from ``base``.
        base: What they were fine-tuned from.
        density: Share of entries that is kept, in (0, 1]; 1 keeps all.
        gamma: Share of largest magnitudes that goes, in [0, 1).
        scale: Factor on the mean; the paper's factor on the sum, times the number of members.
        elect: Whether, as in TIES, one sign is elected per entry and only those who agree are
            averaged; otherwise all are.

    Returns:
        New state dict with the members' names, shapes and dtypes; running statistics are averaged.

    Raises:
        ConfigError: If an option is out of its range.
    """
    check_number("breadcrumbs", "density", density, "(0, 1]")
    check_number("breadcrumbs", "gamma", gamma, "[0, 1)")
    check_number("breadcrumbs", "scale", scale)
    check_choice("breadcrumbs", "elect", elect, (False, True))
    bounds = {} if density >= 1 else _bounds(weights, base, density, gamma)

    def fuse(key: str, vectors: Tensor) -> Tensor:
        if key in bounds:
            low, high = bounds[key].to(vectors).unbind(1)
            size = vectors.abs()
            vectors = vectors * ((size >= low[:, None]) & (size <= high[:, None]))
        return scale * (agreed(vectors) if elect else vectors.mean(0))

    return add_task_vectors(weights, base, fuse)


def _bounds(
    weights: Sequence[Weights], base: Weights, density: float, gamma: float
) -> dict[str, Tensor]:
    """Smallest and largest magnitude that is kept, for every tensor ``[m, 2]``."""
    bounds = {}
    for key, dtype in dtypes(weights).items():
        entries = base[key].numel()
        if key in running(weights[0]) or not entries:
            continue
        kept = max(1, int(density * entries))
        dropped = min(int(gamma * entries), entries - kept)  # of the largest
        computing = torch.promote_types(dtype, torch.float32)
        ends = [
            [largest_magnitude([w[key]], [base[key]], rank, computing) for w in weights]
            for rank in (dropped + kept, dropped + 1)
        ]
        bounds[key] = torch.stack([torch.stack(end) for end in ends], 1)
    return bounds
