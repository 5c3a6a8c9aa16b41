"""What all methods do in the same way: dtypes, and tensors that are not numbers to be averaged.

Computing goes on in float32 (in float64 where a member has it), results come in the members' dtype;
of integer and bool tensors, such as step counters, the elementwise maximum over members is taken.
"""

from collections.abc import Sequence
from functools import reduce

import torch

from metamerge.weights import Weights


def combine(weights: Sequence[Weights], coefficients: Sequence[float]) -> Weights:
    """Add up members, each times its coefficient.

    Args:
        weights: One state dict per member.
        coefficients: One number per member.

    Returns:
        New weights in the members' dtypes.
    """
    total = {
        key: sum(
            c * member[key].to(_computing(dtype))
            for c, member in zip(coefficients, weights, strict=True)
        )
        for key, dtype in _dtypes(weights).items()
    }
    return restore(total, weights)


def restore(fused: Weights, weights: Sequence[Weights]) -> Weights:
    """Give fused weights the members' dtypes, and fill in the tensors that are not floating.

    Args:
        fused: Floating tensors of the outcome, in new memory; others are not looked at.
        weights: One state dict per member. Where their floating dtypes differ, they are promoted.

    Returns:
        Weights with the names, order and dtypes of the members.
    """
    dtypes = _dtypes(weights)
    return {
        key: fused[key].to(dtypes[key])
        if key in dtypes
        else torch.stack([member[key] for member in weights]).amax(0)
        for key in weights[0]
    }


def _dtypes(weights: Sequence[Weights]) -> dict[str, torch.dtype]:
    """Common dtype of every floating tensor."""
    return {
        key: reduce(torch.promote_types, (member[key].dtype for member in weights))
        for key, tensor in weights[0].items()
        if tensor.is_floating_point()
    }


def _computing(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
