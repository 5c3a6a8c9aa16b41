"""One data set in memory: inputs, targets, and what its publishers said about them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from metamerge.errors import ZooError


@dataclass(frozen=True, eq=False)
class Task:
    """A data set for classification or regression, whole and in a fixed order of rows.

    Attributes:
        name: The name that ``load_task`` knows, or the path of a user's file.
        inputs: Float32. Images in [0, 1] ``[rows, channels, height, width]``, signals
            ``[rows, channels, length]`` or tables ``[rows, features]``; signals and tables may
            hold any finite value.
        targets: Classification: class of every row, int64 in [0, classes), ``[rows]``.
            Regression: finite float32 ``[rows, outputs]``.
        classes: Number of classes; None for regression.
        test_rows: The rows that the publishers set aside for testing; None if they named none.
        standardise: Whether a split scales the inputs, and regression targets, to mean 0 and
            standard deviation 1 of the rows that members are trained on.
        notes: What loading changed or noticed, for people to read.
        labels: Names of the classes, one each; empty where they have none but their numbers.
    """

    name: str
    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    classes: int | None
    test_rows: range | None = None
    standardise: bool = False
    notes: tuple[str, ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse tensors that contradict the attributes above.

        Raises:
            ZooError: If a shape, a data type, a range or a number of rows is wrong.
        """
        where = f"Task {self.name!r}"
        _check_inputs(where, self.inputs)
        rows = len(self.inputs)
        if self.classes is None:
            _check_values(where, self.targets, rows)
        else:
            _check_classes(where, self.targets, rows, self.classes)
        if self.standardise and self.inputs.ndim == 4:
            raise ZooError(f"{where}: images lie in [0, 1] and are not standardised.")
        if self.labels and len(self.labels) != self.classes:
            raise ZooError(
                f"{where}: labels must name each of {self.classes} classes, got "
                f"{len(self.labels)}: {', '.join(self.labels)}."
            )
        official = self.test_rows
        if official is not None and (
            official.step != 1 or not 0 <= official.start < official.stop <= rows
        ):
            raise ZooError(f"{where}: test_rows {official} do not lie within {rows} rows.")

    @property
    def regression(self) -> bool:
        """Whether targets are numbers rather than classes."""
        return self.classes is None

    @property
    def outputs(self) -> int:
        """Number of values that a network returns per row: classes, or numbers to predict."""
        return self.targets.shape[1] if self.classes is None else self.classes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes of ``inputs`` and then ``targets``; computed once, on first use."""
        total = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            total.update(tensor.detach().cpu().contiguous().numpy())
        return total.hexdigest()


def _check_inputs(where: str, inputs: Tensor) -> None:
    """Refuse inputs of another type or shape, empty ones, and values out of range."""
    if inputs.dtype != torch.float32 or inputs.ndim not in (2, 3, 4):
        raise ZooError(
            f"{where}: inputs must be float32 [rows, features], [rows, channels, length] or "
            f"[rows, channels, height, width], got {inputs.dtype} {tuple(inputs.shape)}."
        )
    if inputs.numel() == 0:
        raise ZooError(f"{where}: nothing in it, inputs are {tuple(inputs.shape)}.")
    low, high = (bound.item() for bound in inputs.aminmax())  # both NaN if any value is
    if inputs.ndim == 4 and not (low >= 0 and high <= 1):
        raise ZooError(
            f"{where}: images must lie in [0, 1], got {low:g} to {high:g}. "
            "Divide them by their largest possible value."
        )
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ZooError(f"{where}: inputs must be finite, got {low:g} to {high:g}.")


def _check_classes(where: str, targets: Tensor, rows: int, classes: int) -> None:
    """Refuse targets of a classification that are no classes, one per row."""
    if targets.dtype != torch.int64 or targets.shape != (rows,):
        raise ZooError(
            f"{where}: targets must be int64 [{rows}], one per row, "
            f"got {targets.dtype} {tuple(targets.shape)}."
        )
    first, last = int(targets.min()), int(targets.max())
    if first < 0 or last >= classes:
        raise ZooError(f"{where}: targets must lie in [0, {classes}), got {first} to {last}.")


def _check_values(where: str, targets: Tensor, rows: int) -> None:
    """Refuse targets of a regression that are no finite numbers, some per row."""
    if targets.dtype != torch.float32 or targets.ndim != 2 or len(targets) != rows:
        raise ZooError(
            f"{where}: targets of a regression (classes=None) must be float32 "
            f"[{rows}, outputs], got {targets.dtype} {tuple(targets.shape)}."
        )
    if targets.shape[1] == 0 or not targets.isfinite().all():
        raise ZooError(
            f"{where}: targets of a regression must be finite and at least one per row, got "
            f"{tuple(targets.shape)} with {int((~targets.isfinite()).sum())} others."
        )
