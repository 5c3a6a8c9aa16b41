"""Scores of regressions from their outputs, whatever the axes of networks before them.

Outputs and targets are in the units of the task as it is split: a standardised task has targets of
mean 0 and standard deviation 1 on the rows of the segments.

Shape comments: b inputs, o outputs.
"""

from torch import Tensor


def regression_scores(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """All scores of regressions at once.

    Args:
        outputs: ``[..., b, o]``.
        targets: ``[b, o]``.

    Returns:
        ``mean_absolute_error``, ``mean_squared_error`` and ``r2``, each ``[...]``.
    """
    return {
        "mean_absolute_error": mean_absolute_error(outputs, targets),
        "mean_squared_error": mean_squared_error(outputs, targets),
        "r2": r2(outputs, targets),
    }


def mean_absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference, over inputs and outputs.

    Args:
        outputs: ``[..., b, o]``.
        targets: ``[b, o]``.

    Returns:
        ``[...]``.
    """
    return (outputs - targets).abs().mean((-1, -2))


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference, over inputs and outputs.

    Args:
        outputs: ``[..., b, o]``.
        targets: ``[b, o]``.

    Returns:
        ``[...]``.
    """
    return (outputs - targets).square().mean((-1, -2))


def r2(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of the targets' variance that is explained, the mean over outputs.

    Args:
        outputs: ``[..., b, o]``.
        targets: ``[b, o]``.

    Returns:
        ``[...]``, at most 1; 0 for a network that says the mean. NaN or minus infinity where a
        target never varies.
    """
    left = (outputs - targets).square().sum(-2)
    whole = (targets - targets.mean(0)).square().sum(0)
    return (1 - left / whole).mean(-1)
