"""A user's NPZ file as a task: images, signals or a table."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from metamerge.errors import ZooError
from zoo.tasks.findings import Findings
from zoo.tasks.leakage import first_of_each
from zoo.tasks.table_files import MOST_BYTES, check_size
from zoo.tasks.tables import build_table, check_memory, drop_columns, make_task
from zoo.tasks.targets import check_counts, read_targets
from zoo.tasks.task import Task

_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)
_NAMES = (("inputs", "x", "X"), ("targets", "y"))
_HALVES = (("x_train", "y_train"), ("x_test", "y_test"))


def load_arrays(path: Path, kind: str, drop: Sequence[str]) -> Task:
    """Load a user's NPZ file; see ``load_task``."""
    check_size(path)
    findings = Findings(str(path), "rows are counted from 0")
    inputs, targets, train = _choose_arrays(read_arrays(path, MOST_BYTES), findings)
    if inputs.ndim == 2:
        features = pd.DataFrame(inputs)
        features.columns = [f"feature {place}" for place in range(inputs.shape[1])]
        return build_table(drop_columns(features, drop, findings), targets, kind, findings, train)
    if len(drop) > 0:
        findings.options.append(f"drop: {inputs.shape} are no columns to leave out. Leave it out.")
    inputs = _read_pictures(inputs, findings)
    read = read_targets(targets, kind, findings)
    keep = np.ones(len(inputs), dtype=bool)
    if read is not None:
        keep = first_of_each(inputs, read, train, findings)
        read = read.only(keep)
        check_counts(read, findings)
    findings.refuse()
    kept = inputs[keep].astype(np.float32)  # [kept, channels, ...]
    if inputs.dtype == np.uint8:
        kept /= 255
    first_test = None if train is None else int(keep[:train].sum())
    return make_task(kept, read, first_test, findings, standardise=inputs.ndim == 3)


def read_arrays(path: Path, most_bytes: int) -> dict[str, np.ndarray]:
    """Read every array of an NPZ file, unpickling none.

    Args:
        path: The file.
        most_bytes: What its arrays may take together.

    Returns:
        Arrays by name.

    Raises:
        ZooError: If the file is damaged, too large, or holds Python objects.
    """
    name = None
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > most_bytes:
            raise ZooError(
                f"{path}: its arrays take {size / 2**30:.1f} GiB, expected at most "
                f"{most_bytes / 2**30:.1f} GiB. Save a part of the rows, or bytes (uint8) "
                "instead of floats."
            )
        arrays = {}
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                arrays[name] = archive[name]
    except (OSError, EOFError, ValueError, RuntimeError, MemoryError, *_DAMAGE) as error:
        what = "no NPZ file" if name is None else f"array {name!r} is damaged, or holds objects"
        raise ZooError(
            f"{path}: {what}. Expected plain numbers or text, as np.savez writes them, got "
            f"{type(error).__name__}. Save objects as text with .astype(str), or get the file "
            "again."
        ) from error
    return arrays


def _choose_arrays(
    arrays: dict[str, np.ndarray], findings: Findings
) -> tuple[np.ndarray, pd.DataFrame, int | None]:
    """Find inputs, targets and the number of training rows by the names of the arrays."""
    halves = all(name in arrays for half in _HALVES for name in half)
    pairs = _HALVES if halves else (tuple(_find_name(n, arrays, findings) for n in _NAMES),)
    findings.refuse()
    for names in pairs:
        _check_form(names, arrays, findings)
    findings.refuse()
    if halves:
        _check_halves(arrays, findings)
        findings.refuse()
    inputs, targets = (np.concatenate([arrays[pair[i]] for pair in pairs]) for i in (0, 1))
    unread = sorted(set(arrays).difference(*pairs))
    if unread:
        findings.notes.append(f"arrays that were not read: {', '.join(unread)}")
    columns = pd.DataFrame(targets.reshape(len(targets), -1))
    columns.columns = [f"target {place}" for place in range(columns.shape[1])]
    return inputs, columns, len(arrays["x_train"]) if halves else None


def _find_name(names: tuple[str, ...], arrays: dict[str, np.ndarray], findings: Findings) -> str:
    """Return the one name that there is an array of."""
    found = [name for name in names if name in arrays]
    if len(found) != 1:
        findings.problems.append(
            f"arrays: expected one of {', '.join(names)}, got {' and '.join(found) or 'none'} "
            f"among {', '.join(arrays) or 'no arrays'}. Save them with np.savez(path, inputs=x, "
            "targets=y), or as x_train, y_train, x_test and y_test."
        )
    return found[0] if found else names[0]


