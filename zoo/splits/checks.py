"""What a split refuses up front, and what may be asked of segments afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError


def describe(segments: Sequence[Tensor], targets: Tensor, classes: int) -> Tensor:
    """Count the classes of every segment.

    Args:
        segments: One tensor of row numbers per member.
        targets: Class of every row of the task, int64 ``[task rows]``.
        classes: Number of classes of the task.

    Returns:
        Rows per member and class, int64 ``[members, classes]``.

    Raises:
        ConfigError: If the targets are those of a regression.
        ZooError: If a segment holds a class that is not in [0, classes).
    """
    check_targets("describe", targets, labels=True)
    counts = torch.zeros(len(segments), classes, dtype=torch.int64)
    for member, segment in enumerate(segments):
        labels = targets[segment]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ZooError(
                f"describe: segments[{member}] has classes {int(labels.min())} to "
                f"{int(labels.max())}, expected [0, {classes}). Pass the task's own classes."
            )
        counts[member] = torch.bincount(labels, minlength=classes)
    return counts


def validate(
    segments: Sequence[Tensor],
    rows: Tensor,
    *,
    disjoint: bool = True,
    every_class: bool = False,
    targets: Tensor | None = None,
) -> None:
    """Refuse segments that are not an honest cut of ``rows``.

    Args:
        segments: One tensor of row numbers per member.
        rows: The row numbers that segments may hold, int64 ``[rows]``.
        disjoint: Whether a row may be in one segment only.
        every_class: Whether every class of ``rows`` must be in some segment; needs ``targets``.
        targets: Class of every row of the task, int64 ``[task rows]``.

    Raises:
        ConfigError: If ``every_class`` comes without the classes of the rows.
        ZooError: If a segment is empty, holds a row twice or a row outside ``rows``, or, with
            ``disjoint``, shares a row with another segment, or, with ``every_class``, a class is
            in none of them.
    """
    if len(segments) == 0:
        raise ZooError("validate: there are no segments.")
    owner = torch.full((int(rows.max()) + 1 if len(rows) else 0,), -2)  # -2: not in rows
    owner[rows] = -1  # -1: free
    for member, segment in enumerate(segments):
        owners = _owners(f"segments[{member}]", segment, owner)
        if disjoint and (owners >= 0).any():
            shared = owners[owners >= 0]
            raise ZooError(
                f"segments[{member}]: {len(shared)} rows are also in other segments, first in "
                f"segments[{int(shared[0])}]. If members may share rows, pass disjoint=False."
            )
        owner[segment] = member
    if every_class:
        _check_every_class(segments, rows, targets)


def check_request(
    split: str,
    targets: Tensor,
    rows: Tensor,
    members: int,
    size: int | None = None,
    *,
    overlap: bool = False,
    labels: bool = False,
) -> None:
    """Refuse rows that the task does not have, and more segments than they can fill.

    Args:
        split: Who asks; messages begin with it.
        targets: Class of every row of the task, int64 ``[task rows]``, or its regression targets,
            float32 ``[task rows, outputs]``.
        rows: Row numbers to cut, int64 ``[rows]``.
        members: Number of segments.
        size: Rows per segment; None asks for one row at least.
        overlap: Whether members may share rows.
        labels: Whether the split needs classes.

    Raises:
        ConfigError: If ``members`` or ``size`` is no positive whole number, or the targets are
            those of a regression and the split needs classes.
        ZooError: If targets or rows are malformed, or the segments do not fit.
    """
    check_count(split, "members", members)
    if size is not None:
        check_count(split, "size", size)
    check_targets(split, targets, labels=labels)
    _check_rows(split, rows, len(targets))
    holders = 1 if overlap else members
    if holders * (size or 1) > len(rows):
        advice = "." if overlap else ", or fewer members."
        raise ZooError(
            f"{split}: {members} members x {size or 'at least 1'} rows do not fit into "
            f"{len(rows)} rows{' each' if overlap else ''}. The largest size is "
            f"{len(rows) // holders}{advice}"
        )


def check_count(split: str, option: str, value: object) -> None:
    """Refuse a value of an option that is not a whole number above 0.

    Raises:
        ConfigError: Naming split and option.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{split}: {option} must be a whole number above 0, got {value!r}.")


