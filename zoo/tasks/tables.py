"""A user's CSV or Parquet file as a task: checked as a whole, and only then encoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from zoo.tasks.columns import check_feature, check_gaps, encode_column, is_text, parse_column
from zoo.tasks.findings import Findings
from zoo.tasks.leakage import check_leak, first_of_each
from zoo.tasks.names import suggest
from zoo.tasks.table_files import MOST_BYTES, check_size, read_csv, read_parquet
from zoo.tasks.targets import Targets, check_counts, read_targets
from zoo.tasks.task import Task


def load_table(path: Path, target: str | None, kind: str, drop: Sequence[str]) -> Task:
    """Load a user's CSV or Parquet file; see ``load_task``."""
    check_size(path)
    packed = path.name.lower().endswith(".parquet")
    findings = Findings(
        str(path), f"rows are counted from {'1' if packed else 'the header, which is row 1'}"
    )
    table = read_parquet(path) if packed else read_csv(path, findings)
    features, targets = _choose_columns(table, target, drop, findings)
    return build_table(features, targets, kind, findings)


def _choose_columns(
    table: pd.DataFrame, target: str | None, drop: Sequence[str], findings: Findings
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Split a table into inputs and target, as far as the columns asked for are there."""
    names = list(table.columns)
    if target is None:
        findings.options.append(f"target: name the column to predict{suggest('', names)}")
    elif target not in names:
        findings.options.append(f"target: no column {target!r}{suggest(target, names)}")
    elif target in drop:
        findings.options.append(f"drop: {target!r} is the target. Leave out one of the two.")
    for name in sorted({name for name in names if names.count(name) > 1 and name not in drop}):
        findings.problems.append(
            f"header: expected different names, got {name!r} {names.count(name)} times. Rename all "
            f"but one of these columns, or leave them out with drop=[{name!r}]."
        )
    features = drop_columns(table, drop, findings)
    features = features.loc[:, [name != target for name in features.columns]]
    return features, table[[target]].iloc[:, :1] if target in names else None


def drop_columns(table: pd.DataFrame, drop: Sequence[str], findings: Findings) -> pd.DataFrame:
    """Leave columns out.

    Args:
        table: Columns with names.
        drop: Names of those to leave out.
        findings: Takes a problem for every name that is not there.

    Returns:
        The other columns.
    """
    names = list(table.columns)
    for name in drop:
        if name not in names:
            findings.options.append(f"drop: no column {name!r}{suggest(name, names)}")
    return table.loc[:, [name not in drop for name in names]]


def build_table(
    features: pd.DataFrame,
    targets: pd.DataFrame | None,
    kind: str,
    findings: Findings,
    train: int | None = None,
) -> Task:
    """Check a table as a whole, and make a task of it.

    Args:
        features: Input columns of any type, indexed by the rows of the file.
        targets: Target columns; None where the user's is missing, which is a problem already.
        kind: "auto", "classification" or "regression".
        findings: What is known of the file so far.
        train: Number of leading rows for training, the others being official test rows; None
            without official test rows.

    Returns:
        A task without repeated rows.

    Raises:
        ConfigError: If only options are wrong.
        ZooError: If anything in the file is; all of it is listed.
    """
    if features.empty:
        if features.shape[1] == 0:
            findings.options.append("drop: no column is left for the inputs. Leave out fewer.")
        else:
            findings.problems.append("rows: expected some below the header, got none.")
        findings.refuse()
    columns = [parse_column(features.iloc[:, i], findings) for i in range(features.shape[1])]
    read = None if targets is None else read_targets(targets, kind, findings)
    keep = np.ones(len(features), dtype=bool)
    if read is not None:
        keep = first_of_each(_as_matrix(columns, features), read, train, findings)
        read = read.only(keep)
        check_counts(read, findings)
    columns = [column for column in columns if column is not None]
    for column in columns:
        check_gaps(column, findings)
        check_feature(column[keep], findings)
        if read is not None:
            check_leak(column[keep], read, findings)
    check_memory(sum(len(c) * (c.nunique() if is_text(c) else 1) for c in columns), findings)
    findings.refuse()
    inputs = np.concatenate([encode_column(column[keep], findings) for column in columns], axis=1)
    first_test = None if train is None else int(keep[:train].sum())
    return make_task(inputs, read, first_test, findings, standardise=True)


def _as_matrix(columns: list[pd.Series | None], features: pd.DataFrame) -> np.ndarray:
    """Write columns as numbers that are equal where the columns are, ``[rows, columns]``.

    Args:
        columns: The parsed columns; None where parsing refused one.
        features: The columns as they were read.

    Returns:
        Numbers as float32, and text by its place among all texts of the column.
    """
    matrix = np.empty(features.shape, dtype=np.float32)
    for place, column in enumerate(columns):
        text = column is None or is_text(column)
        raw = features.iloc[:, place].astype(str) if column is None else column
        with np.errstate(over="ignore"):  # too large ones are a problem of their own
            matrix[:, place] = pd.factorize(raw)[0] if text else raw
    return matrix + np.float32(0)  # -0.0 is 0.0


def check_memory(numbers: int, findings: Findings) -> None:
    """Take down inputs that would not fit into memory.

    Args:
        numbers: How many there are, once text is one-hot.
        findings: Takes the problem.
    """
    if 4 * numbers > MOST_BYTES:
        findings.problems.append(
            f"inputs: expected at most {MOST_BYTES / 2**30:g} GiB as float32, got "
            f"{numbers / 2**28:.1f} GiB. Save a part of the rows, or of the columns."
        )


def make_task(
    inputs: np.ndarray,
    targets: Targets,
    first_test: int | None,
    findings: Findings,
    *,
    standardise: bool,
) -> Task:
    """Put inputs and targets together as a task.

    Args:
        inputs: Inputs of the rows that are kept, float32 ``[rows, ...]``.
        targets: Their targets.
        first_test: Where the official test rows begin; None without them.
        findings: What is known of the file; its notes go to the task.
        standardise: As for ``Task``.

    Returns:
        The task.
    """
    values = torch.from_numpy(targets.values)
    return Task(
        findings.where,
        torch.from_numpy(inputs),
        values.float() if targets.labels is None else values,
        classes=None if targets.labels is None else len(targets.labels),
        test_rows=None if first_test is None else range(first_test, len(inputs)),
        standardise=standardise,
        notes=tuple(findings.notes),
        labels=targets.labels or (),
    )
