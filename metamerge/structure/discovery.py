"""Structure discovery: follow every axis through the traced operators, then prove the result."""

from dataclasses import replace

from torch import nn

from metamerge.errors import StructureError
from metamerge.structure.program import Program
from metamerge.structure.proof import find_failure, refusal
from metamerge.structure.scaling import find_scalings
from metamerge.structure.spec import PermutationSpec
from metamerge.structure.tracing import Inputs, trace
from metamerge.structure.walk import Walk

# Proved specs, by digest of the program and the order in which its tensors are listed.
_SPECS: dict[tuple[str, tuple[str, ...], bool], PermutationSpec] = {}


def discover(model: nn.Module, example_inputs: Inputs, *, partial: bool = False) -> PermutationSpec:
    """Find which axes of a network's tensors carry permutable units, and prove it.

    Args:
        model: Any network that ``torch.export`` accepts.
        example_inputs: One input tensor, a sequence of them, or a mapping from the names of
            forward()'s arguments; batch axis first.
        partial: Whether units at operators that cannot be followed, and groups that fail the proof,
            are pinned (never permuted, listed in ``spec.pinned``) rather than refused.

    Returns:
        The permutation spec.

    Raises:
        StructureError: If the network cannot be traced, an operator has no rule, or the proof
            fails.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> print(discover(net, torch.zeros(2, 4)))
        PermutationSpec: 1 group, 8 of 8 hidden units are free
          0 (8 units, positive scaling): 0.weight[0], 0.bias[0], 2.weight[1]
    """
    return discover_program(trace(model, example_inputs), partial=partial)


def discover_program(program: Program, *, partial: bool = False) -> PermutationSpec:
    """``discover`` for a network that is traced already; the proof runs on random weights.

    Args:
        program: The traced network.
        partial: Whether what cannot be followed or proved is pinned rather than refused.

    Returns:
        The permutation spec, its tensors in the order of the program; the same one for the same
        program, which is proved once.

    Raises:
        StructureError: If an operator has no rule, or the proof fails.
    """
    key = (program.digest, tuple(program.parameters.values()), partial)
    if key not in _SPECS:
        walk = Walk(program, partial)
        spec = walk.spec()
        for group in [g for g, units in spec.groups.items() if not units]:
            spec = spec.without(group, "it has no units")
        spec = find_scalings(program, spec, walk.carried(spec))
        while failure := find_failure(program, spec):
            if failure.scaling is not None:  # a change of scale is recorded where it is proved
                kept = tuple(s for s in spec.scalings if s != failure.scaling)
                spec = replace(spec, scalings=kept)
            elif partial and failure.group is not None:
                spec = spec.without(failure.group, "it failed the proof")
            else:
                raise StructureError(refusal(program, spec, failure))
        _SPECS[key] = spec
    return _SPECS[key]
