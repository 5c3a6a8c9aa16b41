"""Structure: what a network is made of, found by tracing and proved by permuting."""

from metamerge.structure.discovery import discover, discover_program
from metamerge.structure.factors import Concat, Factor
from metamerge.structure.layout import OUTPUTS, Layer, Layout
from metamerge.structure.lockstep import Execution, run
from metamerge.structure.program import Program
from metamerge.structure.proof import prove, prove_module
from metamerge.structure.spec import Permutation, PermutationSpec, Scaling
from metamerge.structure.tracing import Inputs, trace

__all__ = [
    "OUTPUTS",
    "Concat",
    "Execution",
    "Factor",
    "Inputs",
    "Layer",
    "Layout",
    "Permutation",
    "PermutationSpec",
    "Program",
    "Scaling",
    "discover",
    "discover_program",
    "prove",
    "prove_module",
    "run",
    "trace",
]
