"""What a run does, as plain records that JSON can hold: the same for a store now and for one later.

An event has ``do`` (what), ``id`` (which stays with what it makes in a store, so that nothing is
made twice) and ``at`` (when, in milliseconds since 1970).
"""

import math
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from uuid import uuid4

Event = dict[str, Any]

HANDLE = "event-"
"""What ids of events begin with; those of runs in a store do not."""


class Dataset(NamedTuple):
    """Data that a run has read.

    Attributes:
        name: Of a task, or a zoo.
        digest: Hash of its content.
        source: Where it lies, or came from.
        context: What it was read for, such as ``training`` or ``evaluation``.
        profile: What else is worth knowing: numbers of rows, families, members.
    """

    name: str
    digest: str
    source: str = ""
    context: str = "training"
    profile: Mapping[str, Any] = {}


def event(do: str, **content: Any) -> Event:
    """A new event.

    Args:
        do: What it does: start, options, tags, metrics, inputs, artifact, child, model or end.
        **content: What JSON can hold.

    Returns:
        The event, with an id of its own and the time.
    """
    return {"do": do, "id": f"{HANDLE}{uuid4().hex}", "at": int(time.time() * 1000), **content}


def dataset_records(datasets: Iterable[Dataset]) -> list[dict[str, Any]]:
    """Datasets as events hold them.

    Args:
        datasets: The data.

    Returns:
        A record for each.
    """
    return [{**data._asdict(), "profile": dict(data.profile)} for data in datasets]


def flatten(record: Mapping, prefix: str = "") -> dict[str, Any]:
    """Join nested keys with dots, into names that the store takes, no two of them equal.

    Args:
        record: Mapping of mappings of values.
        prefix: What all names begin with.

    Returns:
        Name -> value.
    """
    flat: dict[str, Any] = {}
    for key, value in record.items():
        nested = isinstance(value, Mapping) and value
        leaves = flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
        for name, leaf in leaves.items():
            parts = re.sub(r"[^/\w.\- :]", "_", name).split("/")
            name = "/".join(part for part in parts if part.strip("."))[:220] or "_"
            while name in flat:
                name += "_"
            flat[name] = leaf
    return flat


def texts(record: Mapping) -> dict[str, str]:
    """Options or tags as the store keeps them.

    Args:
        record: Mapping of mappings of values.

    Returns:
        Name -> text.
    """
    return {k: str(v).encode(errors="replace").decode() for k, v in flatten(record).items()}


def points(values: Mapping[str, Any], step: int | None = None) -> list[list]:
    """Name, finite value and step of each metric; what is not one number is told and left out.

    Args:
        values: Numbers, or tensors and arrays of one number; mappings of these are flattened.
        step: The step that they belong to.

    Returns:
        Points of curves; a value that is not finite is ``<name>_nonfinite`` = 1.
    """
    found = []
    for key, value in flatten(values).items():
        try:
            number = float(value.item() if hasattr(value, "item") else value)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError, RuntimeError):
            warn(f"metric {key!r} not logged: {type(value).__name__} is not one number")
            continue
        point = [key, number] if math.isfinite(number) else [f"{key}_nonfinite", 1.0]
        found.append([*point, None if step is None else int(step)])
    return found


def split_name(filename: str) -> tuple[str | None, str]:
    """Folder and name of an artifact.

    Args:
        filename: Name, with folders before it.

    Returns:
        The folder, None for the uppermost, and the name.

    Raises:
        ValueError: If it leaves the folder of artifacts.
    """
    path = PurePosixPath(filename)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"{filename!r} is not the name of a file below the run's artifacts")
    return (None if path.parent == PurePosixPath() else str(path.parent)), path.name


def without_password(text: str) -> str:
    """Leave out what stands before the @ of an address.

    Args:
        text: Any text.

    Returns:
        The text.
    """
    return re.sub(r"//[^/@\s]*@", "//", text)


def warn(message: str, error: BaseException | None = None) -> None:
    """Say that something was not logged.

    Args:
        message: What.
        error: Why.
    """
    reason = f" ({type(error).__name__}: {error}".splitlines()[0][:400] + ")" if error else ""
    text = without_password(f"tracking: {message}{reason}.")
    warnings.warn(text, RuntimeWarning, stacklevel=2)
