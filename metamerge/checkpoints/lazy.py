"""Checkpoints whose tensors stay on the disk until they are asked for, whole or in part."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, Self

from torch import Tensor

from metamerge.checkpoints.files import refuse_placeholder
from metamerge.checkpoints.folders import find_checkpoint
from metamerge.checkpoints.manifests import read_manifest
from metamerge.checkpoints.opening import display, file_size, open_regular
from metamerge.checkpoints.safetensors_files import Entry, Header, read_header, read_tensor
from metamerge.checkpoints.shards import INDEX_SUFFIX, read_index
from metamerge.checkpoints.torch_files import LEGACY_MAGIC, ZIP_MAGIC
from metamerge.errors import ConfigError, Unreadable

_NO_LIMIT = 2**63  # nothing is allocated for a whole checkpoint
_OPEN_FILES = 64


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        path: Its file.
        entry: Its place in the file.
        version: What tells the file from another one that takes its name later.
    """

    path: Path
    entry: Entry
    version: tuple[int, ...]


@dataclass(frozen=True)
class LazyCheckpoint:
    """A checkpoint of safetensors files, of which the headers were read and checked.

    Attributes:
        name: Its path, for messages.
        tensors: Name of a tensor -> where it lies, in the order that ``read_checkpoints`` gives.
        program: JSON graph of the network, where a manifest carries one.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    program: dict | None = None


def open_lazily(source: str | os.PathLike) -> LazyCheckpoint:
    """Read the headers of a checkpoint.

    Args:
        source: A safetensors file, an index of shards, or a folder with one of them.

    Returns:
        The checkpoint, as long as its files stay as they are.

    Raises:
        ConfigError: If the source is not a path.
        Unreadable: If there is no such checkpoint, or it is not of safetensors files.
        CheckpointError: If a header or an index contradicts itself or its file.
        IncompatibleWeights: If a tensor cannot be merged.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ConfigError(
            f"checkpoints: got {source!r}, expected a path. What is in memory goes to merge()."
        )
    path = Path(os.path.expanduser(os.fsdecode(source)))
    path = find_checkpoint(path) if path.is_dir() else path
    if path.name.endswith(INDEX_SUFFIX):
        order = read_index(path, _NO_LIMIT)[1]
        files = [path.parent / shard for shard in sorted(set(order.values()))]
    else:
        order, files = None, [path]
    stored = {key: tensor for file in files for key, tensor in _stored(file).items()}
    if not stored or (order is not None and stored.keys() != order.keys()):
        raise Unreadable(f"{display(path)}: holds no tensors, or changed while it was read.")
    program = (read_manifest(path.parent) or {}).get("program")
    return LazyCheckpoint(display(path), {key: stored[key] for key in order or stored}, program)


class TensorReader:
    """Reads stored tensors, with few files open at a time; use it in a ``with`` statement.

    Threads may share it; they read one after the other.
    """

    def __init__(self) -> None:
        """Start without any file."""
        self._lock = Lock()
        self._files: OrderedDict[Path, tuple[ExitStack, BinaryIO]] = OrderedDict()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all files."""
        for stack, _ in self._files.values():
            stack.close()
        self._files.clear()

    def read(self, stored: StoredTensor, begin: int = 0, count: int | None = None) -> Tensor:
        """Read a tensor, or a range of its entries.

        Args:
            stored: Where it lies.
            begin: First entry of the range.
            count: Entries of the range; None for the whole tensor in its shape.

        Returns:
            New CPU tensor; of a range a vector.

        Raises:
            Unreadable: If the file was replaced since its header was read.
            Truncated: If it has become shorter.
        """
        part = stored.entry
        if count is not None:
            size = part.dtype.itemsize
            place = part.begin + begin * size
            part = replace(part, shape=(count,), begin=place, nbytes=count * size)
        with self._lock:
            return read_tensor(self._open(stored), part, display(stored.path))

    def _open(self, stored: StoredTensor) -> BinaryIO:
        if stored.path in self._files:
            self._files.move_to_end(stored.path)
            return self._files[stored.path][1]
        while len(self._files) >= _OPEN_FILES:
            self._files.popitem(last=False)[1][0].close()
        stack = ExitStack()
        file = stack.enter_context(open_regular(stored.path))
        self._files[stored.path] = stack, file
        if _version(file) != stored.version:
            raise Unreadable(f"{display(stored.path)}: was changed while it was read. Try again.")
        return file


def entries(tensor: StoredTensor) -> int:
    """Count the entries of a stored tensor.

    Args:
        tensor: Where it lies.

    Returns:
        Their number.
    """
    return prod(tensor.entry.shape)


def _stored(path: Path) -> dict[str, StoredTensor]:
    with open_regular(path) as file:
        header, version = _header(file, display(path)), _version(file)
    return {key: StoredTensor(path, entry, version) for key, entry in header.entries.items()}


def _header(file: BinaryIO, name: str) -> Header:
    refuse_placeholder(file, name)
    file.seek(0)
    if file.read(64).startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        raise Unreadable(
            f"{name}: is a file of torch.save, which cannot be read tensor by tensor. Use merge(), "
            f"or save it as a safetensors file."
        )
    file.seek(0)
    return read_header(file, name, _NO_LIMIT)


def _version(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, file_size(file), status.st_mtime_ns
