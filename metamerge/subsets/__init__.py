"""Subsets of weights that are trained while the others are fixed: masks, partitions, passes."""

from metamerge.subsets.hessian import (
    hessian_diagonal,
    hessian_product,
    saliencies,
    squared_interactions,
    summed_interactions,
)
from metamerge.subsets.kernels import Kernels, by_kernel, find_kernels
from metamerge.subsets.masks import (
    Live,
    Subset,
    live_weights,
    masks,
    placed,
    rows_subset,
    single_subset,
    taken,
    window,
)
from metamerge.subsets.partition import cut, two_groups
from metamerge.subsets.passes import PartialPass

__all__ = [
    "Kernels",
    "Live",
    "PartialPass",
    "Subset",
    "by_kernel",
    "cut",
    "find_kernels",
    "hessian_diagonal",
    "hessian_product",
    "live_weights",
    "masks",
    "placed",
    "rows_subset",
    "saliencies",
    "single_subset",
    "squared_interactions",
    "summed_interactions",
    "taken",
    "two_groups",
    "window",
]
