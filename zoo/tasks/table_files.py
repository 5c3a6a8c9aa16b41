"""CSV and Parquet files as tables whose index counts rows as the file does."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from pathlib import Path

import pandas as pd

from metamerge.errors import ZooError
from zoo.tasks.findings import Findings

MOST_BYTES = 2**31
_SEPARATORS = ",;\t|"


def check_size(path: Path) -> None:
    """Refuse a file that is missing, empty, or larger than memory is likely to be.

    Args:
        path: The user's file.

    Raises:
        ZooError: If it is.
    """
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise ZooError(f"load_task: {path} cannot be read ({error}). Check the path.") from error
    if size == 0:
        raise ZooError(f"load_task: {path} is empty.")
    _check_bytes(path, size)


def _check_bytes(path: Path, size: int) -> None:
    """Refuse what takes more than 2 GiB."""
    if size > MOST_BYTES:
        raise ZooError(
            f"load_task: {path} takes {size / 2**30:.1f} GiB, expected at most "
            f"{MOST_BYTES / 2**30:g} GiB: a task is held in memory whole. Draw a part of its "
            "rows, or leave columns out, before saving it."
        )


def read_csv(path: Path, findings: Findings) -> pd.DataFrame:
    """Read a CSV file, plain or gzipped, as text; the row after the header is row 2.

    Args:
        path: The file: UTF-8, its first row the names of the columns, separated by a comma,
            semicolon, tab or bar, whichever the first row has most of.
        findings: Takes problems with the names, and a note on empty rows.

    Returns:
        Strings, missing where a cell is empty or says so (NA, NaN, null and the like).

    Raises:
        ZooError: If the file is no CSV file.
    """
    try:
        packed = path.suffix.lower() == ".gz"
        with _gunzip(path) if packed else open(path, "rb") as file:
            first = file.readline().decode("utf-8-sig")
            file.seek(0)
            table = pd.read_csv(
                file,
                sep=max(_SEPARATORS, key=first.count),
                header=None,  # read as the first row: pandas would rename and guess
                dtype="string",
                skip_blank_lines=False,
                encoding="utf-8-sig",
            )
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise ZooError(
            f"load_task: {path} cannot be read as CSV ({str(error).strip()}). Expected UTF-8 text, "
            "one header row with the names of the columns, and as many cells in every row."
        ) from error
    table.index += 1
    header, table = table.iloc[0], table.iloc[1:]
    table.columns = _name_columns(header, findings)
    empty = table.isna().all(axis=1)
    if empty.any():
        findings.notes.append(f"left out {empty.sum()} empty rows, first row {empty.idxmax()}")
    return table[~empty]


def _gunzip(path: Path) -> io.BytesIO:
    """Unpack a gzipped file in memory, and no further than the limit."""
    with gzip.open(path) as packed:
        content = packed.read(MOST_BYTES + 1)
    _check_bytes(path, len(content))
    return io.BytesIO(content)


def _name_columns(header: pd.Series, findings: Findings) -> list[str]:
    """Take the names from the header; nameless columns are called by their place."""
    header = header.str.strip()
    header = header.mask(header == "")
    names = [f"column {i}" if pd.isna(name) else name for i, name in enumerate(header, 1)]
    if pd.to_numeric(header, errors="coerce").notna().all():
        findings.problems.append(
            f"header: expected names of columns in row 1, got numbers only, first {names[0]!r}. "
            "Write a row with names above the others."
        )
    if header.isna().any():
        findings.notes.append(
            f"columns without a name were called by their place, first "
            f"{names[header.isna().to_numpy().argmax()]!r}"
        )
    return names


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a Parquet file in its own types; the first row is row 1.

    Args:
        path: The file.

    Returns:
        Its columns, and the index where pandas saved a named one.

    Raises:
        ZooError: If the file is no Parquet file, or unpacks to more than 2 GiB.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            described = file.metadata
            packed = sum(
                described.row_group(i).total_byte_size for i in range(described.num_row_groups)
            )
            # A column of one repeated value is stored in a few bytes: count the cells as well.
            _check_bytes(path, max(packed, 4 * described.num_rows * described.num_columns))
            file.read().validate(full=True)  # text that is no UTF-8 would only fail later
        table = pd.read_parquet(path, engine="pyarrow", dtype_backend="numpy_nullable")
    except ZooError:
        raise
    except Exception as error:  # damaged notes of pandas in the file raise whatever they spell
        raise ZooError(
            f"load_task: {path} cannot be read as Parquet ({error}). Get the file again."
        ) from error
    named = any(name is not None for name in table.index.names)
    table = table.reset_index(drop=not named)
    table.columns = [str(name) for name in table.columns]
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table
