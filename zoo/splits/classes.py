"""Segments of a few classes each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ZooError
from zoo.splits.checks import check_count, check_request
from zoo.splits.drawing import deal_by_class, numpy_generator, shuffle_by_class


def classes(
    targets: Tensor,
    rows: Tensor,
    members: int,
    *,
    classes_per_segment: int = 2,
    size: int | None = None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cut rows into segments of a few classes each.

    After the pathological split of McMahan, Moore, Ramage, Hampson and Aguera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    arXiv:1602.05629, section 3. They sort all rows by class and give each member two slices of
    equal length, so that a slice may lie across two classes and both slices in one. Here a member
    has exactly ``classes_per_segment`` classes. Every class has as many holders as any other, or
    one more, and its rows are shared out among them to within one row evenly. Of more classes than
    ``members * classes_per_segment`` some are left out.

    With ``size``, a member takes that many rows of what it would get, the same number of each of
    its classes; where a class has fewer, its other classes stand in.

    Args:
        targets: Class of every row of the task, int64 ``[task rows]``.
        rows: Row numbers to cut, without repeats, int64 ``[rows]``.
        members: Number of segments.
        classes_per_segment: Classes that each member holds.
        size: Rows per segment; None deals out all rows of the classes that are held.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ConfigError: If an option is out of range, or the targets are no classes.
        ZooError: If there are too few rows or classes, or rows that the task does not have.
    """
    check_count("classes", "classes_per_segment", classes_per_segment)
    check_request("classes", targets, rows, members, size, labels=True)
    rng = numpy_generator(generator)
    numbers, room = shuffle_by_class(targets, rows, rng)
    held = _choose_classes(room, members, classes_per_segment, rng)  # [members, classes]
    rank = held.cumsum(axis=0) - 1  # [members, classes]: place among the holders of the class
    holders = np.maximum(held.sum(axis=0), 1)
    counts = np.where(held, room // holders + (rank < room % holders), 0)
    if not counts[held].all():
        scarce = int(np.nonzero((held & (counts == 0)).any(axis=0))[0][0])
        raise ZooError(
            f"classes: class {scarce} has {room[scarce]} rows for {holders[scarce]} members. "
            "Lower members or classes_per_segment."
        )
    if size is not None:
        counts = _take_evenly(counts, size)
    return deal_by_class(numbers, room, counts, rng)


def _choose_classes(
    room: np.ndarray, members: int, each: int, rng: np.random.Generator
) -> np.ndarray:
    """Give every member ``each`` classes, every class its fair number of members."""
    present = np.nonzero(room)[0]
    if each > len(present):
        raise ZooError(
            f"classes: classes_per_segment={each}, but the rows have {len(present)} classes. "
            f"Lower it to {len(present)} at most."
        )
    holders = np.zeros(len(present), dtype=np.int64)
    held = np.zeros((members, len(room)), dtype=bool)
    for member in rng.permutation(members):
        # Those with the fewest holders first, at random among equals: none is ever two ahead.
        chosen = np.lexsort((rng.random(len(present)), holders))[:each]
        holders[chosen] += 1
        held[member, present[chosen]] = True
    return held


def _take_evenly(limits: np.ndarray, size: int) -> np.ndarray:
    """Take ``size`` rows per member, evenly up to ``limits``; counts ``[members, classes]``."""
    most = limits.sum(axis=1)
    if most.min() < size:
        raise ZooError(
            f"classes: segments[{most.argmin()}] has {most.min()} rows in its classes, "
            f"size={size}. Lower size or members, or raise classes_per_segment."
        )
    counts = np.zeros_like(limits)
    for count, limit in zip(counts, limits, strict=True):
        own = np.nonzero(limit)[0]
        own = own[np.argsort(limit[own], kind="stable")]  # scarce ones first: the others fill up
        for place, name in enumerate(own):
            count[name] = min(limit[name], (size - count.sum()) // (len(own) - place))
    return counts
