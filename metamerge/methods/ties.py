"""TIES: trim every task vector, elect one sign per entry, average those who agree.

Paper: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv:2306.01708 (algorithm 1). Where several entries have the magnitude at which trimming ends, all
of them stay.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.methods._combination import dtypes, running
from metamerge.methods._selection import largest_magnitude
from metamerge.methods._task_vectors import ELECTIONS, add_task_vectors, agreed
from metamerge.options import check_choice, check_number
from metamerge.registry import merge_method
from metamerge.weights import Weights

_SCOPES = ("model", "tensor")


@merge_method(
    paper="arXiv:2306.01708",
    align=None,
    neutral={"density": 1.0, "scale": 1.0},
    per_tensor={"scope": "tensor"},
)
def ties(
    weights: Sequence[Weights],
    *,
    base: Weights,
    density: float = 0.2,
    scale: float = 1.0,
    scope: str = "model",
    elect: str = "mass",
) -> Weights:
    """Merge fine-tuned members into their common base, resolving conflicts of sign.

    Args:
        weights: One state dict per member, fine-tuned from ``base``.
        base: What they were fine-tuned from.
        density: Share of every task vector that is kept, the largest magnitudes, in (0, 1].
        scale: Factor on the merged task vector; 0 gives back the base.
        scope: ``model`` trims over the whole task vector, as in the paper; ``tensor`` trims every
            tensor by itself.
        elect: ``mass`` elects the sign of the summed task vectors, ``count`` that of most members.

    Returns:
        New state dict with the members' names, shapes and dtypes; running statistics are averaged.

    Raises:
        ConfigError: If an option is out of its range.
    """
    check_number("ties", "density", density, "(0, 1]")
    check_number("ties", "scale", scale)
    check_choice("ties", "scope", scope, _SCOPES)
    check_choice("ties", "elect", elect, ELECTIONS)
    floors = {} if density >= 1 else _floors(weights, base, density, scope)

    def fuse(key: str, vectors: Tensor) -> Tensor:
        if key in floors:
            vectors = torch.stack([*map(_trimmed, vectors, floors[key])])
        return scale * agreed(vectors, elect)

    return add_task_vectors(weights, base, fuse)


def _trimmed(vector: Tensor, floor: Tensor) -> Tensor:
    """Zero what is below the floor; hardshrink, which has a strict bound, is the fastest way."""
    return F.hardshrink(vector, float(floor.nextafter(torch.zeros_like(floor))))


def _floors(
    weights: Sequence[Weights], base: Weights, density: float, scope: str
) -> dict[str, Tensor]:
    """Smallest magnitude that is kept, for every tensor ``[m]``."""
    kinds = dtypes(weights)
    names = [k for k in kinds if k not in running(weights[0]) and weights[0][k].numel()]
    floors = {}
    for keys in [names] if scope == "model" else [[key] for key in names]:
        rank = max(1, int(density * sum(base[key].numel() for key in keys)))
        computing = torch.float32
        for key in keys:
            computing = torch.promote_types(computing, kinds[key])
        floor = [
            largest_magnitude([w[k] for k in keys], [base[k] for k in keys], rank, computing)
            for w in weights
            if keys
        ]
        floors |= {key: torch.stack(floor) for key in keys}
    return floors
