"""Alignment: put the units of all members into one common order of slots.

Most alignments take stacked families, every tensor ``[f, m, ...]``, and a permutation spec, and
return a ``Permutation`` ``[f, m, n]`` per group; they never change weights, ``spec.permute`` does.
Those that do more than permute (transport, changes of scale) take members and return new ones.
``align_members`` is the one way to call either.
"""

from metamerge.alignment.aligning import align_members
from metamerge.alignment.weight_matching import matching_cost, medoid, weight_matching

__all__ = ["align_members", "matching_cost", "medoid", "weight_matching"]
