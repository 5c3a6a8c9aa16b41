"""Open files that others wrote without hanging, and read small JSON files with a limit."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from metamerge.errors import TooLarge, Unreadable

MAX_JSON_BYTES = 64 * 2**20
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def display(path: str | os.PathLike) -> str:
    """Write a path on one line, also where it holds newlines or undecodable bytes.

    Args:
        path: Path to show in a message.

    Returns:
        The path itself, or its quoted form if it cannot be printed as it is.
    """
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; pipes, devices and folders are refused without waiting.

    Args:
        path: File to open.

    Yields:
        The open file. Errors of the operating system while it is read become ``Unreadable``.

    Raises:
        Unreadable: If the file is missing, not a regular file, or may not be read.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "the path is not valid"
        raise Unreadable(
            f"{display(path)}: cannot be opened ({reason}). Check the path and its permissions."
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable(
            f"{display(path)}: is a folder, pipe or device, not a file. Give a regular file."
        )
    with open(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise Unreadable(f"{display(path)}: reading failed ({error.strerror}).") from error


def file_size(file: BinaryIO) -> int:
    """Measure an open file.

    Args:
        file: File that was opened by ``open_regular``.

    Returns:
        Its size in bytes at this moment.
    """
    return os.fstat(file.fileno()).st_size


def sha256(file: BinaryIO) -> str:
    """Hash a whole open file and go back to its start.

    Args:
        file: File that was opened by ``open_regular``.

    Returns:
        The checksum as hexadecimal digits.
    """
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def read_json_object(path: Path) -> dict:
    """Read a JSON file whose top level is an object.

    Args:
        path: File to read; at most 64 MiB.

    Returns:
        The object as a dict.

    Raises:
        TooLarge: If the file is larger than 64 MiB.
        Unreadable: If it cannot be opened, is not JSON, repeats a key or is not an object.
    """
    with open_regular(path) as file:
        if file_size(file) > MAX_JSON_BYTES:
            raise TooLarge(
                f"{display(path)}: is larger than {MAX_JSON_BYTES} bytes, which no index or "
                f"manifest needs. Check what this file is."
            )
        return parse_json_object(file.read(MAX_JSON_BYTES), display(path))


def parse_json_object(text: bytes, where: str) -> dict:
    """Parse JSON strictly: UTF-8, one object, no key twice.

    Args:
        text: Bytes of the document.
        where: File and part that the bytes come from, for messages.

    Returns:
        The object as a dict.

    Raises:
        Unreadable: If the bytes are anything else.
    """
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Unreadable(f"{where}: is not valid JSON ({reason}). Export the file again.") from None
    if not isinstance(document, dict):
        raise Unreadable(f"{where}: expected a JSON object, got a {type(document).__name__}.")
    return document


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    unique = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key {key[:100]!r} appears twice")
        unique[key] = value
    return unique
