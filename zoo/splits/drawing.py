"""From groups of rows to segments: the draws that several splits make."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """Seed NumPy from a torch generator: NumPy draws Dirichlet and multinomial samples.

    Args:
        generator: Source of randomness; it moves on by one draw.

    Returns:
        NumPy's generator.
    """
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed))


def shuffle_by_class(
    targets: Tensor, rows: Tensor, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Bring rows into class order, shuffled within every class.

    Args:
        targets: Class of every row of the task, int64 ``[task rows]``.
        rows: Row numbers, int64 ``[rows]``.
        rng: Source of randomness.

    Returns:
        The row numbers, class by class ``[rows]``, and how many there are of each ``[classes]``.
    """
    numbers = rng.permutation(rows.numpy())
    labels = targets.numpy()[numbers]
    # Stable sorting of the smallest integers is a radix sort, ten times faster than of int64.
    order = np.argsort(labels.astype(np.min_scalar_type(labels.max())), kind="stable")
    return numbers[order], np.bincount(labels)


def deal_by_class(
    numbers: np.ndarray,
    room: np.ndarray,
    counts: np.ndarray,
    rng: np.random.Generator,
    *,
    overlap: bool = False,
) -> list[Tensor]:
    """Turn rows per member and class into segments.

    Args:
        numbers: Row numbers as ``shuffle_by_class`` gives them ``[rows]``.
        room: Rows of each class ``[classes]``.
        counts: Rows of each class that each member gets ``[members, classes]``.
        rng: Source of randomness.
        overlap: Whether members draw from all rows of a class, whoever else has them.

    Returns:
        One tensor of row numbers per member, in random order.
    """
    blocks = np.split(numbers, list(accumulate(room))[:-1])  # one per class
    starts = np.cumsum(counts, axis=0) - counts  # [members, classes]
    segments = []
    for member_starts, member_counts in zip(starts, counts, strict=True):
        parts = [
            rng.choice(block, count, replace=False) if overlap else block[start : start + count]
            for block, start, count in zip(blocks, member_starts, member_counts, strict=True)
            if count
        ]
        segments.append(torch.from_numpy(rng.permutation(np.concatenate(parts))))
    return segments


def draw_from_groups(
    groups: Sequence[np.ndarray], size: int | None, rng: np.random.Generator
) -> list[Tensor]:
    """Make a segment of every group.

    Args:
        groups: Row numbers of each group.
        size: Rows drawn from each group, at most as many as it has; None takes all.
        rng: Source of randomness.

    Returns:
        One tensor of row numbers per group, in random order.
    """
    # Copies: a view of the first rows would keep the whole group in memory.
    return [torch.from_numpy(rng.permutation(group)[:size].copy()) for group in groups]


def cut_in_order(
    values: np.ndarray,
    rows: Tensor,
    members: int,
    size: int | None,
    rng: np.random.Generator,
) -> list[Tensor]:
    """Sort rows by a number and cut them into quantiles, even to within one row.

    Args:
        values: What rows are sorted by, ascending ``[rows]``; ties are broken at random.
        rows: Row numbers, int64 ``[rows]``.
        members: Number of quantiles.
        size: Rows drawn from each quantile; None takes all.
        rng: Source of randomness.

    Returns:
        One tensor of row numbers per quantile, in random order.
    """
    shuffled = rng.permutation(len(rows))
    order = shuffled[np.argsort(values[shuffled], kind="stable")]
    return draw_from_groups(np.array_split(rows.numpy()[order], members), size, rng)
