"""Splits: ways to cut rows of a task into segments, one per member of a family.

Every split is a pure function ``split(targets, rows, members, *, ..., generator)`` and returns one
tensor of row numbers per member, in random order: its first n rows are a fair sample of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError

_TRIES = 1000


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
        targets: Class of every row of the task, int64 ``[task rows]``.
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
    _check_request("disjoint", targets, rows, members, size)
    shuffled = _numpy_generator(generator).permutation(rows.numpy())
    if size is not None:
        shuffled = shuffled[: members * size]
    # Copies: a view of one segment would keep all rows in memory.
    return [torch.from_numpy(part.copy()) for part in np.array_split(shuffled, members)]


def dirichlet(
    targets: Tensor,
    rows: Tensor,
    members: int,
    *,
    alpha: float,
    size: int | None = None,
    min_rows: int = 10,
    overlap: bool = False,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cut rows into segments with skewed classes; the smaller ``alpha``, the stronger the skew.

    Without ``size``, every row is dealt out: the rows of each class go to the members in
    proportions drawn from Dirichlet(alpha), all anew until each member has ``min_rows`` (Li, Diao,
    Chen and He, "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022,
    arXiv:2102.02079). Their published code also closes members that hold their even share, which
    makes later classes more skewed than earlier ones; that is not done here.

    With ``size``, each member draws its own mix of classes from Dirichlet(alpha), and its rows by
    that mix (Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification", 2019, arXiv:1909.06335). Where a class runs out, the member's
    other classes stand in, in the ratio of its mix. Members choose in random order.

    Args:
        targets: Class of every row of the task, int64 ``[task rows]``.
        rows: Row numbers to cut, without repeats, int64 ``[rows]``.
        members: Number of segments.
        alpha: Concentration of the Dirichlet distribution, the same for all; above 0.
        size: Rows per segment; None deals all rows out, in segments of unequal size.
        min_rows: Fewest rows of a segment; not used with ``size``.
        overlap: Whether members may share rows; only with ``size``. A member holds no row twice.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ConfigError: If an option is out of range, or ``overlap`` comes without ``size``.
        ZooError: If there are too few rows, or rows that the task does not have.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(
            f"dirichlet: alpha must be above 0 and finite, got {alpha}. "
            "For segments without skew use the split 'disjoint'."
        )
    if overlap and size is None:
        raise ConfigError(
            "dirichlet: overlap=True needs size=: without it every row has one owner."
        )
    _check_request("dirichlet", targets, rows, members, size, overlap=overlap)
    rng = _numpy_generator(generator)
    numbers = rng.permutation(rows.numpy())
    labels = targets.numpy()[numbers]
    # Stable sorting of the smallest integers is a radix sort, ten times faster than of int64.
    numbers = numbers[np.argsort(labels.astype(np.min_scalar_type(labels.max())), kind="stable")]
    room = np.bincount(labels)  # [classes]

    if size is None:
        counts = _deal_all(room, members, alpha, min_rows, rng)
    else:
        counts = _draw_mixes(room, members, alpha, size, overlap, rng)
    return _pick(numbers, room, counts, overlap, rng)


SPLITS = {"disjoint": disjoint, "dirichlet": dirichlet}


def describe(segments: Sequence[Tensor], targets: Tensor, classes: int) -> Tensor:
    """Count the classes of every segment.

    Args:
        segments: One tensor of row numbers per member.
        targets: Class of every row of the task, int64 ``[task rows]``.
        classes: Number of classes of the task.

    Returns:
        Rows per member and class, int64 ``[members, classes]``.

    Raises:
        ZooError: If a segment holds a class that is not in [0, classes).
    """
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


def validate(segments: Sequence[Tensor], rows: Tensor, *, disjoint: bool = True) -> None:
    """Refuse segments that are not an honest cut of ``rows``.

    Args:
        segments: One tensor of row numbers per member.
        rows: The row numbers that segments may hold, int64 ``[rows]``.
        disjoint: Whether a row may be in one segment only.

    Raises:
        ZooError: If a segment is empty, holds a row twice or a row outside ``rows``, or, with
            ``disjoint``, shares a row with another segment.
    """
    if len(segments) == 0:
        raise ZooError("validate: there are no segments.")
    owner = torch.full((int(rows.max()) + 1 if len(rows) else 0,), -2)  # -2: not in rows
    owner[rows] = -1  # -1: free
    for member, segment in enumerate(segments):
        where = f"segments[{member}]"
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
        if disjoint and (owners >= 0).any():
            shared = owners[owners >= 0]
            raise ZooError(
                f"{where}: {len(shared)} rows are also in other segments, first in "
                f"segments[{int(shared[0])}]. If members may share rows, pass disjoint=False."
            )
        owner[segment] = member


def _deal_all(
    room: np.ndarray, members: int, alpha: float, min_rows: int, rng: np.random.Generator
) -> np.ndarray:
    """Deal out every row of every class; counts ``[members, classes]``."""
    if not _is_count(min_rows):
        raise ConfigError(f"dirichlet: min_rows must be a whole number above 0, got {min_rows!r}.")
    if members * min_rows > room.sum():
        raise ZooError(
            f"dirichlet: {members} members x min_rows={min_rows} need {members * min_rows} rows, "
            f"got {room.sum()}. The largest min_rows is {room.sum() // members}."
        )
    for _ in range(_TRIES):
        shares = rng.dirichlet(np.full(members, alpha), size=len(room))  # [classes, members]
        cuts = np.rint(shares.cumsum(axis=1) * room[:, None]).astype(np.int64)
        counts = np.diff(cuts, axis=1, prepend=0).T
        if counts.sum(axis=1).min() >= min_rows:
            return counts
    raise ZooError(
        f"dirichlet: none of {_TRIES} draws gave each of {members} members {min_rows} rows "
        f"(alpha={alpha}, {room.sum()} rows, {np.count_nonzero(room)} classes). Raise alpha, lower "
        "members or min_rows, or fix the rows per member with size=."
    )


def _draw_mixes(
    room: np.ndarray,
    members: int,
    alpha: float,
    size: int,
    overlap: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw ``size`` rows per member by a class mix of its own; counts ``[members, classes]``."""
    mixes = rng.dirichlet(np.full(len(room), alpha), size=members)  # [members, classes]
    counts = np.zeros((members, len(room)), dtype=np.int64)
    left = room.copy()
    for member in rng.permutation(members):  # a fixed order would leave the rest to the last
        counts[member] = _draw_counts(mixes[member], left, size, rng)
        if not overlap:
            left -= counts[member]
    return counts


