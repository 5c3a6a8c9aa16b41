"""One column of a user's table: read as numbers or text, and what is refused in it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from pandas.api import types

from zoo.tasks.findings import Findings

MOST_LEVELS = 32
_LARGEST = float(np.finfo(np.float32).max)
_DROP = "leave the column out with drop=[{!r}]"


def is_text(column: pd.Series) -> bool:
    """Return whether a parsed column holds text rather than numbers."""
    return isinstance(column.dtype, pd.StringDtype)


def parse_column(column: pd.Series, findings: Findings, escape: str = _DROP) -> pd.Series | None:
    """Read a column as numbers or as text.

    Text that spells numbers is numbers; booleans and categories are text, whatever they hold.

    Args:
        column: Values of any type, indexed by the rows of the file.
        findings: Takes a problem if the types are mixed or cannot be used.
        escape: The last way out that messages offer, with a place for the name.

    Returns:
        Whole numbers, float64 with NaN for missing values, or strings; None after a problem.
    """
    if types.is_bool_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype):
        return column.astype("string")
    if types.is_numeric_dtype(column.dtype) and not types.is_complex_dtype(column.dtype):
        return _plain_numbers(column)
    if types.is_string_dtype(column):
        return _parse_text(column.astype("string"), findings, escape)
    findings.problems.append(
        f"column {column.name!r}: expected numbers, text or booleans, got {column.dtype}, first "
        f"{str(column.iloc[0])[:40]!r} in row {column.index[0]}. Turn it into numbers, "
        f"or {escape.format(column.name)}."
    )
    return None


def _plain_numbers(column: pd.Series) -> pd.Series:
    """Turn any numeric type into int64 or uint64 without gaps, or into float64 with NaN."""
    if types.is_integer_dtype(column.dtype) and not column.isna().any():
        unsigned = types.is_unsigned_integer_dtype(column.dtype)
        return column.astype("uint64" if unsigned else "int64")
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return pd.Series(values, index=column.index, name=column.name)


def _parse_text(text: pd.Series, findings: Findings, escape: str) -> pd.Series | None:
    """Read strings as numbers if all of them are; a mixture is a problem."""
    text = text.str.strip()
    text = text.mask(text == "")
    numbers = pd.to_numeric(text, errors="coerce")
    present, words = text.notna(), text.notna() & numbers.isna()
    if not words.any():
        return _plain_numbers(numbers)
    if words.sum() == present.sum():
        return text
    rare, rule = (words, "numbers") if 2 * words.sum() <= present.sum() else (~words, "text")
    rare &= present
    first = rare.idxmax()
    findings.problems.append(
        f"column {text.name!r}: expected {rule}, as in {int(present.sum() - rare.sum())} rows, got "
        f"something else in {int(rare.sum())}, first {text[first][:40]!r} in row {first}. Write "
        f"all of them in one way, or {escape.format(text.name)}."
    )
    check_gaps(text, findings, escape)
    return None


def check_gaps(column: pd.Series, findings: Findings, escape: str = _DROP) -> None:
    """Take down missing values, and numbers that float32 cannot hold.

    Args:
        column: A parsed column.
        findings: Takes the problems.
        escape: As for ``parse_column``.
    """
    missing = column.isna()
    if missing.any():
        findings.problems.append(
            f"column {column.name!r}: expected {len(column)} values, got "
            f"{int((~missing).sum())}; missing: {int(missing.sum())}, first in row "
            f"{missing.idxmax()}. Fill them in, remove these rows, or {escape.format(column.name)}."
        )
    if is_text(column):
        return
    infinite = column.abs() > _LARGEST
    if infinite.any():
        first = infinite.idxmax()
        findings.problems.append(
            f"column {column.name!r}: expected finite numbers up to {_LARGEST:.3g}, got larger in "
            f"{int(infinite.sum())} rows, first {column[first]:g} in row {first}. Correct them, "
            f"remove these rows, or {escape.format(column.name)}."
        )


def check_feature(column: pd.Series, findings: Findings) -> None:
    """Take down an input column that is constant, an identifier, or has too many levels."""
    present = column.dropna()
    if present.empty:
        return
    # Members read float32: what differs only beyond its seven digits is constant for them.
    with np.errstate(over="ignore"):  # too large ones are a problem of their own
        seen = present if is_text(present) else present.astype(np.float32)
    distinct = present.nunique()
    if seen.nunique() == 1:
        findings.problems.append(
            f"column {column.name!r}: expected values that differ, got {_shown(present.iloc[0])} "
            f"in every row from row {present.index[0]} on"
            f"{'' if distinct == 1 else ' once rounded to float32'}. It tells nothing; "
            f"leave it out with drop=[{column.name!r}]."
        )
    elif distinct == len(present) and not types.is_float_dtype(present.dtype):
        measured = "" if is_text(present) else " If it measures something, write it with decimals."
        findings.problems.append(
            f"column {column.name!r}: expected values that rows share, got another one in every "
            f"row, beginning with {_shown(present.iloc[0])} in row {present.index[0]}. It reads "
            f"like an identifier; leave it out with drop=[{column.name!r}].{measured}"
        )
    elif is_text(present) and distinct > MOST_LEVELS:
        beyond = pd.Series(pd.factorize(present)[0], present.index) >= MOST_LEVELS
        first = beyond.idxmax()
        findings.problems.append(
            f"column {column.name!r}: expected at most {MOST_LEVELS} different texts, got "
            f"{distinct}, the first beyond in row {first}: {_shown(present[first])}. "
            f"Group them, turn them into numbers, or {_DROP.format(column.name)}."
        )


def encode_column(column: pd.Series, findings: Findings) -> np.ndarray:
    """Turn a checked column into features: numbers as they are, text into one per level.

    Args:
        column: A parsed column without gaps.
        findings: Takes a note on how text was encoded.

    Returns:
        Features, float32 ``[rows, 1]`` or ``[rows, levels]``.
    """
    if not is_text(column):
        return column.to_numpy(np.float32)[:, None]
    codes, levels = pd.factorize(column, sort=True)
    findings.notes.append(
        f"column {column.name!r}: one-hot, {len(levels)} features: "
        f"{', '.join(str(level) for level in levels)}"
    )
    return np.eye(len(levels), dtype=np.float32)[codes]


def _shown(value: object) -> str:
    """Quote a value shortly."""
    return repr(str(value)[:40]) if isinstance(value, str) else f"{value:g}"
