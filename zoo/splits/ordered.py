"""Segments along a line: from easy to hard, from small targets to large ones."""

from __future__ import annotations

import torch
from torch import Tensor

from metamerge.errors import ConfigError
from zoo.splits.checks import check_request, take
from zoo.splits.drawing import cut_in_order, numpy_generator
from zoo.splits.features import principal_values


def difficulty(
    targets: Tensor,
    rows: Tensor,
    members: int,
    *,
    scores: Tensor,
    size: int | None = None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cut rows into quantiles of their difficulty; the first member has the easiest.

    The order is that of curriculum learning (Bengio, Louradour, Collobert and Weston, "Curriculum
    Learning", ICML 2009); but each member learns one stage of it, not one member all of them.

    Args:
        targets: Targets of every row of the task, int64 ``[task rows]`` or float32
            ``[task rows, outputs]``.
        rows: Row numbers to cut, without repeats, int64 ``[rows]``.
        members: Number of segments.
        scores: Difficulty of every row, ascending, float32 ``[task rows]``; see
            ``zoo.splits.features.difficulty_scores``. Ties are broken at random.
        size: Rows drawn from each quantile; None deals all rows out, to within one row evenly.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ConfigError: If ``members`` or ``size`` is not a positive whole number.
        ZooError: If there are too few rows, rows that the task does not have, or scores that are
            not finite.
    """
    check_request("difficulty", targets, rows, members, size)
    values = take("difficulty", "scores", scores, rows, (len(targets),))
    rng = numpy_generator(generator)
    return cut_in_order(values.numpy(), rows, members, size, rng)


def bins(
    targets: Tensor,
    rows: Tensor,
    members: int,
    *,
    size: int | None = None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cut the rows of a regression into quantiles of the target; the first member has the lowest.

    Several outputs are reduced to one number, ``zoo.splits.features.principal_values``.

    Args:
        targets: Regression targets of every row of the task, float32 ``[task rows, outputs]``.
        rows: Row numbers to cut, without repeats, int64 ``[rows]``.
        members: Number of segments.
        size: Rows drawn from each quantile; None deals all rows out, to within one row evenly.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ConfigError: If ``members`` or ``size`` is not a positive whole number, or the targets are
            classes.
        ZooError: If there are too few rows, rows that the task does not have, or targets that are
            not finite.
    """
    if targets.dtype == torch.int64 and targets.ndim == 1:
        raise ConfigError(
            "bins: cuts along regression targets, but the targets are classes. Use the split "
            "'classes' or 'dirichlet'."
        )
    check_request("bins", targets, rows, members, size)
    values = principal_values(targets, rows)[rows]
    return cut_in_order(values.numpy(), rows, members, size, numpy_generator(generator))
