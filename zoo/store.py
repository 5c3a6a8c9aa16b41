"""The zoo on disk: one safetensors file per part and family size, one manifest, nothing pickled.

A zoo is a folder ``manifest.json`` + ``<part>-k<members>.safetensors`` (every tensor
``[families, members, ...]``). It is written into a temporary folder and renamed, so it is there
whole or not at all; the manifest carries the options that made it, the traced program of its
networks, checksums, and where every member comes from.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metamerge.checkpoints.exchange import exchange
from metamerge.errors import ZooError
from metamerge.structure import Layout, Program, discover_program
from metamerge.weights import Weights

FORMAT = "metamerge-zoo-1"
FAMILY_PARTS = ("train", "validation", "test")
ROWS = "rows.safetensors"
_NEEDED = ("digest", "files", "options", "program", "task")  # of a manifest


@dataclass(frozen=True)
class Zoo:
    """A zoo that was read from disk.

    Attributes:
        folder: Where it lies.
        manifest: Options, program, checksums and provenance.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """The options that it was built with."""
        return self.manifest["options"]

    @property
    def digest(self) -> str:
        """Hash of the options that shape it."""
        return self.manifest["digest"]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of members that its families have."""
        return tuple(self.options["members"])

    @cached_property
    def layout(self) -> Layout:
        """Weight graph of its networks, discovered and proved anew."""
        program = Program.from_json(self.manifest["program"])
        return Layout(program, discover_program(program))

    def families(self, part: str, members: int) -> Weights:
        """All families of one part and size.

        Args:
            part: ``train``, ``validation`` or ``test``.
            members: Members per family.

        Returns:
            Every tensor ``[f, m, ...]``.

        Raises:
            ZooError: If there are none, or the file does not match its checksum.
        """
        entry = self._entry(part, members)
        return _load_verified(self.folder / _file_name(part, members), entry["sha256"])

    def provenance(self, part: str, members: int) -> list[list[dict[str, Any]]]:
        """Where every member comes from: init seed, number of rows, rows per class."""
        return self._entry(part, members)["provenance"]

    def rows(self, part: str, members: int) -> Tensor:
        """Rows of the task that each member was trained on, ``[f, m, longest]``, padded with -1."""
        self._entry(part, members)
        found = _load_verified(self.folder / ROWS, self.manifest.get("rows_sha256"))
        return found[f"{part}-k{members}"]

    def _entry(self, part: str, members: int) -> dict[str, Any]:
        name = _file_name(part, members)
        entry = self.manifest["files"].get(name)
        if entry is None:
            known = sorted(self.manifest["files"])
            raise ZooError(f"{self.folder}: no families {name!r}; there are {known}.")
        return entry

    def address(self, part: str, members: int, family: int) -> str:
        """What ``metamerge.merge`` takes to merge one family."""
        return f"{self.folder}#{part}-k{members}/{family}"


def load_zoo(folder: str | os.PathLike[str]) -> Zoo:
    """Open a zoo.

    Args:
        folder: Its folder.

    Returns:
        The zoo; weights are read when they are asked for.

    Raises:
        ZooError: If the folder holds no zoo.
    """
    manifest = read_manifest(Path(folder))
    if manifest is None:
        raise ZooError(
            f"{folder}: no zoo here (no readable manifest.json of format {FORMAT!r}). Build one "
            f"with `python -m zoo.build --out {folder}`."
        )
    return Zoo(Path(folder), manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a zoo, or None where there is no readable one."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return manifest if ours and all(name in manifest for name in _NEEDED) else None


def check_place(folder: Path) -> None:
    """Refuse a place where a zoo must not be written, before any work is done for it.

    Args:
        folder: Where the zoo shall lie.

    Raises:
        ZooError: If it is a file, or a folder that holds something other than a zoo.
    """
    if folder.exists() and not folder.is_dir():
        raise ZooError(f"{folder} is a file. Choose another folder with --out.")
    if folder.exists() and any(folder.iterdir()) and read_manifest(folder) is None:
        raise ZooError(f"{folder} is not empty and holds no zoo. Choose another folder with --out.")


def write_zoo(
    folder: Path,
    files: Mapping[str, tuple[Weights, list[list[dict[str, Any]]]]],
    rows: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
) -> Zoo:
    """Write a zoo as a whole, replacing an older one only when the new one is complete.

    Args:
        folder: Where it shall lie.
        files: Stem -> stacked families ``[f, m, ...]`` and their provenance.
        rows: Stem -> rows of the task that each member was trained on, ``[f, m, longest]``, padded
            with -1.
        manifest: Options, program and digest.

    Returns:
        The zoo.

    Raises:
        ZooError: If the folder exists and holds something else, or cannot be written.
    """
    check_place(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ZooError(f"{folder} cannot be written: {error}.") from error
    try:
        entries = {}
        for stem, (weights, provenance) in files.items():
            name = f"{stem}.safetensors"
            _write_tensors(temporary / name, weights)
            families, members = next(iter(weights.values())).shape[:2]
            entries[name] = {
                "sha256": _sha256(temporary / name),
                "families": families,
                "members": members,
                "provenance": provenance,
            }
        _write_tensors(temporary / ROWS, dict(rows))
        digest = _sha256(temporary / ROWS)
        complete = {"format": FORMAT, **manifest, "files": entries, "rows_sha256": digest}
        text = json.dumps(complete, sort_keys=True)
        _write_text(temporary / "manifest.json", text)
        temporary.chmod(0o777 & ~_umask())
        _swap(temporary, folder)
    except OSError as error:
        raise ZooError(f"{folder} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Zoo(folder, json.loads(text))  # as every later reader finds it


def _swap(temporary: Path, folder: Path) -> None:
    """Give the finished folder its name; the temporary one is then gone or is the old zoo."""
    if folder.exists():
        exchange(temporary, folder)
    else:
        os.rename(temporary, folder)


def _write_tensors(path: Path, tensors: Weights) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.chmod(0o666 & ~_umask())


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _file_name(part: str, members: int) -> str:
    return f"{part}-k{members}.safetensors"


def _load_verified(path: Path, expected: str | None) -> Weights:
    found = _sha256(path)
    if expected not in (None, found):  # zoos from before there was a checksum of rows have None
        raise ZooError(
            f"{path}: sha256 is {found[:12]}…, the manifest says {expected[:12]}…. Delete the zoo "
            "and build it again."
        )
    return load_file(path)


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ZooError(f"{path} is missing. Delete the zoo and build it again.")
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def pad_rows(rows: list[Tensor], families: int, members: int) -> Tensor:
    """Row numbers of unequal segments in one tensor, padded with -1.

    Args:
        rows: One tensor per member, family after family.
        families: Number of families.
        members: Members per family.

    Returns:
        int32 ``[families, members, longest]``.
    """
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return padded.int().reshape(families, members, -1)
