"""What all methods do in the same way: dtypes, and tensors that are not numbers to be averaged.

Computing goes on in float32 (in float64 where a member has it), results come in the members' dtype;
of integer and bool tensors, such as step counters, the elementwise maximum over members is taken.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from metamerge.weights import Weights

_STATISTICS = ("running_mean", "running_var")
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch has no maximum of these
_PIECE = 2**19  # entries of all members: 2 MiB in float32, so that sums do not leave the cache


def combine(weights: Sequence[Weights], coefficients: Sequence[float | Tensor]) -> Weights:
    """Add up members, each times its coefficient.

    Args:
        weights: One state dict per member.
        coefficients: One number per member.

    Returns:
        New weights in the members' dtypes.
    """
    fused = {
        key: entrywise(
            lambda tensors: _total(coefficients, tensors), [m[key] for m in weights], dtype
        )
        for key, dtype in dtypes(weights).items()
    }
    return restore(fused, weights)


def _total(coefficients: Sequence[float | Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Sum of halves of halves, whose rounding error grows with the logarithm of their number."""
    half = len(tensors) // 2
    if not half:
        return coefficients[0] * tensors[0]
    first = _total(coefficients[:half], tensors[:half])
    return first + _total(coefficients[half:], tensors[half:])


def entrywise(
    function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """Apply a function that treats every entry alike, piece by piece on the CPU.

    Args:
        function: Takes one vector ``[n]`` per tensor, in float32 or float64, and returns one in
            new memory.
        tensors: Tensors of one shape.
        dtype: Of the result.

    Returns:
        New tensor of that shape.
    """
    computing = torch.promote_types(dtype, torch.float32)
    size = _size(tensors)
    pieces = zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)
    made = (function([t.to(computing) for t in piece]).to(dtype) for piece in pieces)
    if tensors[0].numel() <= size or any(tensor.requires_grad for tensor in tensors):
        return torch.cat(list(made)).reshape(tensors[0].shape)
    whole = tensors[0].new_empty(tensors[0].numel(), dtype=dtype)  # half the memory of cat()
    for place, piece in zip(whole.split(size), made, strict=True):
        place.copy_(piece)
    return whole.reshape(tensors[0].shape)


def gram(weights: Sequence[Weights], base: Weights | None = None) -> Tensor:
    """Inner products of the members' vectors: all floating tensors of a member, end to end.

    Args:
        weights: One state dict per member.
        base: Where the vectors start; the origin without it.

    Returns:
        One number per pair of members, ``[m, m]``, in float64.
    """
    some = next(iter(weights[0].values()), torch.zeros(0))
    total = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=some.device)
    for key in dtypes(weights):
        tensors = [member[key] for member in weights] + ([base[key]] if base else [])
        size = _size(tensors)
        for piece in zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True):
            rows = torch.stack(piece).double()  # [m, n]
            rows = rows[:-1] - rows[-1] if base else rows
            total = total + rows @ rows.mT
    return total


def running(weights: Weights) -> set[str]:
    """Names of running statistics, which are averaged and never extrapolated.

    Args:
        weights: A state dict.

    Returns:
        Names of the running means and variances of its batch normalisations.
    """
    return {key for key in weights if key.endswith(_STATISTICS)}


def restore(fused: Weights, weights: Sequence[Weights]) -> Weights:
    """Give fused weights the members' dtypes, and fill in the tensors that are not floating.

    Args:
        fused: Floating tensors of the outcome, in new memory; others are not looked at.
        weights: One state dict per member. Where their floating dtypes differ, they are promoted.

    Returns:
        Weights with the names, order and dtypes of the members.
    """
    common = dtypes(weights)
    return {
        key: fused[key].to(common[key])
        if key in common
        else _largest([member[key] for member in weights])
        for key in weights[0]
    }


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(tensors))
    if stacked.dtype in _UNSIGNED:
        return torch.from_numpy(stacked.cpu().numpy().max(0)).to(stacked.device)
    return stacked.amax(0)


def dtypes(weights: Sequence[Weights]) -> dict[str, torch.dtype]:
    """Common dtype of every floating tensor.

    Args:
        weights: One state dict per member.

    Returns:
        Name of a floating tensor -> the dtype that holds all members' numbers.
    """
    return {
        key: reduce(torch.promote_types, (member[key].dtype for member in weights))
        for key, tensor in weights[0].items()
        if tensor.is_floating_point()
    }


def _size(tensors: Sequence[Tensor]) -> int:
    """Entries of a tensor that are computed at a time."""
    if tensors[0].device.type == "cpu":
        return max(2**12, _PIECE // len(tensors))
    return max(1, tensors[0].numel())
