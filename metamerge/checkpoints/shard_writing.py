"""Write safetensors files tensor by tensor: names, shapes and dtypes are known beforehand.

So the header of every file, and how many files there will be, is known before the first number is.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from metamerge.checkpoints.safetensors_files import DTYPES
from metamerge.checkpoints.shards import INDEX_SUFFIX

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_SYNCED = 64 * 2**20  # bytes after which the disk starts, while the next ones are computed

Form = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Shard:
    """A file that is to be written.

    Attributes:
        name: Its name.
        forms: Name of a tensor -> its dtype and shape, in the order of the file.
    """

    name: str
    forms: Mapping[str, Form]


def plan_shards(forms: Mapping[str, Form], limit: int) -> list[Shard]:
    """Distribute tensors over files.

    Args:
        forms: Name of a tensor -> its dtype and shape.
        limit: Bytes of tensors per file; one that is larger gets a file of its own.

    Returns:
        One file ``model.safetensors``, or several ``model-00001-of-00002.safetensors``.
    """
    groups: list[dict[str, Form]] = [{}]
    filled = 0
    for key, form in forms.items():
        size = _size(form)
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][key] = form
        filled += size
    if len(groups) == 1:
        return [Shard("model.safetensors", _aligned(groups[0]))]
    return [
        Shard(f"model-{index:05d}-of-{len(groups):05d}.safetensors", _aligned(group))
        for index, group in enumerate(groups, start=1)
    ]


def nbytes(shard: Shard) -> int:
    """Count the bytes of a file's tensors.

    Args:
        shard: The file.

    Returns:
        Their number.
    """
    return sum(map(_size, shard.forms.values()))


def index_of(shards: Sequence[Shard]) -> tuple[str, str]:
    """Make the index of several files.

    Args:
        shards: The files.

    Returns:
        Its file name, and its content.
    """
    weight_map = {key: shard.name for shard in shards for key in shard.forms}
    document = {
        "metadata": {"total_size": sum(map(nbytes, shards))},
        "weight_map": weight_map,
    }
    return f"model{INDEX_SUFFIX}", json.dumps(document, indent=1) + "\n"


class ShardWriter:
    """Writes one file; use it in a ``with`` statement, at the end of which all of it is synced.

    Attributes:
        digest: Its sha256, once it is complete.
    """

    digest: str

    def __init__(self, shard: Shard, folder: Path) -> None:
        """Write the header.

        Args:
            shard: The file.
            folder: Where it goes; there must not be a file of this name.
        """
        self._file: BinaryIO = open(folder / shard.name, "xb")  # noqa: SIM115  (closed in __exit__)
        self._hash = hashlib.sha256()
        self._syncing = ThreadPoolExecutor(1)
        self._synced: Future | None = None
        self._behind = 0
        self._put(_header(shard))

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Sync and close the file."""
        try:
            self._syncing.shutdown()
            if kind is None:
                if self._synced is not None:
                    self._synced.result()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        self.digest = self._hash.hexdigest()

    def append(self, tensor: Tensor) -> None:
        """Write the next tensor, or the next part of it.

        Args:
            tensor: On the CPU; tensors come in the order of the shard.
        """
        self._put(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))

    def _put(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._behind += len(content)
        if self._behind >= _SYNCED and (self._synced is None or self._synced.done()):
            if self._synced is not None:
                self._synced.result()
            self._file.flush()
            self._synced = self._syncing.submit(os.fsync, self._file.fileno())
            self._behind = 0


def _aligned(forms: Mapping[str, Form]) -> dict[str, Form]:
    """Wide numbers first, so that all of them start at a multiple of their size."""
    return dict(sorted(forms.items(), key=lambda item: -item[1][0].itemsize))


def _header(shard: Shard) -> bytes:
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in shard.forms.items():
        begin, end = end, end + _size((dtype, shape))
        document[key] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(form: Form) -> int:
    return form[0].itemsize * prod(form[1])
