"""Methods that look at the angles between members: what counts as one vector.

Whatever they compute lies in the span of the members, so inner products, ``[m, m]``, are all that
they have to read from the weights, and coefficients, ``[m]``, are all that they have to find.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metamerge.methods._combination import combine, gram, restore, running
from metamerge.weights import Weights

SCOPES = ("tensor", "model")
"""Whether every tensor is a vector, or all tensors together are one."""


def combine_by_angles(
    weights: Sequence[Weights],
    choose: Callable[[Tensor], Tensor],
    *,
    scope: str,
    shares: Sequence[float],
    base: Weights | None = None,
) -> Weights:
    """Combine members with coefficients that are chosen from their inner products.

    Args:
        weights: One state dict per member.
        choose: From inner products ``[m, m]`` to coefficients ``[m]``, both in float64; with a base
            it gets those of the task vectors, and returns what of each is added to the base.
        scope: One of ``SCOPES``.
        shares: Coefficients of running statistics, which are no directions.
        base: What the members were fine-tuned from.

    Returns:
        New weights in the members' dtypes.
    """
    statistics = running(weights[0])
    floating = {key for key, tensor in weights[0].items() if tensor.is_floating_point()}
    names = [key for key in weights[0] if key in floating - statistics]
    vectors = [[key] for key in names] if scope == "tensor" else [names]
    fused = combine([_part(member, statistics) for member in weights], shares)
    for keys in vectors:
        parts = [_part(member, keys) for member in weights]
        origin = None if base is None else _part(base, keys)
        coefficients = choose(gram(parts, origin))
        if origin is not None:
            parts = [*parts, origin]
            coefficients = torch.cat([coefficients, 1 - coefficients.sum(0, keepdim=True)])
        fused |= combine(parts, coefficients.unbind())
    return restore(fused, weights)


def _part(weights: Weights, keys: Sequence[str] | set[str]) -> Weights:
    return {key: weights[key] for key in weights if key in keys}
