"""Outer optimisers: where members that were trained apart and merged go on from.

One file per optimiser, one pure function ``optimiser(before, merged, *, <options>) -> Position``.
"""

from metamerge.outer.averaging import averaging
from metamerge.outer.elastic_averaging import elastic_averaging
from metamerge.outer.nesterov import nesterov
from metamerge.outer.position import Position
from metamerge.outer.soft_weight_sharing import soft_weight_sharing

OUTER = {
    optimiser.__name__: optimiser
    for optimiser in (averaging, nesterov, elastic_averaging, soft_weight_sharing)
}

__all__ = [
    "OUTER",
    "Position",
    "averaging",
    "elastic_averaging",
    "nesterov",
    "soft_weight_sharing",
]
