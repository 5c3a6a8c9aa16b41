"""What rows can be clustered or sorted by: numbers per row, from a task and a network's outputs.

Where something is fitted, only ``rows`` are looked at: a task holds its test images as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.errors import ZooError
from zoo.splits.checks import check_count, check_request, check_targets, take

_LOOK = 5000  # rows that features are chosen on


def inputs(task_inputs: Tensor) -> Tensor:
    """Flatten the inputs of a task.

    Args:
        task_inputs: Inputs ``[task rows, ...]``.

    Returns:
        A view of them, ``[task rows, d]``.
    """
    return task_inputs.flatten(1)


def important_inputs(
    task_inputs: Tensor,
    targets: Tensor,
    rows: Tensor,
    *,
    keep: int = 32,
    generator: torch.Generator,
) -> Tensor:
    """Choose the inputs that the targets explain best, one at a time.

    They are ranked by the share of an input's variance that a least-squares fit of the targets
    explains, on 5,000 random ``rows`` at most. For classes this is the order of the F statistic of
    a one-way analysis of variance, for one regression target that of the squared correlation.

    Args:
        task_inputs: Inputs, float32 ``[task rows, ...]``.
        targets: Classes, int64 ``[task rows]``, or float32 ``[task rows, outputs]``.
        rows: The only rows that are looked at, int64 ``[rows]``.
        keep: Inputs that are kept; all where there are fewer.
        generator: Source of randomness.

    Returns:
        The inputs kept, best first, float32 ``[task rows, keep]``.

    Raises:
        ConfigError: If ``keep`` is no positive whole number.
        ZooError: If tensors are malformed, or numbers in the rows looked at are not finite.
    """
    check_count("important_inputs", "keep", keep)
    check_request("important_inputs", targets, rows, members=1)
    flat = inputs(task_inputs)
    seen = rows[torch.randperm(len(rows), generator=generator)[:_LOOK]]
    values = take("important_inputs", "inputs", flat, seen, (len(targets), "d"))
    if targets.ndim == 1:
        answers = F.one_hot(targets[seen])
    else:
        answers = take("important_inputs", "targets", targets, seen, (len(targets), "outputs"))
    explained = _explained_share(values, answers.float())
    return flat[:, explained.argsort(descending=True, stable=True)[:keep]]


def binned_targets(targets: Tensor, rows: Tensor, *, bins: int = 10) -> Tensor:
    """Make classes of regression targets, for splits that need classes.

    Args:
        targets: Regression targets, float32 ``[task rows, outputs]``.
        rows: Rows whose quantiles are the borders of the bins, int64 ``[rows]``.
        bins: Number of classes, each with as many of ``rows`` as ties allow.

    Returns:
        Classes in the order of ``principal_values``, int64 ``[task rows]``.

    Raises:
        ConfigError: If ``bins`` is no positive whole number.
        ZooError: If tensors are malformed, or targets in ``rows`` are not finite.
    """
    check_count("binned_targets", "bins", bins)
    values = principal_values(targets, rows)
    borders = values[rows].quantile(torch.arange(1, bins, dtype=values.dtype) / bins)
    return torch.bucketize(values, borders, right=True)


def principal_values(targets: Tensor, rows: Tensor) -> Tensor:
    """Reduce regression targets to one number: their first principal component.

    Outputs are not rescaled, just as they are not in a loss. The component points where its
    largest entry is positive; of one output, it is that output less its mean.

    Args:
        targets: Regression targets, float32 ``[task rows, outputs]``.
        rows: Rows whose principal component is taken, int64 ``[rows]``.

    Returns:
        One number per row of the task, float64 ``[task rows]``.

    Raises:
        ZooError: If tensors are malformed, or targets in ``rows`` are not finite.
    """
    check_request("principal_values", targets, rows, members=1)
    known = take("principal_values", "targets", targets, rows, (len(targets), "outputs")).double()
    centre = known.mean(0)
    direction = torch.linalg.eigh((known - centre).T @ (known - centre)).eigenvectors[:, -1]
    direction = direction * direction[direction.abs().argmax()].sign()
    return (targets.double() - centre) @ direction


def activations(hidden: Tensor) -> Tensor:
    """Average the activations of a layer over places.

    Args:
        hidden: Activations ``[task rows, units, ...]``.

    Returns:
        One number per unit, ``[task rows, units]``.
    """
    return hidden.flatten(2).mean(2) if hidden.ndim > 2 else hidden


def difficulty_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Score how hard rows are for a network by their loss.

    Args:
        logits: Logits, float32 ``[task rows, classes]``, or predictions of a regression.
        targets: Classes, int64 ``[task rows]``, or float32 ``[task rows, outputs]``.

    Returns:
        Cross entropy, or mean squared error over the outputs, ``[task rows]``.

    Raises:
        ZooError: If logits and targets do not fit each other.
    """
    _check_outputs("difficulty_scores", logits, targets)
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    return (logits - targets).square().mean(1)


def errors(logits: Tensor, targets: Tensor) -> Tensor:
    """Describe the mistakes of a network: how large, and in which direction.

    The direction is the derivative of the loss by the logits: probabilities less the one-hot
    class, or the residuals of a regression.

    Args:
        logits: Logits, float32 ``[task rows, classes]``, or predictions of a regression.
        targets: Classes, int64 ``[task rows]``, or float32 ``[task rows, outputs]``.

    Returns:
        Loss as ``difficulty_scores`` has it, then the direction, ``[task rows, 1 + classes]``.

    Raises:
        ZooError: If logits and targets do not fit each other.
    """
    _check_outputs("errors", logits, targets)
    if targets.ndim == 1:
        direction = logits.softmax(1) - F.one_hot(targets, logits.shape[1])
    else:
        direction = logits - targets
    return torch.cat([difficulty_scores(logits, targets).unsqueeze(1), direction], 1)


def _explained_share(values: Tensor, answers: Tensor) -> Tensor:
    """Part of the variance of each input that a fit of the answers explains ``[d]``."""
    centred = values - values.mean(0)
    basis, strength, _ = torch.linalg.svd(answers - answers.mean(0), full_matrices=False)
    basis = basis[:, strength > 1e-4 * strength.max()]  # of classes one is the rest of the others
    share = (basis.T @ centred).square().sum(0) / centred.square().sum(0)
    varies = values.amax(0) > values.amin(0)  # rounding leaves constant inputs a variance
    return share.where(varies, 0.0)


def _check_outputs(where: str, logits: Tensor, targets: Tensor) -> None:
    check_targets(where, targets, labels=False)
    if targets.ndim == 1:
        classes = int(targets.max()) + 1 if len(targets) else 1
        expected = f"[{len(targets)}, {classes} or more]"
        fits = logits.ndim == 2 and len(logits) == len(targets) and logits.shape[1] >= classes
    else:
        expected, fits = str(list(targets.shape)), logits.shape == targets.shape
    if not fits or logits.dtype != torch.float32:
        raise ZooError(
            f"{where}: for targets {tuple(targets.shape)} the network's outputs must be float32 "
            f"{expected}, got {logits.dtype} {tuple(logits.shape)}."
        )
