"""Alignment: put the units of all members into one common order of slots.

An alignment takes stacked families, every tensor ``[f, m, ...]``, and a permutation spec, and
returns a ``Permutation`` ``[f, m, n]`` per group. It never changes weights: ``spec.permute`` does.
"""

from collections.abc import Callable

from metamerge.alignment.weight_matching import matching_cost, medoid, weight_matching
from metamerge.structure import Permutation

ALIGNMENTS: dict[str, Callable[..., Permutation]] = {"weight_matching": weight_matching}

__all__ = ["ALIGNMENTS", "matching_cost", "medoid", "weight_matching"]
