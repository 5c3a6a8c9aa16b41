"""Alignment: put the units of all members into one common order of slots.

Most alignments take stacked families, every tensor ``[f, m, ...]``, and a permutation spec, and
return a ``Permutation`` ``[f, m, n]`` per group; they never change weights, ``spec.permute`` does.
Those that do more than permute (transport, changes of scale) take members and return new ones.
``align_members`` is the one way to call either.
"""

from metamerge.alignment.activation_matching import activation_matching
from metamerge.alignment.aligning import align_members
from metamerge.alignment.canonical import canonical
from metamerge.alignment.cycle_consistent import cycle_consistent
from metamerge.alignment.optimal_transport import optimal_transport
from metamerge.alignment.sinkhorn import sinkhorn
from metamerge.alignment.weight_matching import matching_cost, medoid, weight_matching

__all__ = [
    "activation_matching",
    "align_members",
    "canonical",
    "cycle_consistent",
    "matching_cost",
    "medoid",
    "optimal_transport",
    "sinkhorn",
    "weight_matching",
]
