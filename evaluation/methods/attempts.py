"""Trying a row of a long comparison: one method that fails must not end the comparison of all."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from metamerge.errors import ConfigError


def attempted(score: Callable[[], Mapping[str, Any]], data: str, limit: int) -> dict[str, Any]:
    """Make a row, or say what went wrong.

    Args:
        score: Makes it.
        data: What it is given: ``none``, or ``unlabelled`` or ``labelled``, with or without ``:n``.
        limit: Seconds after which it is given up.

    Returns:
        The row; or ``refused``, where a method does not do without labels, or ``error``.
    """
    try:
        with _at_most(limit):
            return dict(score())
    except ConfigError as error:
        lacks_labels = data.startswith("unlabelled") and "label" in str(error)
        return {"refused" if lacks_labels else "error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` in the body after that many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"given up after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
