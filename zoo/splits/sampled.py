"""Segments that are random samples of one and the same distribution.

Targets may be classes or those of a regression: none of these splits looks at them.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError
from zoo.splits.checks import check_request
from zoo.splits.drawing import numpy_generator


def disjoint(
    targets: Tensor,
    rows: Tensor,
    members: int,
    *,
    size: int | None = None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cut rows into random segments that share no row.

    Args:
        targets: Targets of every row of the task, int64 ``[task rows]`` or float32
            ``[task rows, outputs]``.
        rows: Row numbers to cut, without repeats, int64 ``[rows]``.
        members: Number of segments.
        size: Rows per segment; None shares all rows out, to within one row evenly.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ConfigError: If ``members`` or ``size`` is not a positive whole number.
        ZooError: If there are too few rows, or rows that the task does not have.
    """
    check_request("disjoint", targets, rows, members, size)
    shuffled = numpy_generator(generator).permutation(rows.numpy())
    if size is not None:
        shuffled = shuffled[: members * size]
    # Copies: a view of one segment would keep all rows in memory.
    return [torch.from_numpy(part.copy()) for part in np.array_split(shuffled, members)]


def overlapping(
    targets: Tensor,
    rows: Tensor,
    members: int,
    *,
    share: float = 0.5,
    size: int | None = None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cut random segments around a core that all members hold.

    A segment is the core, ``share`` of its rows, and rows that nobody else holds; so any two
    members share the core and nothing more. Of ``size`` rows, ``round(share * size)`` are core.
    Without ``size`` every row of ``n`` is dealt: the core has
    ``round(n * share / (share + members * (1 - share)))`` rows, and the rest is shared out to
    within one row evenly. A share of 0 is the split 'disjoint', of 1 one sample for all.

    Args:
        targets: Targets of every row of the task, int64 ``[task rows]`` or float32
            ``[task rows, outputs]``.
        rows: Row numbers to cut, without repeats, int64 ``[rows]``.
        members: Number of segments.
        share: Part of a segment that every other member holds as well, in [0, 1].
        size: Rows per segment; None deals all rows out.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ConfigError: If an option is out of range.
        ZooError: If there are too few rows, or rows that the task does not have.
    """
    if not 0 <= share <= 1:
        raise ConfigError(
            f"overlapping: share must be in [0, 1], got {share}. It is the part of a segment that "
            "all members hold."
        )
    check_request("overlapping", targets, rows, members, size, overlap=size is not None)
    if size is None:
        core, needed = round(len(rows) * share / (share + members * (1 - share))), len(rows)
    else:
        core, needed = round(share * size), _rows_needed(size, share, members)
    if needed > len(rows):
        largest = bisect_right(
            range(1, size), len(rows), key=lambda s: _rows_needed(s, share, members)
        )
        raise ZooError(
            f"overlapping: {members} members x {size} rows, {core} of them common, need {needed} "
            f"rows, got {len(rows)}. The largest size is {largest}, or raise share."
        )
    rng = numpy_generator(generator)
    shuffled = rng.permutation(rows.numpy())[:needed]
    return [
        torch.from_numpy(rng.permutation(np.concatenate([shuffled[:core], own])))
        for own in np.array_split(shuffled[core:], members)
    ]


def everything(
    targets: Tensor, rows: Tensor, members: int, *, generator: torch.Generator
) -> list[Tensor]:
    """Give every member all rows, each in an order of its own.

    Members then differ by their init, by the order of rows and by how long they are trained.

    Args:
        targets: Targets of every row of the task, int64 ``[task rows]`` or float32
            ``[task rows, outputs]``.
        rows: Row numbers, without repeats, int64 ``[rows]``.
        members: Number of segments.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[rows]``.

    Raises:
        ConfigError: If ``members`` is not a positive whole number.
        ZooError: If there are no rows, or rows that the task does not have.
    """
    check_request("everything", targets, rows, members, overlap=True)
    rng = numpy_generator(generator)
    return [torch.from_numpy(rng.permutation(rows.numpy())) for _ in range(members)]


def _rows_needed(size: int, share: float, members: int) -> int:
    core = round(share * size)
    return core + members * (size - core)
