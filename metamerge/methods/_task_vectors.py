"""Task vectors: what fine-tuning added to the base, and what several methods do with them.

Shape comments: m members, n entries of a piece.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metamerge.methods._combination import combine, dtypes, entrywise, restore, running
from metamerge.weights import Weights

ELECTIONS = ("mass", "count")
"""Whether a sign is elected by the sum of all task vectors, or by one vote of each."""


def add_task_vectors(
    weights: Sequence[Weights],
    base: Weights,
    fuse: Callable[[str, Tensor], Tensor],
    factors: Callable[[Tensor], Tensor] | None = None,
) -> Weights:
    """Add to the base what is made of all task vectors; average running statistics.

    Args:
        weights: One state dict per member.
        base: What they were fine-tuned from.
        fuse: Takes the name of a tensor and entries of its task vectors, ``[m, n]``, in float32 or
            float64; returns what is added to the base there, ``[n]``.
        factors: Takes a member's tensor and returns one of its shape, by which the task vector is
            multiplied first; called for one tensor after the other, member by member.

    Returns:
        New weights in the members' dtypes.
    """
    members = len(weights)
    averaged = [{key: member[key] for key in running(weights[0])} for member in weights]
    fused = combine(averaged, [1 / members] * members)
    for key, dtype in dtypes(weights).items():
        if key in fused:
            continue

        def moved(tensors: Sequence[Tensor], key: str = key) -> Tensor:
            origin, *own = tensors
            vectors = torch.stack(own[:members]) - origin
            if factors is not None:
                vectors = vectors * torch.stack(own[members:])
            return origin + fuse(key, vectors)

        tensors = [base[key], *(member[key] for member in weights)]
        drawn = [] if factors is None else [factors(tensor) for tensor in tensors[1:]]
        fused[key] = entrywise(moved, [*tensors, *drawn], dtype)
    return restore(fused, weights)


def agreed(vectors: Tensor, elect: str = "mass") -> Tensor:
    """Mean of those entries whose sign is the elected one.

    Entries without a majority, and those where nobody moved, are 0. Votes of equal number are
    decided by mass.

    Args:
        vectors: Task vectors ``[m, n]``.
        elect: One of ``ELECTIONS``.

    Returns:
        Their disjoint mean, ``[n]``.
    """
    sign = vectors.detach().sum(0).sign()
    if elect == "count":
        votes = vectors.detach().sign().sum(0).sign()
        sign = torch.where(votes == 0, sign, votes)
    agreeing = (vectors.detach() * sign).clamp_(min=0).sign_()  # 1 where the sign is this one
    return (vectors * agreeing).sum(0) / agreeing.sum(0).clamp_(min=1)
