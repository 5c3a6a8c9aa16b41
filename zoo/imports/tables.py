"""CSV files that come with a zoo: plain or gzipped, read strictly, column by column."""

import csv
import gzip
import io
import math
import sys
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from metamerge.checkpoints.opening import display, open_regular
from metamerge.errors import ZooError
from zoo.imports.population import listed

MAX_BYTES = 512 * 2**20  # four times the largest published table, unpacked
_UNKNOWN = ("", "na", "n/a", "nan", "null", "none")


@dataclass(frozen=True, eq=False)
class Table:
    """A CSV file.

    Attributes:
        path: Where it lies.
        columns: Name of every column -> its values as they are written, one per row.
        lines: Line of the file on which each row ends.
    """

    path: Path
    columns: dict[str, list[str]] = field(repr=False)
    lines: list[int] = field(repr=False)

    def column(self, name: str) -> list[str]:
        """Look up a column that must be there.

        Args:
            name: Name of the column.

        Returns:
            Its values, one per row.

        Raises:
            ZooError: If there is no such column.
        """
        if name not in self.columns:
            raise ZooError(
                f"{display(self.path)}: no column {name!r}; there are "
                f"{listed(list(self.columns))}. Check that it belongs to this zoo."
            )
        return self.columns[name]

    def metrics(
        self, rows: Sequence[int], *, skip: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Read all columns of numbers.

        Args:
            rows: Rows to read, in this order.
            skip: Columns that are no metrics.

        Returns:
            Column -> float64 ``[rows]``, and a note where columns hold other things than numbers.
        """
        names = [name for name in self.columns if name and name not in skip]
        found = {name: numbers([self.columns[name][row] for row in rows]) for name in names}
        metrics = {name: values for name, values in found.items() if values is not None}
        rest = [name for name in names if name not in metrics]
        note = f"{self.path.name}: columns that hold no numbers are left out: {listed(rest)}."
        return metrics, (note,) if rest else ()


def numbers(values: Sequence[str]) -> Tensor | None:
    """Read numbers as people write them into tables.

    Args:
        values: One value per row; empty ones and NA, NaN, null and None are unknown.

    Returns:
        float64 ``[rows]`` with NaN for what is unknown; None if a value is no number.
    """
    try:
        known = [math.nan if v.strip().lower() in _UNKNOWN else float(v) for v in values]
    except ValueError:
        return None
    return torch.tensor(known, dtype=torch.float64)


def read_table(path: Path) -> Table:
    """Read a CSV file with a header, plain or gzipped as its content says.

    Args:
        path: The file: UTF-8 with or without a byte order mark, comma-separated.

    Returns:
        The table; rows without any value are left out.

    Raises:
        ZooError: If it is no such file, a column has two values for one name, or a row has
            another number of values than the header.
        Unreadable: If it cannot be opened or is not a regular file.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    lines: list[int] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        values = _columns(path, header)
        for row in reader:
            if row:
                _check_row(path, reader.line_num, row, header)
                lines.append(reader.line_num)
                for column, value in zip(values, row, strict=True):
                    column.append(sys.intern(value))  # most values repeat on many rows
    except csv.Error as error:
        raise ZooError(
            f"{display(path)}: line {reader.line_num} is not CSV ({error}). Export it again."
        ) from None
    return Table(path, dict(zip(header, values, strict=True)), lines)


def _text(path: Path) -> str:
    with open_regular(path) as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            content = (gzip.GzipFile(fileobj=raw) if packed else raw).read(MAX_BYTES + 1)
            if len(content) <= MAX_BYTES:
                return content.decode("utf-8-sig")
        except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ZooError(
                f"{display(path)}: expected a CSV file in UTF-8, plain or gzipped; it cannot be "
                f"read ({error}). Get the file again."
            ) from None
    raise ZooError(
        f"{display(path)}: expected at most {MAX_BYTES} bytes, unpacked, got more. Cut it to the "
        "rows that are needed."
    )


def _columns(path: Path, header: list[str]) -> list[list[str]]:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if not header or repeated:
        found = f"{listed(repeated)} more than once" if repeated else "an empty file"
        raise ZooError(
            f"{display(path)}: expected a header that names every column once, got {found}. "
            "Rename the columns."
        )
    return [[] for _ in header]


def _check_row(path: Path, line: int, row: list[str], header: list[str]) -> None:
    if len(row) != len(header):
        raise ZooError(
            f"{display(path)}: line {line} has {len(row)} values, the header names {len(header)} "
            "columns. Export the table again."
        )
