"""Tell tensors that can be merged from those that cannot."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

from metamerge.errors import IncompatibleWeights
from metamerge.weights import Weights

_FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plain_weights(name: str, tensors: Mapping) -> Weights:
    """Make weights of any mapping of tensors, or say which tensor cannot be merged.

    Args:
        name: Where the tensors come from, for messages.
        tensors: Names to tensors; parameters are detached, shared memory stays shared.

    Returns:
        A new dict of contiguous tensors; only those that were not contiguous are copied.

    Raises:
        IncompatibleWeights: If a name is not a string, a value is not a plain dense tensor, or a
            dtype cannot be computed with.
    """
    weights = {}
    for key, value in tensors.items():
        fault = _fault(key, value)
        if fault:
            raise IncompatibleWeights(f"{name}: {key!r} {fault}")
        weights[key] = value.detach().contiguous()
    return weights


def _fault(key: object, value: object) -> str | None:
    """Say why a value cannot be a weight; None if it can."""
    if not isinstance(key, str):
        return f"is a name of type {type(key).__name__}. Tensor names must be strings."
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor. Leave it out of the state dict."
    if isinstance(value, UninitializedTensorMixin):
        return "has no values yet. Run the lazy module once before you take its state dict."
    if value.is_meta:
        return "is on the meta device and has no values. Load the weights before merging."
    if value.is_quantized:
        return "is quantised. Give its dequantize()."
    if value.layout != torch.strided or value.is_nested:
        return f"has layout {value.layout}. Give its to_dense()."
    if value.is_complex():
        return f"has dtype {value.dtype}. Give real and imaginary parts as two tensors."
    if value.is_floating_point() and value.dtype not in _FLOATING_DTYPES:
        return f"has dtype {value.dtype}. Convert it to bfloat16 first."
    if type(value.detach()) is not Tensor:
        return f"is a {type(value).__name__}. Convert it to a plain tensor."
    return None
