"""Structure: what a network is made of, found by tracing and proved by permuting."""

from metamerge.structure.discovery import discover, discover_program, prove
from metamerge.structure.layout import OUTPUTS, Layer, Layout
from metamerge.structure.lockstep import Execution, run
from metamerge.structure.program import Program, trace
from metamerge.structure.spec import Factor, Permutation, PermutationSpec

__all__ = [
    "OUTPUTS",
    "Execution",
    "Factor",
    "Layer",
    "Layout",
    "Permutation",
    "PermutationSpec",
    "Program",
    "discover",
    "discover_program",
    "prove",
    "run",
    "trace",
]