def check_targets(split: str, targets: Tensor, *, labels: bool) -> None:
    """Refuse targets that are neither classes nor, without ``labels``, those of a regression.

    Args:
        split: Who asks.
        targets: The targets of a task.
        labels: Whether only classes will do.

    Raises:
        ConfigError: If classes are needed and the targets are those of a regression.
        ZooError: If the targets are neither.
    """
    found = f"got {targets.dtype} {tuple(targets.shape)}."
    if targets.dtype == torch.float32 and targets.ndim == 2:
        if labels:
            raise ConfigError(
                f"{split}: needs classes, but the targets are those of a regression, {found} Use "
                "the split 'bins' or 'clusters', or make classes of them with "
                "zoo.splits.features.binned_targets."
            )
    elif targets.dtype != torch.int64 or targets.ndim != 1:
        other = "" if labels else ", or float32 [rows, outputs] for a regression"
        raise ZooError(f"{split}: targets must be an int64 vector of classes{other}, {found}")
    elif len(targets) and targets.min() < 0:
        raise ZooError(f"{split}: targets must be 0 or above, got {int(targets.min())}.")


def take(
    split: str, option: str, values: Tensor, rows: Tensor, shape: tuple[int | str, ...]
) -> Tensor:
    """Take the numbers of ``rows``; refuse them malformed or not finite.

    Args:
        split: Who asks.
        option: What the numbers are.
        values: Numbers of every row of the task, float32.
        rows: Row numbers, int64 ``[rows]``.
        shape: Shape that is expected; a word stands for any number.

    Returns:
        A copy, float32 ``[rows, ...]``: what other rows hold is never looked at.

    Raises:
        ZooError: If they are of another type or shape, or one of those taken is not finite.
    """
    fits = len(shape) == values.ndim and all(
        isinstance(asked, str) or asked == found
        for asked, found in zip(shape, values.shape, strict=True)
    )
    if values.dtype != torch.float32 or not fits or values.numel() == 0:
        expected = ", ".join(map(str, shape))
        raise ZooError(
            f"{split}: {option} must be float32 [{expected}], an entry per row of the task, "
            f"got {values.dtype} {tuple(values.shape)}."
        )
    taken = values.detach()[rows]
    if not taken.isfinite().all():
        wrong = rows[~taken.isfinite().reshape(len(taken), -1).all(1)]
        raise ZooError(
            f"{split}: {option} must be finite, but {len(wrong)} of the rows to cut hold NaN or "
            f"infinity, the first is row {int(wrong[0])}. Mend them, or leave those rows out."
        )
    return taken


def _owners(where: str, segment: Tensor, owner: Tensor) -> Tensor:
    """Look up who holds each row of a segment; refuse rows twice and rows from outside."""
    if segment.dtype != torch.int64 or segment.ndim != 1 or len(segment) == 0:
        raise ZooError(
            f"{where}: expected int64 row numbers [rows], at least one, "
            f"got {segment.dtype} {tuple(segment.shape)}."
        )
    known = (segment >= 0) & (segment < len(owner))
    owners = torch.full_like(segment, -2)
    owners[known] = owner[segment[known]]
    outside = segment[owners == -2]
    if len(outside):
        raise ZooError(
            f"{where}: {len(outside)} rows are not among those to cut, the first is "
            f"{int(outside[0])}. Cut segments from these rows only."
        )
    twice = len(segment) - len(segment.unique())
    if twice:
        raise ZooError(f"{where}: {twice} rows are in it more than once.")
    return owners


def _check_every_class(segments: Sequence[Tensor], rows: Tensor, targets: Tensor | None) -> None:
    """Refuse segments that leave out a class of ``rows``."""
    if targets is None:
        raise ConfigError("validate: every_class=True needs targets=, the classes of all rows.")
    check_targets("validate", targets, labels=True)
    present = targets[rows].unique()
    missing = present[~torch.isin(present, targets[torch.cat(list(segments))])].tolist()
    if missing:
        raise ZooError(
            f"validate: no segment has rows of class {', '.join(map(str, missing))}; the rows to "
            f"cut have {len(present)} classes. Cut into more members, or more rows for each."
        )


def _check_rows(split: str, rows: Tensor, available: int) -> None:
    """Refuse row numbers that are malformed, outside the task or repeated."""
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise ZooError(
            f"{split}: rows must be an int64 vector, got {rows.dtype} {tuple(rows.shape)}."
        )
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < available:
        raise ZooError(
            f"{split}: rows {int(rows.min())} to {int(rows.max())} were asked for, "
            f"the task has rows 0 to {available - 1}."
        )
    named = torch.zeros(available, dtype=torch.bool)
    named[rows] = True
    if int(named.sum()) != len(rows):
        raise ZooError(f"{split}: {len(rows) - int(named.sum())} rows are named more than once.")
