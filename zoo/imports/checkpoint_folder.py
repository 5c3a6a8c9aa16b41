"""A folder of checkpoints of one architecture, perhaps with a table of how good each one is."""

import os
from collections import defaultdict
from pathlib import Path, PurePosixPath

from metamerge.checkpoints.opening import display
from metamerge.errors import ZooError
from zoo.imports.population import (
    Population,
    check_request,
    dropped_note,
    listed,
    stack_files,
)
from zoo.imports.tables import Table, read_table

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
NAMING = ("file", "path", "name", "checkpoint", "model")


def read(
    folder: str | os.PathLike[str], *, limit: int | None = None, drop_nonfinite: bool = False
) -> Population:
    """Read a folder of .safetensors, .pt, .pth and .bin files, and those below it.

    A ``*.csv`` beside them whose header has a column file, path, name, checkpoint or model gives
    one row of metrics per file. Rows name a file by its path within the folder or by its name,
    with or without its ending. Hidden files and folders are passed over.

    Args:
        folder: The folder.
        limit: Largest number of networks; the first files in the order of their paths.
        drop_nonfinite: Leave out networks with NaN or infinite weights instead of refusing them.

    Returns:
        The population; it is not known how its networks compute.

    Raises:
        ConfigError: If ``limit`` is no number of networks.
        ZooError: If there are no files, several tables, rows or files without a partner, or files
            of different architectures.
        CheckpointError: If a file cannot be read safely and in full.
        IncompatibleWeights: If a tensor is of a kind that cannot be used.
    """
    root = check_request(folder, limit)
    files = checkpoint_files(root)
    table, naming, notes = _table(root)
    rows = {} if table is None else _match(table, naming, files)
    files = files[:limit]
    weights, kept = stack_files([root / file for file in files], drop_nonfinite=drop_nonfinite)
    names = tuple(files[position] for position in kept)
    notes += dropped_note(len(files), len(names))
    metrics = {}
    if table is not None:
        metrics, left_out = table.metrics([rows[name] for name in names], skip={naming})
        notes += left_out
    return Population(names, weights, metrics, None, None, notes)


def checkpoint_files(root: Path) -> list[str]:
    """List the checkpoints below a folder by their paths within it, sorted.

    Args:
        root: The folder.

    Returns:
        Paths with forward slashes.

    Raises:
        ZooError: If there are none.
    """
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    files = sorted(path.as_posix() for path in shown if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ZooError(f"{display(root)}: expected checkpoints ({', '.join(SUFFIXES)}), got none.")
    return files


def _table(root: Path) -> tuple[Table | None, str, tuple[str, ...]]:
    """Find the table that names files, the column that does, and notes on other tables."""
    found, notes = [], []
    for path in sorted(path for path in root.glob("*.csv") if path.is_file()):
        table = read_table(path)
        by_lower = {name.lower(): name for name in table.columns}
        naming = next((by_lower[name] for name in NAMING if name in by_lower), None)
        if naming is None:
            notes.append(f"{path.name}: left out, no column {', '.join(NAMING)} names a file.")
        else:
            found.append((table, naming))
    if len(found) > 1:
        names = listed([table.path.name for table, _ in found])
        raise ZooError(
            f"{display(root)}: expected one table that names the files, got {names}. Leave one "
            "of them there."
        )
    return (*found[0], tuple(notes)) if found else (None, "", tuple(notes))


def _match(table: Table, naming: str, files: list[str]) -> dict[str, int]:
    """Find the row of every file; each file has one, and each row one file."""
    rows: dict[str, int] = {}
    unmatched = []
    known = _names(files)
    for row, written in enumerate(table.column(naming)):
        where = f"{display(table.path)}: line {table.lines[row]}, {naming} {written!r}"
        value = str(PurePosixPath(written.strip()))
        candidates = known.get(value, [])
        if len(candidates) > 1:
            raise ZooError(f"{where} is one of {listed(candidates)}. Write the whole path.")
        if not candidates:
            unmatched.append(written)
        elif candidates[0] in rows:
            first = table.lines[rows[candidates[0]]]
            raise ZooError(f"{where} was already named on line {first}. Delete one of the rows.")
        else:
            rows[candidates[0]] = row
    without = [file for file in files if file not in rows]
    if unmatched or without:
        raise ZooError(
            f"{display(table.path)}: expected one row per file; rows without a file: "
            f"{listed(unmatched) or 'none'}; files without a row: {listed(without) or 'none'}. "
            f"Correct column {naming!r}, or move the other files away."
        )
    return rows


def _names(files: list[str]) -> dict[str, list[str]]:
    """Every way to name a file -> the files that it may stand for; a whole path is one of them."""
    known = defaultdict(list)
    for file in files:
        path = PurePosixPath(file)
        for name in {path.name, path.stem, str(path.with_suffix(""))}:
            known[name].append(file)
    return known | {file: [file] for file in files}
