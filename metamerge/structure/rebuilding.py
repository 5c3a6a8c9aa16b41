"""A module of the same code with tensors of other sizes, checked against its program.

Modules of torch keep sizes beside their tensors (``nn.Linear.in_features``, the groups of a
convolution). They are set anew from the tensors and the program; a module whose forward() holds
sizes of its own is found out and refused.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metamerge.errors import IncompatibleWeights, StructureError
from metamerge.structure.draws import random_inputs
from metamerge.structure.lockstep import run
from metamerge.structure.program import Program

_CLOSE = 1e-9  # relative, in float64
_LENGTHS = {  # attribute of a module -> a tensor of it and an axis whose length it is
    "out_features": ("weight", 0),
    "in_features": ("weight", 1),
    "out_channels": ("weight", 0),
    "num_features": ("running_mean", 0),
    "num_channels": ("weight", 0),
    "embedding_dim": ("weight", 1),
}
_TOLD = {  # attribute -> argument of the operator that reads the module's weight
    "groups": "groups",
    "num_groups": "num_groups",
    "normalized_shape": "normalized_shape",
}


def rebuilt(model: nn.Module, program: Program, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module with weights of other widths.

    Args:
        model: A module of the architecture, of any widths; it is not changed.
        program: The network that the copy has to be.
        weights: Its state dict.

    Returns:
        The copy, in the mode of the module.

    Raises:
        IncompatibleWeights: If names or numbers of axes are not those of the module.
        StructureError: If the copy does not compute what the program does.
    """
    module = copy.deepcopy(model)
    found = module.state_dict(keep_vars=True)
    if found.keys() != weights.keys():
        wrong = sorted(found.keys() ^ weights.keys())
        raise IncompatibleWeights(
            f"{type(model).__name__}: {wrong[:5]} are in the module or in the weights, not in "
            "both. Pass a module of their architecture."
        )
    for path, part in module.named_modules():
        _resize(part, f"{path}." if path else "", program, weights)
    _check(copy.deepcopy(module).eval().cpu().double(), program, weights)
    return module


def _resize(part: nn.Module, prefix: str, program: Program, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in part.named_parameters(recurse=False):
        own = weights[prefix + name].detach().clone()
        setattr(part, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
    for name, _ in part.named_buffers(recurse=False):
        if prefix + name in weights:
            setattr(part, name, weights[prefix + name].detach().clone())
    for attribute, argument in _TOLD.items():
        told = _arguments(program, f"{prefix}weight").get(argument)
        if told is not None and hasattr(part, attribute):
            setattr(part, attribute, told)
    for attribute, (name, axis) in _LENGTHS.items():
        tensor = getattr(part, name, None)
        if hasattr(part, attribute) and isinstance(tensor, Tensor) and tensor.ndim > axis:
            setattr(part, attribute, tensor.shape[axis])
    if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        part.in_channels = part.weight.shape[1] * part.groups


def _arguments(program: Program, key: str) -> Mapping[str, object]:
    """Arguments of the first operator that reads a tensor."""
    values = {value for value, own in program.parameters.items() if own == key}
    for node in program.nodes:
        if not values.isdisjoint(node.refs):
            return node.arguments
    return {}


def _check(module: nn.Module, program: Program, weights: Mapping[str, Tensor]) -> None:
    inputs = random_inputs(program, torch.Generator().manual_seed(0))
    double = {
        k: t.detach().cpu().double() if t.is_floating_point() else t.cpu()
        for k, t in weights.items()
    }
    way_out = (
        "Its forward() or a layer of its own holds sizes: write them in terms of tensors' shapes, "
        "or run the network by its program: metamerge.structure.run(program, weights, inputs)."
    )
    try:
        with torch.no_grad():
            made = module(*inputs)
            expected = run(program.in_float64(), double, inputs)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        raise StructureError(
            f"{type(module).__name__} in other widths: {error} {way_out}"
        ) from error
    made = next(iter(made.values())) if isinstance(made, Mapping) else made
    made = made[0] if isinstance(made, tuple | list) else made
    scale = float(expected.abs().max().clamp_min(1e-12))
    if made.shape != expected.shape or not float((made - expected).abs().max()) <= _CLOSE * scale:
        raise StructureError(
            f"{type(module).__name__} in other widths is another network. {way_out}"
        )
