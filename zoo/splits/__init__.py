"""Splits: ways to cut rows of a task into segments, one per member of a family.

Every split is a pure function ``split(targets, rows, members, *, ..., generator)`` and returns one
tensor of row numbers per member, in random order: its first n rows are a fair sample of it. What a
split needs beside the targets it asks for by name: ``features`` or ``scores``, one entry per row of
the task; ``zoo.splits.features`` makes them. Every other keyword argument is an option.
"""

from zoo.splits.checks import describe, validate
from zoo.splits.classes import classes
from zoo.splits.clusters import clusters
from zoo.splits.coefficients import COEFFICIENTS, choose_members, coefficients
from zoo.splits.ordered import bins, difficulty
from zoo.splits.sampled import disjoint, everything, overlapping
from zoo.splits.skew import dirichlet, quantity

SPLITS = {
    split.__name__: split
    for split in (
        disjoint,
        overlapping,
        everything,
        dirichlet,
        classes,
        quantity,
        clusters,
        difficulty,
        bins,
    )
}

SHARING = frozenset({"overlapping", "everything", "dirichlet"})
"""Splits whose members may share rows by design; those of "dirichlet" with ``overlap`` only."""

__all__ = [
    "COEFFICIENTS",
    "SHARING",
    "SPLITS",
    "bins",
    "choose_members",
    "classes",
    "clusters",
    "coefficients",
    "describe",
    "difficulty",
    "dirichlet",
    "disjoint",
    "everything",
    "overlapping",
    "quantity",
    "validate",
]
