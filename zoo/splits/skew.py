"""Segments whose classes or sizes are drawn from a Dirichlet distribution."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError
from zoo.splits.checks import check_count, check_request
from zoo.splits.drawing import deal_by_class, numpy_generator, shuffle_by_class

_TRIES = 1000


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
        ConfigError: If an option is out of range, ``overlap`` comes without ``size``, or the
            targets are no classes.
        ZooError: If there are too few rows, or rows that the task does not have.
    """
    _check_alpha("dirichlet", alpha)
    if overlap and size is None:
        raise ConfigError(
            "dirichlet: overlap=True needs size=: without it every row has one owner."
        )
    check_request("dirichlet", targets, rows, members, size, overlap=overlap, labels=True)
    rng = numpy_generator(generator)
    numbers, room = shuffle_by_class(targets, rows, rng)
    if size is None:
        counts = _deal_all("dirichlet", room, members, alpha, min_rows, rng)
    else:
        counts = _draw_mixes(room, members, alpha, size, overlap, rng)
    return deal_by_class(numbers, room, counts, rng, overlap=overlap)


def quantity(
    targets: Tensor,
    rows: Tensor,
    members: int,
    *,
    alpha: float,
    min_rows: int = 10,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cut rows into random segments of unequal size; the smaller ``alpha``, the more unequal.

    Every row is dealt out in proportions drawn from Dirichlet(alpha), anew until each member has
    ``min_rows``: the quantity skew of Li, Diao, Chen and He, "Federated Learning on Non-IID Data
    Silos: An Experimental Study", ICDE 2022, arXiv:2102.02079. Classes are mixed as in ``rows``.

    Args:
        targets: Targets of every row of the task, int64 ``[task rows]`` or float32
            ``[task rows, outputs]``.
        rows: Row numbers to cut, without repeats, int64 ``[rows]``.
        members: Number of segments.
        alpha: Concentration of the Dirichlet distribution, the same for all; above 0.
        min_rows: Fewest rows of a segment.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ConfigError: If an option is out of range.
        ZooError: If there are too few rows, or rows that the task does not have.
    """
    _check_alpha("quantity", alpha)
    check_request("quantity", targets, rows, members)
    rng = numpy_generator(generator)
    numbers, room = rng.permutation(rows.numpy()), np.array([len(rows)])
    counts = _deal_all("quantity", room, members, alpha, min_rows, rng)  # [members, 1]
    return deal_by_class(numbers, room, counts, rng)


def _deal_all(
    split: str,
    room: np.ndarray,
    members: int,
    alpha: float,
    min_rows: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Deal out every row of every class; counts ``[members, classes]``."""
    check_count(split, "min_rows", min_rows)
    if members * min_rows > room.sum():
        raise ZooError(
            f"{split}: {members} members x min_rows={min_rows} need {members * min_rows} rows, "
            f"got {room.sum()}. The largest min_rows is {room.sum() // members}."
        )
    for _ in range(_TRIES):
        shares = rng.dirichlet(np.full(members, alpha), size=len(room))  # [classes, members]
        cuts = np.rint(shares.cumsum(axis=1) * room[:, None]).astype(np.int64)
        counts = np.diff(cuts, axis=1, prepend=0).T
        if counts.sum(axis=1).min() >= min_rows:
            return counts
    raise ZooError(
        f"{split}: none of {_TRIES} draws gave each of {members} members {min_rows} rows "
        f"(alpha={alpha}, {room.sum()} rows). Raise alpha, or lower members or min_rows."
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


def _check_alpha(split: str, alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(
            f"{split}: alpha must be above 0 and finite, got {alpha}. "
            "For segments without skew use the split 'disjoint'."
        )
