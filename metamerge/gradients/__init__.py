"""Gradients of several parts of the data, combined into one step."""

from metamerge.gradients.orthogonalisation import ORDERS, keep_some, orthogonalise

__all__ = ["ORDERS", "keep_some", "orthogonalise"]
