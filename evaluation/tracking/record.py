"""The record of a run whose store does not answer: events line by line, artifacts beside them.

``<folder>/<event id of the run>/`` holds ``events.jsonl``, which only grows, ``artifacts/`` and,
once something was uploaded, ``uploaded.json``. A line that a kill cut short is not read.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from evaluation.tracking.events import Event, event
from evaluation.tracking.processes import is_gone

EVENTS, UPLOADED = "events.jsonl", "uploaded.json"


class Record:
    """Events of one run in a folder.

    Args:
        folder: Its folder; made with the first event.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def add(self, happened: Event) -> None:
        """Append an event; files that it names are copied, and found again by ``files_of``.

        Args:
            happened: The event.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if "path" in happened:
            source = Path(happened["path"])
            inside = Path("artifacts", happened["id"], source.name)
            (self.folder / inside).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, self.folder / inside, dirs_exist_ok=True)
            else:
                shutil.copy2(source, self.folder / inside)
            happened = {**happened, "path": str(inside)}
        with (self.folder / EVENTS).open("ab+") as lines:
            lines.seek(max(lines.tell() - 1, 0))
            cut = lines.read(1) not in (b"\n", b"")  # by a kill: it must not swallow the next one
            lines.write(b"\n" * cut + json.dumps(happened).encode() + b"\n")

    def events(self) -> list[Event]:
        """All events in order, paths of their files made absolute."""
        found = []
        for text in (self.folder / EVENTS).read_text(encoding="utf-8").splitlines():
            try:
                happened = json.loads(text)
            except ValueError:
                continue
            if "path" in happened:
                happened["path"] = str(self.folder.absolute() / happened["path"])
            found.append(happened)
        return found

    def uploaded(self) -> tuple[int, str | None]:
        """How many events a store has, and the run's id there."""
        try:
            told = json.loads((self.folder / UPLOADED).read_text())
        except (OSError, ValueError):
            return 0, None
        return told["events"], told["run"]

    def mark(self, events: int, run: str) -> None:
        """Note what the store has.

        Args:
            events: Number of events.
            run: The run's id.
        """
        partial = self.folder / f".{UPLOADED}.partial"
        partial.write_text(json.dumps({"events": events, "run": run}) + "\n")
        os.replace(partial, self.folder / UPLOADED)

    def lock(self) -> FileLock:
        """Held by who uploads."""
        return FileLock(self.folder / ".lock", timeout=60)

    def close_if_gone(self) -> None:
        """Append the end of a run whose process was killed before it could."""
        told = self.events()
        starts = [one for one in told if one["do"] == "start"]
        if told[-1]["do"] != "end" and is_gone(starts[-1]["process"]):
            self.add({**event("end", status="KILLED", tags={}), "at": told[-1]["at"]})


def records(folders: Sequence[str | os.PathLike[str]]) -> Iterator[Record]:
    """Find records.

    Args:
        folders: Where to look, also in the folders below.

    Yields:
        Records, oldest first in each folder.
    """
    for folder in folders:
        found = [Record(path.parent) for path in Path(folder).rglob(EVENTS)]
        yield from sorted(
            (record for record in found if record.events()), key=lambda r: r.events()[0]["at"]
        )
