"""Read safetensors files: the header is checked before a single byte is allocated for tensors.

The format: 8 bytes little-endian length n, n bytes of JSON header, then the tensors' bytes without
gaps. The reference library accepts repeated names and maps the file into memory, where a file that
shrinks while it is read ends the process; here the bytes are read, and a short read is an error.
"""

import os
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

from metamerge.checkpoints.opening import file_size, parse_json_object
from metamerge.errors import IncompatibleWeights, TooLarge, Truncated, Unreadable

MAX_HEADER_BYTES = 100 * 10**6
_MAX_AXES = 64
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NOT_MERGEABLE = ("F8_", "F6_", "F4", "C64", "C128")


@dataclass(frozen=True)
class Entry:
    """Place of one tensor in a file.

    Attributes:
        dtype: Data type of the elements.
        shape: Shape of the tensor.
        begin: Offset of its first byte from the start of the file.
        nbytes: Number of its bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Checked header of one file: its tensors by name and its free metadata."""

    entries: dict[str, Entry]
    metadata: dict


def read_header(file: BinaryIO, name: str, max_bytes: int) -> Header:
    """Read and check the header of an open file.

    Args:
        file: Open file.
        name: What messages call it.
        max_bytes: Largest sum of tensor bytes that is accepted.

    Returns:
        Entries in the order of the header; their byte ranges cover the file exactly.

    Raises:
        Unreadable: If the header contradicts itself or the format.
        Truncated: If the file ends before its header or its tensors do.
        TooLarge: If header or tensors exceed their limits.
        IncompatibleWeights: If a tensor has a dtype that cannot be merged.
    """
    size = file_size(file)
    length = _header_length(file, size, name)
    document = parse_json_object(read_exactly(file, 8, length, name), f"{name}: header")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Unreadable(f"{name}: '__metadata__' must map strings to strings. Export it again.")
    entries = {key: _entry(key, value, 8 + length, name) for key, value in document.items()}
    total = sum(entry.nbytes for entry in entries.values())
    if total > max_bytes:
        raise TooLarge(f"{name}: holds {total} bytes of tensors, the limit is {max_bytes}.")
    _check_cover(entries, 8 + length, size, name)
    return Header(entries, metadata)


def read_tensor(file: BinaryIO, entry: Entry, name: str) -> Tensor:
    """Read one whole tensor.

    Args:
        file: Open file that the entry belongs to.
        entry: Its place, from ``read_header``.
        name: What messages call the file.

    Returns:
        New CPU tensor.

    Raises:
        Truncated: If the file has become shorter since its header was read.
    """
    return _tensor_at(file, entry.begin, entry.dtype, entry.shape, name)


def read_row(file: BinaryIO, entry: Entry, index: tuple[int, ...], name: str) -> Tensor:
    """Read the part of a tensor below some indices of its leading axes, and nothing else.

    Args:
        file: Open file that the entry belongs to.
        entry: Its place, from ``read_header``.
        index: One index in range for each leading axis that is taken off.
        name: What messages call the file.

    Returns:
        New CPU tensor, the same as ``tensor[index]``.

    Raises:
        Truncated: If the file has become shorter since its header was read.
    """
    row = 0
    for position, length in zip(index, entry.shape, strict=False):
        row = row * length + position
    shape = entry.shape[len(index) :]
    skip = row * prod(shape) * entry.dtype.itemsize
    return _tensor_at(file, entry.begin + skip, entry.dtype, shape, name)


def read_exactly(file: BinaryIO, begin: int, count: int, name: str) -> bytes:
    """Read a range of bytes, all of it or not at all.

    Args:
        file: Open file.
        begin: Offset of the first byte.
        count: Number of bytes.
        name: What messages call the file.

    Returns:
        The bytes.

    Raises:
        Truncated: If the file ends before the range does.
    """
    _check_end(name, begin + count, file_size(file))
    file.seek(begin)
    content = file.read(count)
    _check_end(name, begin + count, begin + len(content))
    return content


def _tensor_at(
    file: BinaryIO, begin: int, dtype: torch.dtype, shape: tuple[int, ...], name: str
) -> Tensor:
    count = prod(shape) * dtype.itemsize
    try:
        buffer = torch.empty(count, dtype=torch.uint8)
    except RuntimeError:
        raise TooLarge(f"{name}: no memory for a tensor of {count} bytes.") from None
    file.seek(begin, os.SEEK_SET)
    got = file.readinto(buffer.numpy()) if count else 0
    _check_end(name, begin + count, begin + got)
    if dtype == torch.bool:  # any byte but 0 counts as true, where a plain view would be undefined
        return buffer.ne(0).view(shape)
    return buffer.view(dtype).view(shape)


def _check_end(name: str, expected: int, got: int) -> None:
    if got < expected:
        raise Truncated(
            f"{name}: ends early: expected at least {expected} bytes, got {got}. "
            f"Download or copy it again."
        )


def _header_length(file: BinaryIO, size: int, name: str) -> int:
    if size < 8:
        raise Unreadable(f"{name}: has {size} bytes, no checkpoint is that short. Get it again.")
    length = int.from_bytes(read_exactly(file, 0, 8, name), "little")
    if length > MAX_HEADER_BYTES:
        raise TooLarge(
            f"{name}: claims a header of {length} bytes, the format allows {MAX_HEADER_BYTES}. "
            f"It is damaged or not a safetensors file."
        )
    _check_end(name, 8 + length, size)
    return length


def _entry(key: str, value: object, data_begin: int, name: str) -> Entry:
    """Check one entry of the header on its own."""
    where = f"{name}: {key[:200]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise Unreadable(f"{where} needs exactly dtype, shape and data_offsets in the header.")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _counts(shape) or len(shape) > _MAX_AXES or prod(max(n, 1) for n in shape) >= 2**63:
        raise Unreadable(f"{where} has an impossible shape: {str(shape)[:100]}.")
    if not _counts(offsets) or len(offsets) != 2:
        raise Unreadable(f"{where} has impossible data_offsets: {str(offsets)[:100]}.")
    dtype = _dtype(value["dtype"], where)
    begin, end = offsets
    needed = prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise Unreadable(
            f"{where} needs {needed} bytes for {shape}, its offsets give {end - begin}."
        )
    return Entry(dtype, tuple(shape), data_begin + begin, needed)


def _counts(values: object) -> bool:
    """Tell whether values are a list of integers that fit into 63 bits and are not negative."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _dtype(code: object, where: str) -> torch.dtype:
    if isinstance(code, str) and code in DTYPES:
        return DTYPES[code]
    if isinstance(code, str) and code.startswith(_NOT_MERGEABLE):
        raise IncompatibleWeights(f"{where} has dtype {code}. Convert it to BF16 or F32 first.")
    raise Unreadable(f"{where} has an unknown dtype {str(code)[:50]!r}.")


def _check_cover(entries: dict[str, Entry], begin: int, size: int, name: str) -> None:
    """Check that the tensors follow each other without gap or overlap up to the end of the file."""
    position = begin
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin != position:
            kind = "overlaps the one before it" if entry.begin < position else "follows a hole"
            raise Unreadable(f"{name}: {key[:200]!r} {kind} in the file. Export it again.")
        position += entry.nbytes
    _check_end(name, position, size)
    if position < size:
        raise Unreadable(
            f"{name}: has {size - position} bytes after its last tensor. Export it again."
        )
