"""Running many networks at once and scoring what they say, in bounded memory.

Shape comments: f families, m members, n networks, b inputs, c classes, o outputs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evaluation.metrics.classification import BINS, classification_scores
from evaluation.metrics.regression import regression_scores
from metamerge.structure import Program
from metamerge.weights import Weights
from zoo.training import predict

SAID = 2**21  # bytes of the outputs that are scored at a time: what a core's cache holds is fast
WEIGHTS = 2**28  # bytes of one tensor of the networks that are made at a time


def family_logits(program: Program, families: Weights, inputs: Tensor) -> Tensor:
    """Logits of all members of all families.

    Args:
        program: The architecture.
        families: ``[f, m, ...]``.
        inputs: ``[b, ...]``.

    Returns:
        ``[f, m, b, c]``.
    """
    count, members = next(iter(families.values())).shape[:2]
    flat = {key: tensor.flatten(0, 1) for key, tensor in families.items()}
    return predict(program, flat, inputs).unflatten(0, (count, members))


def score_outputs(
    outputs: Tensor, targets: Tensor, *, segments: Sequence[Tensor] = (), bins: int = BINS
) -> dict[str, Tensor]:
    """Score what networks say: as classifiers where targets are classes, else as regressions.

    Args:
        outputs: Logits ``[..., b, c]``, or numbers ``[..., b, o]``.
        targets: Classes ``[b]`` or ``[..., b]``, or numbers ``[b, o]``.
        segments: Classifiers: inputs that are to be scored apart, an index of rows each.
        bins: Classifiers: bins of the calibration error.

    Returns:
        What ``classification_scores`` or ``regression_scores`` return.
    """
    if targets.is_floating_point():
        return regression_scores(outputs, targets)
    return classification_scores(outputs, targets, segments=segments, bins=bins)


def score_networks(
    program: Program,
    weights: Weights,
    inputs: Tensor,
    targets: Tensor,
    *,
    segments: Sequence[Tensor] = (),
    bins: int = BINS,
) -> dict[str, Tensor]:
    """Score ``n`` networks on common inputs, as many at a time as fit into memory.

    Args:
        program: Their architecture.
        weights: ``[n, ...]``.
        inputs: ``[b, ...]``.
        targets: Classes ``[b]``, or ``[n, b]`` where networks number them by themselves; or
            numbers ``[b, o]``.
        segments: Classifiers: inputs that are to be scored apart, an index of rows each.
        bins: Classifiers: bins of the calibration error.

    Returns:
        Name of a score -> ``[n]``, or ``[n, c]`` and ``[n, s]``; see ``score_outputs``.
    """
    own_targets = targets.ndim == 2 and not targets.is_floating_point()
    parts = []
    for at in chunks(program, weights, len(inputs)):
        own = {key: tensor[at] for key, tensor in weights.items()}
        outputs = predict(program, own, inputs)
        wanted = targets[at] if own_targets else targets
        parts.append(score_outputs(outputs, wanted, segments=segments, bins=bins))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def chunks(program: Program, weights: Weights, rows: int) -> Iterator[slice]:
    """Which networks to take at a time, so that neither they nor what they say outgrow memory.

    Args:
        program: Their architecture.
        weights: ``[n, ...]``.
        rows: Inputs that they are run on.

    Yields:
        Places among the networks.
    """
    count = len(next(iter(weights.values())))
    size = at_once(program, {key: tensor[0] for key, tensor in weights.items()}, rows)
    for start in range(0, count, size):
        yield slice(start, start + size)


def at_once(program: Program, network: Weights, rows: int) -> int:
    """Networks that may be handled side by side.

    Args:
        program: Their architecture.
        network: One of them.
        rows: Inputs that they are run on.

    Returns:
        At least 1.
    """
    said = rows * 4 * max(1, program.shapes[program.output][-1] or 1)
    largest = max(tensor.numel() * tensor.element_size() for tensor in network.values())
    return max(1, min(SAID // said, WEIGHTS // max(1, largest)))
