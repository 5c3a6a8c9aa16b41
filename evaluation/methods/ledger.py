"""Finished rows of a long comparison, kept line by line: the same command goes on where it was."""

import json
from collections.abc import Mapping
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
    """

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.path, self.digest = path, digest_of(options)
        path.parent.mkdir(parents=True, exist_ok=True)
        # a line that was cut short must not swallow the next one
        self._gap = "\n" if path.exists() and not path.read_text().endswith("\n") else ""
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
