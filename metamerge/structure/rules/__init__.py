"""What each operator does to axes: one rule per kind of operator, and the table that names them.

A rule takes a ``Call``, ties what the operator ties, and returns the axes of the output, or a list
of these where there are several outputs. An operator that has no rule and does not treat every
entry on its own is not followed: nothing is guessed.
"""

from collections.abc import Callable
from typing import Any

from metamerge.structure.operators import is_entrywise
from metamerge.structure.rules.call import POSITIONS, Call
from metamerge.structure.rules.indexing import INDEX_RULES, LOOKED_UP
from metamerge.structure.rules.normalisation import NORM_RULES
from metamerge.structure.rules.pointwise import POINTWISE_RULES, pointwise
from metamerge.structure.rules.products import PRODUCT_RULES
from metamerge.structure.rules.recurrent import GATES, RECURRENT_RULES
from metamerge.structure.rules.spatial import SPATIAL_RULES, TAPS
from metamerge.structure.rules.views import VIEW_RULES

Rule = Callable[[Call], Any]

RULES: dict[str, Rule] = {
    **POINTWISE_RULES,
    **VIEW_RULES,
    **INDEX_RULES,
    **PRODUCT_RULES,
    **NORM_RULES,
    **SPATIAL_RULES,
    **RECURRENT_RULES,
}


def rule_of(op: str) -> Rule | None:
    """The rule of an operator; None where it is not followed.

    Args:
        op: Name such as ``linear.default``.

    Returns:
        Its rule: that of the table, or that of entry-wise operators where it is one.
    """
    if op in RULES:
        return RULES[op]
    return pointwise if is_entrywise(op) else None


__all__ = ["GATES", "LOOKED_UP", "POSITIONS", "RULES", "TAPS", "Call", "Rule", "rule_of"]
