"""Finished rows of a long comparison, kept line by line: the same command goes on where it was."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any


class Ledger:
    """A file of JSON lines, each the row of one key and of the options it was made with.

    A line that a kill cut short is left out when the file is read; its row is made again.

    Args:
        path: The file; its folder is made if missing.
        options: Everything that decides what rows hold. Rows of other options stay in the file
            and are not seen.
        into: File that new rows go to; the same if None. Processes that fill one ledger have a
            file each, which ``gathered`` joins.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, into: Path | None = None) -> None:
        self.path, self.digest = into or path, digest_of(options)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._gap = _gap(self.path)
        self.rows = {
            line["key"]: line["row"] for line in _lines(path) if line["digest"] == self.digest
        }

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a finished row, on disk before this returns.

        Args:
            key: Which row it is.
            row: What JSON can hold.
        """
        line = json.dumps({"key": key, "digest": self.digest, "row": dict(row)})
        with self.path.open("a") as file:
            file.write(f"{self._gap}{line}\n")
        self._gap = ""
        self.rows[key] = json.loads(line)["row"]


def gathered(path: Path, parts: Sequence[Path]) -> None:
    """Append what processes wrote to a ledger, and delete their files.

    Args:
        path: The ledger's file.
        parts: Files beside it; those that are not there are passed over.
    """
    for part in filter(Path.exists, parts):
        with path.open("a") as file:
            file.write(_gap(path) + part.read_text())
        part.unlink()


def _gap(path: Path) -> str:
    """What has to stand before the next line: one that was cut short must not swallow it."""
    text = path.read_text() if path.exists() else ""
    return "\n" if text and not text.endswith("\n") else ""


def digest_of(options: Mapping[str, Any]) -> str:
    """Hash of options.

    Args:
        options: What JSON can hold.

    Returns:
        16 hexadecimal digits.
    """
    return sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"key", "digest", "row"} <= line.keys():
            found.append(line)
    return found