def _draw_counts(
    mix: np.ndarray, room: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw ``size`` rows by ``mix``, at most ``room`` of each class; counts ``[classes]``."""
    counts = np.zeros_like(room)
    while missing := size - counts.sum():
        weights = np.where(counts < room, mix, 0.0)
        if not weights.any():  # every class of the mix has run out: the others as they are left
            weights = (room - counts).astype(float)
        counts = np.minimum(counts + rng.multinomial(missing, weights / weights.sum()), room)
    return counts


def _pick(
    numbers: np.ndarray,
    room: np.ndarray,
    counts: np.ndarray,
    overlap: bool,
    rng: np.random.Generator,
) -> list[Tensor]:
    """Turn counts ``[members, classes]`` into rows; ``numbers`` are shuffled, class by class."""
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


def _check_request(
    split: str,
    targets: Tensor,
    rows: Tensor,
    members: int,
    size: int | None,
    *,
    overlap: bool = False,
) -> None:
    """Refuse rows that the task does not have, and more segments than they can fill."""
    for option, value in (("members", members), ("size", 1 if size is None else size)):
        if not _is_count(value):
            raise ConfigError(f"{split}: {option} must be a whole number above 0, got {value!r}.")
    for option, tensor in (("targets", targets), ("rows", rows)):
        if tensor.dtype != torch.int64 or tensor.ndim != 1:
            raise ZooError(
                f"{split}: {option} must be an int64 vector, "
                f"got {tensor.dtype} {tuple(tensor.shape)}."
            )
    if len(targets) and targets.min() < 0:
        raise ZooError(f"{split}: targets must be 0 or above, got {int(targets.min())}.")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(targets):
        raise ZooError(
            f"{split}: rows {int(rows.min())} to {int(rows.max())} were asked for, "
            f"the task has rows 0 to {len(targets) - 1}."
        )
    named = torch.zeros(len(targets), dtype=torch.bool)
    named[rows] = True
    if int(named.sum()) != len(rows):
        raise ZooError(f"{split}: {len(rows) - int(named.sum())} rows are named more than once.")
    holders = 1 if overlap else members
    if holders * (size or 1) > len(rows):
        advice = "." if overlap else ", or fewer members."
        raise ZooError(
            f"{split}: {members} members x {size or 'at least 1'} rows do not fit into "
            f"{len(rows)} rows{' each' if overlap else ''}. The largest size is "
            f"{len(rows) // holders}{advice}"
        )


def _is_count(value: object) -> bool:
    """Tell whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """Seed NumPy from a torch generator: NumPy draws Dirichlet and multinomial samples."""
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed))
