"""A zoo in the making: shards are kept one by one, and the zoo appears when all are there.

The shards lie in a hidden folder beside the place of the zoo. A builder that is killed, or that
runs out of disk, finds the shards that were whole when it comes back; the last step gives the
folder its name.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from metamerge.checkpoints.exchange import exchange
from metamerge.checkpoints.writing import sync
from metamerge.errors import ZooError
from metamerge.weights import Weights
from zoo.files import UNFINISHED, is_whole, write_bytes, write_json, write_tensors
from zoo.store import FORMAT, KINDS, Zoo, files_of, read_manifest

_JOURNAL = "shard-"


class Building:
    """The folder in which the shards of one zoo gather.

    Args:
        target: Where the zoo shall lie.
        digest: Hash of the options that shape it; builders with other options do not meet here.
    """

    def __init__(self, target: Path, digest: str) -> None:
        target = target.resolve()  # a link to another disk stays one
        self.target, self.digest = target, digest
        self.folder = target.with_name(f".{target.name}.{digest}.building")

    def open(self) -> dict[str, dict[str, Any]]:
        """Make the folder, or find what is there already, and drop what is not whole.

        Returns:
            Key of a shard -> its entry in the manifest.

        Raises:
            ZooError: If the folder cannot be written.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(f"{UNFINISHED}*"):
                path.unlink(missing_ok=True)
        found = self.shards()
        whole = {
            key: shard
            for key, shard in found.items()
            if all(is_whole(self.folder, shard[kind]) for kind in KINDS if kind in shard)
        }
        with self._writing():
            for path in self.folder.glob(f"{_JOURNAL}*.json"):
                if path.stem.removeprefix(_JOURNAL) not in whole:
                    path.unlink(missing_ok=True)
            for key, shard in whole.items():
                if not self._journal(key).exists():
                    write_json(self._journal(key), shard)
            (self.folder / "manifest.json").unlink(missing_ok=True)  # the journal says it all
        return whole

    def shards(self) -> dict[str, dict[str, Any]]:
        """Entries of the shards that were finished here, by key."""
        manifest = read_manifest(self.folder) or {"groups": {}}  # killed on its very last steps
        groups = manifest["groups"].values()
        found = {shard["key"]: shard for group in groups for shard in group["shards"]}
        for path in self.folder.glob(f"{_JOURNAL}*.json"):
            with contextlib.suppress(OSError, ValueError):  # one that cannot be read is no shard
                entry = json.loads(path.read_text())
                if self._is_entry(entry, path):
                    found[entry["key"]] = entry
        return found

    def _is_entry(self, entry: Any, path: Path) -> bool:
        """Tell whether a file of the journal says what a finished shard would."""
        known = isinstance(entry, dict) and isinstance(entry.get("weights"), dict)
        return known and self._journal(str(entry.get("key"))) == path

    def take(self, zoo: Zoo) -> None:
        """Go on from a zoo: its shards that are whole need not be trained again.

        Args:
            zoo: A zoo with the same networks, whose folder is left as it is.

        Raises:
            ZooError: If the folder cannot be written.
        """
        for group in zoo.groups.values():
            for shard in group["shards"]:
                entries = [shard[kind] for kind in KINDS if kind in shard]
                if not all(is_whole(zoo.folder, entry) for entry in entries):
                    continue
                with self._writing():
                    for entry in entries:
                        _link(zoo.folder / entry["file"], self.folder / entry["file"])
                    write_json(self._journal(shard["key"]), shard)

    def add(self, key: str, tensors: Mapping[str, Weights], **told: Any) -> None:
        """Keep one shard.

        Args:
            key: What it is found by when the building goes on.
            tensors: ``weights``, ``records`` and perhaps ``snapshots``, each ``[f, m, ...]``.
            **told: What else the manifest shall say of it.

        Raises:
            ZooError: If it cannot be written.
        """
        with self._writing():
            entries = {
                kind: write_tensors(self.folder, kind, tensors[kind])
                for kind in KINDS
                if tensors.get(kind)
            }
            families = len(next(iter(tensors["weights"].values())))
            write_json(self._journal(key), {"key": key, "families": families, **told, **entries})

    def finish(self, shards: Mapping[str, Sequence[str]], manifest: Mapping[str, Any]) -> Zoo:
        """Give the finished zoo its name, replacing an older one in one step.

        Args:
            shards: Name of a group of families -> keys of its shards, in their order.
            manifest: What the manifest says besides.

        Returns:
            The zoo.

        Raises:
            ZooError: If it cannot be written.
        """
        found = self.shards()
        groups = {name: _group(name, [found[key] for key in keys]) for name, keys in shards.items()}
        files = {entry["file"]: {"sha256": entry["sha256"]} for entry in files_of(groups)}
        with self._writing():
            text = write_json(
                self.folder / "manifest.json",
                {"format": FORMAT, **manifest, "groups": groups, "files": files},
            )
            for path in self.folder.iterdir():
                if path.name != "manifest.json" and path.name not in files:
                    path.unlink()
            sync(self.folder)
            if self.target.exists():
                exchange(self.folder, self.target)
            else:
                os.rename(self.folder, self.target)
            sync(self.target.parent)
            self.discard()  # the older zoo
        return Zoo(self.target, json.loads(text))  # as every later reader finds it

    def discard(self) -> None:
        """Delete the folder: what an older build left after its last step."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _journal(self, key: str) -> Path:
        return self.folder / f"{_JOURNAL}{key}.json"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = len(self.shards())
            raise ZooError(
                f"{error.filename or self.folder}: cannot be written ({error.strerror}). "
                f"{kept} finished shards are kept in {self.folder}: make room and run the same "
                "command again, or delete that folder."
            ) from error


def _group(name: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """A group of families as the manifest has it."""
    return {
        "part": name.rpartition("-k")[0],
        "members": shards[0]["members"],
        "families": sum(shard["families"] for shard in shards),
        "shards": shards,
    }


def _link(source: Path, target: Path) -> None:
    """The same file in two folders, or a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        write_bytes(target, source.read_bytes())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One builder at a time for a folder; the lock lies beside it.

    Args:
        folder: Where the zoo shall lie.

    Yields:
        Nothing, once every other builder is done.

    Raises:
        ZooError: If the lock cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise ZooError(f"{folder} cannot be written: {error}. Choose another --out.") from error
    try:
        yield
    finally:
        lock.release()


def check_place(folder: Path) -> None:
    """Refuse a place where a zoo must not be written, before any work is done for it.

    Args:
        folder: Where the zoo shall lie.

    Raises:
        ZooError: If it is a file, or a folder that holds something other than a zoo.
    """
    if folder.name in ("", ".."):
        raise ZooError(f"{folder} cannot be replaced. Choose another folder with --out.")
    if folder.exists() and not folder.is_dir():
        raise ZooError(f"{folder} is a file. Choose another folder with --out.")
    if folder.exists() and any(folder.iterdir()) and read_manifest(folder) is None:
        raise ZooError(f"{folder} is not empty and holds no zoo. Choose another folder with --out.")
