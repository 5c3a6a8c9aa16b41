"""What members say about inputs, all of them in one batched pass.

Shape comments: m members, b inputs, c classes or outputs, d units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.errors import ConfigError, NonFinite, StructureError
from metamerge.options import check_choice
from metamerge.structure import Execution, Program
from metamerge.structure.operators import LAYERS
from metamerge.weights import Weights

FEATURES = ("probabilities", "logits")
_CHUNK = 256  # inputs per pass: the widest feature map of all members has to fit into memory


class Seen(NamedTuple):
    """What members say, and what about.

    Attributes:
        outputs: Logits or numbers, ``[m, b, c]``.
        inputs: What they were asked about, ``[b, ...]``; only some consensuses look at it.
        activations: What the last layer of each reads, ``[m, b, d]``; only some look at it.
    """

    outputs: Tensor
    inputs: Tensor | None = None
    activations: Tensor | None = None


def watch(
    program: Program, weights: Weights, inputs: Sequence[Tensor], *, activations: bool = False
) -> Seen:
    """Run all members on common inputs.

    Args:
        program: Their architecture.
        weights: Their stacked weights, ``[m, ...]``.
        inputs: The network's inputs, batch axis first.
        activations: Whether to keep what their last layer reads.

    Returns:
        What they say about the first of the inputs.

    Raises:
        StructureError: If activations are asked for and there is no layer to read them.
    """
    execution = Execution(program, weights, inputs, stacked=True)
    last, read = last_layer(program) if activations else None, None
    for node in program.nodes:
        if node.name == last:
            value, own = execution.argument(node, 0)
            value = value if own else value.expand(_count(weights), *value.shape)
            read = value.flatten(2)  # [m, b, d]
        execution.step(node)
    return Seen(execution.output(), inputs[0], read)


def watch_all(
    program: Program, weights: Weights, inputs: Tensor, *, activations: bool = False
) -> Seen:
    """Run all members on as many inputs as there are, in chunks of bounded memory.

    Args:
        program: Their architecture.
        weights: Their stacked weights, ``[m, ...]``.
        inputs: ``[b, ...]``.
        activations: Whether to keep what their last layer reads.

    Returns:
        What they say.

    Raises:
        NonFinite: If a member says something that is not finite.
    """
    with torch.no_grad():
        parts = [
            watch(program, weights, [some], activations=activations)
            for some in inputs.split(_CHUNK)
        ]
    outputs = torch.cat([part.outputs for part in parts], 1)
    bad = (~outputs.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(
            f"checkpoints[{bad[0]}] puts out NaN or infinity on the batches. Leave this member "
            f"out, or look for inputs that are out of its range."
        )
    read = torch.cat([part.activations for part in parts], 1) if activations else None
    return Seen(outputs, inputs, read)


def last_layer(program: Program) -> str:
    """The linear map or convolution that comes last on the way to the output.

    Args:
        program: The architecture.

    Returns:
        Name of the operator call.

    Raises:
        StructureError: If there is none.
    """
    needed = {program.output}
    for node in reversed(program.nodes):
        if node.name in needed:
            if node.op in LAYERS:
                return node.name
            needed |= {*node.refs}
    raise StructureError(
        "The network has no linear map or convolution whose inputs could be compared. Choose "
        "similar='inputs'."
    )


def check_outputs(where: str, outputs: Tensor, members: int | None = None) -> None:
    """Refuse what is not ``[m, b, c]``.

    Args:
        where: Name of the consensus, for the message.
        outputs: What members say.
        members: How many of them there have to be, where that is known.

    Raises:
        ConfigError: If the shape is another one.
    """
    if outputs.ndim != 3 or not len(outputs):
        raise ConfigError(
            f"{where}: logits have shape {tuple(outputs.shape)}, expected (members, inputs, "
            f"classes) with at least one member."
        )
    if members is not None and len(outputs) != members:
        raise ConfigError(
            f"{where}: there are {len(outputs)} members, expected the {members} that it was fitted "
            f"to. Fit it again."
        )


def check_labels(where: str, labels: Tensor, outputs: Tensor) -> None:
    """Refuse labels that are not one class for each input of ``outputs``.

    Args:
        where: Name of the consensus, for the message.
        labels: ``[b]``.
        outputs: ``[m, b, c]``.

    Raises:
        ConfigError: If shape, dtype or classes are others.
    """
    _, inputs, classes = outputs.shape
    if labels.shape != (inputs,) or labels.is_floating_point() or not inputs:
        raise ConfigError(
            f"{where}: labels have shape {tuple(labels.shape)} and dtype {labels.dtype}, expected "
            f"({inputs},) and whole numbers, one class per input, for at least one input."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ConfigError(
            f"{where}: labels go from {low} to {high}, the members have classes 0 to "
            f"{classes - 1}. Pass labels of the members' task."
        )


def check_features(where: str, of: str) -> None:
    """Refuse what ``features`` does not know.

    Args:
        where: Name of the consensus, for the message.
        of: What weights shall multiply.

    Raises:
        ConfigError: If it is unknown.
    """
    check_choice(where, "of", of, FEATURES)


def features(logits: Tensor, scale: Tensor, of: str) -> Tensor:
    """What learned weights multiply: probabilities, or logits centred over classes and scaled.

    Args:
        logits: ``[m, b, c]``.
        scale: What centred logits are divided by, ``[m]``.
        of: One of ``FEATURES``.

    Returns:
        ``[m, b, c]``.
    """
    if of == "probabilities":
        return logits.softmax(-1)
    return (logits - logits.mean(-1, keepdim=True)) / scale[:, None, None]


def spread(logits: Tensor) -> Tensor:
    """Root mean square of each member's centred logits, ``[m, b, c]`` -> ``[m]``; 1 for zero."""
    centred = logits - logits.mean(-1, keepdim=True)
    found = centred.square().mean((1, 2)).sqrt()
    return found.where(found > 0, 1.0)


def _count(weights: Weights) -> int:
    return len(next(iter(weights.values())))
