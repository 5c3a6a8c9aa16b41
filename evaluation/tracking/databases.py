"""Databases of runs: their addresses, and a first migration that many processes may want at once.

MLflow's own survives neither a second process nor a kill. Here it runs under a lock, for a SQLite
file in a folder of its own.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

CONNECT_TIMEOUT = {"sqlite": "timeout", "postgresql": "connect_timeout", "mysql": "connect_timeout"}
SECONDS, LOCKED = 5, 60  # to wait for an answer, and for others that migrate
LOCK = 7_302_651  # any number that all processes agree on


def store_address(uri: str | None) -> str:
    """The address of a store, the same from every folder.

    Args:
        uri: Address; by default MLFLOW_TRACKING_URI, else ``mlflow.db`` in the working directory.

    Returns:
        The address; paths of SQLite files are absolute.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_address(Path("mlflow.db"))
    file = sqlite_file(uri)
    return sqlite_address(file) if file else uri


def sqlite_address(file: Path) -> str:
    """The address of a SQLite file.

    Args:
        file: Its path.

    Returns:
        The address.
    """
    quoted = re.sub("[%?]", lambda sign: f"%{ord(sign[0]):02X}", str(file.absolute()))
    return f"sqlite:///{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite address.

    Args:
        uri: Any address.

    Returns:
        Its absolute path, None for other stores and for memory.
    """
    if _dialect(uri) != "sqlite":
        return None
    from sqlalchemy import make_url  # a quarter of a second, for those who need it

    database = make_url(uri).database
    return Path(database).absolute() if database and database != ":memory:" else None


@contextmanager
def migrated(uri: str, upgrade: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a database whose schema is in place; other stores are left alone.

    A database that is down fails within seconds; MLflow itself would try for minutes.

    Args:
        uri: Address of the store.
        upgrade: Makes the schema of an empty database.

    Yields:
        Nothing; what comes first in a fresh database is done in the body.
    """
    file = sqlite_file(uri)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=LOCKED):
            if not file.exists():
                _make_file(file, upgrade)
            _ask(uri, "SELECT 1 FROM sqlite_master")
            yield
    elif _dialect(uri) == "postgresql":
        with _postgresql_lock(uri):
            if not _has_schema(uri):
                upgrade(uri)
            yield
    else:
        if _dialect(uri) in CONNECT_TIMEOUT:
            _ask(uri, "SELECT 1")
        yield


def _make_file(file: Path, upgrade: Callable[[str], None]) -> None:
    fresh = Path(f"{file}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    upgrade(sqlite_address(fresh / file.name))
    os.replace(fresh / file.name, file)
    shutil.rmtree(fresh)


@contextmanager
def _postgresql_lock(uri: str) -> Iterator[None]:
    """Held by a connection of its own: the server frees it when that ends, however it ends."""
    with _engine(uri).connect() as connection:
        connection.exec_driver_sql(f"SET lock_timeout = '{LOCKED}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({LOCK})")
        connection.commit()  # the lock is the session's; no transaction stays open
        yield


def _has_schema(uri: str) -> bool:
    from sqlalchemy import inspect

    return "alembic_version" in inspect(_engine(uri)).get_table_names()


def _ask(uri: str, question: str) -> None:
    with _engine(uri).connect() as connection:
        connection.exec_driver_sql(question)


def _engine(uri: str) -> Any:
    from sqlalchemy import NullPool, create_engine

    option = CONNECT_TIMEOUT[_dialect(uri)]
    return create_engine(uri, poolclass=NullPool, connect_args={option: SECONDS})


def _dialect(uri: str) -> str:
    return re.split(r"\W", uri)[0]