def _check_form(names: tuple[str, ...], arrays: dict[str, np.ndarray], findings: Findings) -> None:
    """Take down inputs and targets of a wrong type or shape, or of different lengths."""
    for name, axes in zip(names, ((2, 3, 4), (1, 2)), strict=True):
        shape = arrays[name].shape
        if len(shape) not in axes or 0 in shape:
            findings.problems.append(
                f"array {name!r}: expected {', '.join(map(str, axes))} axes, the first of them "
                f"rows, and something in it, got shape {shape}. Reshape it."
            )
        if arrays[name].dtype.kind not in "biufU":
            findings.problems.append(
                f"array {name!r}: expected numbers, booleans or text, got {arrays[name].dtype}, "
                "from row 0 on. Turn it into one of these with .astype(...)."
            )
    one, other = (arrays[name].shape[:1] for name in names)
    if one != other:
        findings.problems.append(
            f"array {names[1]!r}: expected as many rows as {names[0]!r} has, {one}, got {other}. "
            "Save rows and their targets together."
        )


def _check_halves(arrays: dict[str, np.ndarray], findings: Findings) -> None:
    """Take down training and test arrays that are not of one form."""
    for name, other in zip(*_HALVES, strict=True):
        forms = [(arrays[n].shape[1:], arrays[n].dtype.kind) for n in (name, other)]
        if forms[0] != forms[1]:
            findings.problems.append(
                f"array {other!r}: expected rows like those of {name!r}, "
                f"{arrays[name].dtype} {forms[0][0]}, got {arrays[other].dtype} {forms[1][0]}. "
                "Prepare both in one way."
            )


def _read_pictures(inputs: np.ndarray, findings: Findings) -> np.ndarray:
    """Read three or four axes as images or signals, bytes as they are and floats as float32."""
    check_memory(inputs.size, findings)
    if inputs.dtype != np.uint8 and inputs.dtype.kind != "f":
        findings.problems.append(
            f"inputs: expected bytes (uint8) or floats, got {inputs.dtype}, first "
            f"{inputs.flat[0]} in row 0. Images of 256 levels: .astype(np.uint8)."
        )
        return inputs
    low, high = 0, 255
    if inputs.dtype != np.uint8:
        with np.errstate(over="ignore"):
            inputs = inputs.astype(np.float32) + np.float32(0)  # -0.0 is 0.0
        low, high = 0.0, 1.0
        _check_finite(inputs, findings)
    image = bool(inputs.min() >= low and inputs.max() <= high)
    if inputs.ndim == 3:
        form = "grey images [rows, height, width]" if image else "signals [rows, channels, length]"
        findings.notes.append(f"inputs of shape {inputs.shape} were read as {form}")
        return inputs[:, None] if image else inputs
    _check_images(inputs, image, findings)
    return inputs


def _check_finite(inputs: np.ndarray, findings: Findings) -> None:
    """Take down rows that hold NaN, or numbers that float32 cannot hold."""
    broken = ~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
    if broken.any():
        findings.problems.append(
            f"inputs: expected finite float32 numbers, got others in {broken.sum()} rows, first "
            f"in row {broken.argmax()}. Correct or remove these rows."
        )


def _check_images(inputs: np.ndarray, image: bool, findings: Findings) -> None:
    """Take down images out of range, or with their channels last."""
    if not image and np.isfinite(inputs).all():
        flat = inputs.reshape(len(inputs), -1)
        outside = (flat.min(axis=1) < 0) | (flat.max(axis=1) > 1)
        findings.problems.append(
            f"inputs: expected images in [0, 1], got {inputs.min():g} to {inputs.max():g}, first "
            f"in row {outside.argmax()}. Divide them by their largest possible value, or save "
            "bytes (uint8)."
        )
    _, channels, _, last = inputs.shape
    if last in (1, 3, 4) and channels > 4:
        findings.problems.append(
            f"inputs: expected images [rows, channels, height, width], got {inputs.shape} from "
            "row 0 on, which has its channels last. Save x.transpose(0, 3, 1, 2)."
        )
