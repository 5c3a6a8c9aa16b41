"""What must not reach training: columns that give the target away, and rows that repeat."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from pandas.api import types

from zoo.tasks.columns import MOST_LEVELS
from zoo.tasks.findings import Findings
from zoo.tasks.targets import Targets

_STRONGEST = 0.9999
_BY_CHANCE = 1e-6


def check_leak(column: pd.Series, targets: Targets, findings: Findings) -> None:
    """Take down an input column that is the target in another form, or alone tells it.

    Args:
        column: A parsed column.
        targets: Targets of the same rows.
        findings: Takes the problem.
    """
    answers = targets.values[:, None] if targets.labels is not None else targets.values
    known = column.notna().to_numpy() & np.isfinite(answers).all(axis=1)
    if targets.labels is not None:
        known &= targets.values >= 0
    column, answers = column[known], answers[known]
    found = None
    for answer in answers.T:
        if targets.labels is None:
            found = found or _correlation(column, answer)
        found = found or _correspondence(column, answer, classes=targets.labels is not None)
    if found is not None:
        findings.problems.append(
            f"column {column.name!r}: expected a hint at the target, got {found}, from row "
            f"{column.index[0]} on. Nothing is left to learn; leave the column out with "
            f"drop=[{column.name!r}]{_or_decimals(column)}."
        )


def _correlation(column: pd.Series, answer: np.ndarray) -> str | None:
    """Say so if numbers are those to predict up to scale and offset."""
    if not types.is_numeric_dtype(column.dtype) or column.nunique() < 2 or np.ptp(answer) == 0:
        return None
    # Divided first: the squares of large finite numbers are infinite.
    values = column.to_numpy(np.float64) / column.abs().max()
    strength = abs(np.corrcoef(values, answer / np.abs(answer).max())[0, 1])
    if not strength > _STRONGEST:
        return None
    return f"the target in other units, |correlation| {strength:.6f} > {_STRONGEST}"


def _correspondence(column: pd.Series, answer: np.ndarray, *, classes: bool) -> str | None:
    """Say so if every value of a column goes with one value of the target."""
    groups, levels = pd.factorize(column)
    codes, different = pd.factorize(answer)
    one_each = np.empty(len(levels), dtype=np.int64)
    one_each[groups] = codes  # [levels], of any row with that value
    if len(levels) < 2 or (one_each[groups] != codes).any():
        return None
    if len(levels) == len(different) and 2 * len(levels) <= len(codes):
        return f"the target itself, perhaps renamed: {len(levels)} values that go with its own"
    if classes and _more_than_chance(column, groups, codes):
        return f"{len(levels)} values, each in rows of one class only"
    return None


def _more_than_chance(column: pd.Series, groups: np.ndarray, codes: np.ndarray) -> bool:
    """Return whether rows of equal value are of one class more often than chance explains.

    Were the classes drawn without regard to the column, s rows of equal value would be of one
    class with probability sum_c p_c^s. Numbers with decimals count only where they are few.
    """
    if types.is_float_dtype(column.dtype) and groups.max() >= MOST_LEVELS:
        return False
    shares = np.bincount(codes) / len(codes)  # [classes]
    sizes, times = np.unique(np.bincount(groups), return_counts=True)
    pure = np.log((shares ** sizes[:, None]).sum(axis=1))  # [sizes]
    return float(pure @ times) < np.log(_BY_CHANCE)


def _or_decimals(column: pd.Series) -> str:
    """Say how whole numbers are told from names, where that would make a difference."""
    if not types.is_integer_dtype(column.dtype) or column.nunique() <= MOST_LEVELS:
        return ""
    return ", or write it with decimals if it measures what is known before the target is"


def first_of_each(
    inputs: np.ndarray, targets: Targets, train: int | None, findings: Findings
) -> np.ndarray:
    """Find rows that repeat another one exactly; they would sit on both sides of a split.

    Args:
        inputs: Inputs of all rows, ``[rows, ...]``.
        targets: Targets of all rows.
        train: Number of leading rows for training, the others being official test rows, of which
            none is ever removed; None without official test rows.
        findings: Takes notes on what is removed, and on equal inputs with unequal targets.

    Returns:
        Which rows are kept, bool ``[rows]``.
    """
    flat = np.ascontiguousarray(inputs.reshape(len(inputs), -1))  # [rows, numbers]
    questions = [hashlib.blake2b(row, digest_size=16).digest() for row in flat]
    rows = pd.Series([q + a.tobytes() for q, a in zip(questions, targets.values, strict=True)])
    test = 0 if train is None else len(rows) - train
    order = np.roll(np.arange(len(rows)), test)  # official test rows first
    repeated = rows[order].duplicated().sort_index().to_numpy(copy=True)
    repeated[len(rows) - test :] = False
    if repeated.any():
        findings.notes.append(
            f"removed {repeated.sum()} rows that repeat another one exactly, the first of them "
            f"row {targets.index[repeated.argmax()]}"
        )
    torn = pd.DataFrame({"question": questions, "row": rows}).drop_duplicates("row")
    torn = torn[torn["question"].duplicated(keep=False)]
    if len(torn):
        findings.notes.append(
            f"{len(torn)} rows have the inputs of another row, but not its target, the first of "
            f"them row {targets.index[torn.index[0]]}"
        )
    return ~repeated
