"""The target of a user's file: read as classes or as numbers, and what is refused in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from zoo.tasks.columns import check_gaps, is_text, parse_column
from zoo.tasks.findings import Findings

_MOST_CLASSES_UNASKED = 20
_FEWEST_OF_CLASS = 8
_FEWEST_ROWS = 40
_ESCAPE = "choose another target"


@dataclass(frozen=True)
class Targets:
    """Targets of all rows of a file.

    Attributes:
        values: Class of every row, int64 ``[rows]``, -1 where it is missing; or numbers,
            float64 ``[rows, outputs]``.
        labels: Names of the classes; None for regression.
        index: Row numbers of the file.
    """

    values: np.ndarray
    labels: tuple[str, ...] | None
    index: pd.Index

    def only(self, keep: np.ndarray) -> Targets:
        """Return the targets of the rows that are kept, bool ``[rows]``."""
        return Targets(self.values[keep], self.labels, self.index[keep])


def read_targets(columns: pd.DataFrame, kind: str, findings: Findings) -> Targets | None:
    """Read the target column, or the target columns of a regression.

    Args:
        columns: Values of any type, indexed by the rows of the file.
        kind: "classification", "regression" or "auto", which takes text, booleans and whole
            numbers for classes if there are at most 20 of them and fewer than half as many as
            rows.
        findings: Takes problems, and a note on what "auto" decided.

    Returns:
        The targets; None after a problem that leaves none.
    """
    each = (columns.iloc[:, i] for i in range(columns.shape[1]))
    parsed = [parse_column(column, findings, _ESCAPE) for column in each]
    if any(column is None for column in parsed):
        return None
    for column in parsed:
        check_gaps(column, findings, _ESCAPE)
    classes = kind == "classification" or (kind == "auto" and _reads_as_classes(parsed))
    if kind == "auto":
        other = "regression" if classes else "classification"
        findings.notes.append(
            f"the target was read as {'classes' if classes else 'numbers'}; "
            f"kind={other!r} asks for the other"
        )
    return _read_classes(parsed, findings) if classes else _read_numbers(parsed, findings)


def _reads_as_classes(columns: list[pd.Series]) -> bool:
    """Return whether one column has few whole numbers or texts, or several are one-hot."""
    if len(columns) > 1:
        hot = all(not is_text(column) and column.isin([0, 1]).all() for column in columns)
        return hot and bool((sum(columns) == 1).all())
    distinct = columns[0].nunique()
    few = distinct <= _MOST_CLASSES_UNASKED and 2 * distinct < len(columns[0])
    return few and not _not_whole(columns[0]).any()


def _not_whole(column: pd.Series) -> pd.Series:
    """Mark numbers with a fraction; text has none."""
    if is_text(column):
        return pd.Series(False, index=column.index)
    return column.notna() & (column % 1 != 0)


def _read_classes(columns: list[pd.Series], findings: Findings) -> Targets | None:
    """Number the different values of one column in their order."""
    if len(columns) > 1:
        findings.problems.append(
            f"target: expected one class per row, got {len(columns)} numbers. If they are a class "
            "each in one-hot form, give their argmax; if not, kind='regression'."
        )
        return None
    column = columns[0]
    broken = _not_whole(column)
    if broken.any():
        first = broken.idxmax()
        findings.problems.append(
            f"target {column.name!r}: expected classes as text or whole numbers, got "
            f"fractions in {int(broken.sum())} rows, first {column[first]:g} in row {first}. "
            "Correct them, or use kind='regression'."
        )
        return None
    codes, levels = pd.factorize(column, sort=True)
    labels = tuple(str(v) if isinstance(v, str) else str(int(v)) for v in levels)
    return Targets(codes.astype(np.int64), labels, column.index)


def _read_numbers(columns: list[pd.Series], findings: Findings) -> Targets | None:
    """Take columns of numbers as they are."""
    text = [column for column in columns if is_text(column)]
    for column in text:
        findings.problems.append(
            f"target {column.name!r}: expected numbers for a regression, got text with "
            f"{column.nunique()} different values, first {str(column.iloc[0])[:40]!r} in row "
            f"{column.index[0]}. Use kind='classification', or another target."
        )
    for column in columns:
        if column.nunique() == 1:
            findings.problems.append(
                f"target {column.name!r}: expected values that differ, got {column.iloc[0]} in "
                f"every row from row {column.index[0]} on. Choose another target."
            )
    if text:
        return None
    values = np.column_stack([column.to_numpy(np.float64) for column in columns])
    return Targets(values, None, columns[0].index)


def check_counts(targets: Targets, findings: Findings) -> None:
    """Take down too few rows in all, or of a class.

    Args:
        targets: Targets of the rows that are kept.
        findings: Takes the problems.
    """
    rows = len(targets.values)
    if rows < _FEWEST_ROWS:
        findings.problems.append(
            f"rows: expected at least {_FEWEST_ROWS} different ones, got {rows}. Members, merger "
            "and test need rows of their own; bring more."
        )
    if targets.labels is None:
        return
    if len(targets.labels) == 1:
        findings.problems.append(
            f"target: expected at least two classes, got only {targets.labels[0]!r}, from row "
            f"{targets.index[0]} on. Choose another target."
        )
    counts = np.bincount(targets.values[targets.values >= 0], minlength=len(targets.labels))
    for code, (label, count) in enumerate(zip(targets.labels, counts, strict=True)):
        if count < _FEWEST_OF_CLASS:
            first = targets.index[(targets.values == code).argmax()]
            findings.problems.append(
                f"target: expected at least {_FEWEST_OF_CLASS} different rows of class {label!r}, "
                f"got {count}, first in row {first}. Bring more, merge it with another class, or "
                "remove it."
            )
