"""Names of operators that other rooms treat in one way, such as the layers of a network."""

import torch

from metamerge.structure.program import operator

LINEAR = {"linear.default"}
CONVOLUTIONS = {f"conv{d}d.{form}" for d in (1, 2, 3) for form in ("default", "padding")}
LAYERS = LINEAR | CONVOLUTIONS
"""Operators with a weight whose rows make units and whose columns read units."""

_UNTAGGED = {
    *("hardswish.default", "log_sigmoid.default", "true_divide.Scalar", "special_expit.default"),
    *("special_erf.default", "__and__.Tensor", "__or__.Tensor", "__xor__.Tensor"),
    *("floor_divide.default", "where.ScalarOther", "where.ScalarSelf", "isin.Tensor_Tensor"),
    *("masked_fill.Scalar", "masked_fill.Tensor", "where.self"),
}  # entry-wise, though torch does not tag all of them so


def is_entrywise(op: str) -> bool:
    """Whether an operator treats every entry on its own, after broadcasting."""
    return op in _UNTAGGED or torch.Tag.pointwise in operator(op).tags
