"""Read, merge and write at the same time, with a few tensors of every member in memory.

While one tensor is written, the next ones are read and merged, each by a thread of its own.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from metamerge.checkpoints.lazy import StoredTensor, TensorReader, entries
from metamerge.checkpoints.opening import display
from metamerge.checkpoints.shard_writing import Shard, ShardWriter, index_of
from metamerge.checkpoints.writing import write_text
from metamerge.weights import check_finite, check_statistics

Fuse = Callable[[str, list[Tensor]], Tensor]

log = logging.getLogger(__name__)
_PART = 16 * 2**20  # bytes of all members together that are read at a time where parts will do
_WORKERS = 2  # each holds a tensor of every member; more would wait for the disk
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Part:
    """A tensor, or some entries of it: what is merged at a time."""

    key: str
    stored: Sequence[StoredTensor]  # one per member, and the base behind them
    begin: int
    count: int | None  # None for the whole tensor


def stream(
    members: Sequence[Mapping[str, StoredTensor]],
    shards: Sequence[Shard],
    folder: Path,
    fuse: Fuse,
    *,
    pointwise: bool,
    in_order: bool,
) -> dict[str, str]:
    """Merge stored members into files.

    Args:
        members: Tensors of every member, by name.
        shards: The files, which together hold all names.
        folder: Where they are written.
        fuse: Takes a name and the members' tensors of that name, and returns the merged one.
        pointwise: Whether it may be given parts of tensors, as vectors.
        in_order: Whether it must be called for one tensor after the other.

    Returns:
        Name of every file that was written -> its sha256. ``logging`` tells of each at the level of
        ``INFO``.

    Raises:
        CheckpointError: If a file has changed, or a tensor holds NaN.
        OSError: If the disk is full.
    """
    digests = {}
    with TensorReader() as reader, _workers(1 if in_order else _WORKERS) as (pool, count):

        def merged(part: _Part) -> Tensor:
            tensors = [reader.read(stored, part.begin, part.count) for stored in part.stored]
            return _merged(part, tensors, fuse)

        for number, shard in enumerate(shards, 1):
            with ShardWriter(shard, folder) as writer:
                for tensor in _ahead(pool, merged, _parts(members, shard, pointwise), count):
                    writer.append(tensor)
            digests[shard.name] = writer.digest
            log.info("%s is written, %d of %d", shard.name, number, len(shards))
    if len(shards) > 1:
        name, text = index_of(shards)
        write_text(text, folder / name)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return digests


@contextmanager
def _workers(most: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that each compute alone: pieces in the cache are too short to be shared."""
    before = torch.get_num_threads()
    count = min(most, before)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, count
    finally:
        torch.set_num_threads(before)


def _parts(
    members: Sequence[Mapping[str, StoredTensor]], shard: Shard, pointwise: bool
) -> Iterator[_Part]:
    """Cut a file into what is merged at a time."""
    for key in shard.forms:
        stored = [tensors[key] for tensors in members]
        number, nbytes = entries(stored[0]), sum(t.entry.nbytes for t in stored)
        if not pointwise or nbytes <= _PART:
            yield _Part(key, stored, 0, None)
            continue
        step = max(1, number * _PART // nbytes)
        for begin in range(0, number, step):
            yield _Part(key, stored, begin, min(step, number - begin))


def _merged(part: _Part, tensors: list[Tensor], fuse: Fuse) -> Tensor:
    """Merge a tensor; neither members nor result may hold NaN."""
    names = [display(stored.path) for stored in part.stored]
    for name, tensor in zip(names, tensors, strict=True):
        _check_finite(name, part.key, tensor)
    if part.key.endswith("running_var"):
        check_statistics([(n, {part.key: t}) for n, t in zip(names, tensors, strict=True)])
    fused = fuse(part.key, tensors)
    _check_finite("the fused weights", part.key, fused)
    return fused


def _check_finite(name: str, key: str, tensor: Tensor) -> None:
    """``check_finite`` in one pass: NaN and infinities show in the smallest and largest value."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()
        if not (isfinite(low) and isfinite(high)):
            check_finite(name, {key: tensor})


def _ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    count: int,
) -> Iterator[_Result]:
    """What a function makes of items, in their order; a few are made while one is used."""
    made: deque[Future[_Result]] = deque()
    for item in items:
        made.append(pool.submit(function, item))
        if len(made) > count:
            yield made.popleft().result()
    while made:
        yield made.popleft().result()
