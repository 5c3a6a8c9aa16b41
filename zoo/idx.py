"""IDX files, the format of MNIST and its relatives: magic number, one size per axis, bytes."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ZooError

STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_CHUNK = 2**24
_MOST_BYTES = 2**32  # no data set here comes near; a header that claims more is damaged


def locate(folder: Path, stem: str) -> Path | None:
    """Return the file of one stem under any of its official names, None if there is none."""
    dotted = stem.replace("-idx", ".idx")
    for name in (f"{stem}-ubyte", f"{dotted}-ubyte", f"{stem}-ubyte.gz", f"{dotted}-ubyte.gz"):
        if (folder / name).is_file():
            return folder / name
    return None


def read_idx(path: Path, *, axes: int) -> Tensor:
    """Read one IDX file of unsigned bytes, raw or gzipped, as its content says."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            return _parse_idx(gzip.GzipFile(fileobj=raw) if packed else raw, path, axes)
    except (OSError, EOFError, zlib.error) as error:
        raise ZooError(f"{path}: cannot be read ({error}). Get the file again.") from error


def _parse_idx(file: BinaryIO | gzip.GzipFile, path: Path, axes: int) -> Tensor:
    """Parse an open IDX file: magic number, one big-endian size per axis, then the bytes."""
    header = file.read(4 + 4 * axes)
    magic = bytes([0, 0, 8, axes])  # 8: unsigned bytes
    if header[:4] != magic:
        raise ZooError(
            f"{path}: expected an IDX file of bytes with {axes} axes (magic {magic.hex()}), "
            f"got magic {header[:4].hex() or 'nothing'}. Is it another file under this name?"
        )
    if len(header) < 4 + 4 * axes:
        raise ZooError(f"{path}: the file ends inside its header. Get the file again.")
    shape = struct.unpack(f">{axes}I", header[4:])
    expected = math.prod(shape)
    if not 0 < expected <= _MOST_BYTES:
        raise ZooError(f"{path}: the header claims {shape}, {expected} bytes. Get the file again.")
    # In chunks, and one byte further than claimed: memory follows the data, not the header.
    content = bytearray()
    while chunk := file.read(min(_CHUNK, expected + 1 - len(content))):
        content += chunk
    if len(content) != expected:
        problem = "ends early" if len(content) < expected else "goes on after its last row"
        raise ZooError(
            f"{path}: the file {problem}: the header claims {shape}, {expected} bytes, got "
            f"{len(content)}{' or more' if len(content) > expected else ''}. Get the file again."
        )
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def write_folder(folder: Path, images: np.ndarray, labels: np.ndarray, train: int) -> Path:
    """Write images and labels as the four IDX files, each of them whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (images[:train], labels[:train], images[train:], labels[train:])
    for stem, array in zip(STEMS, arrays, strict=True):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        unfinished = folder / f".{stem}.{os.getpid()}"
        unfinished.write_bytes(header + array.tobytes())
        os.replace(unfinished, folder / f"{stem}-ubyte")
    return folder
