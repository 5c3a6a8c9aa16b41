"""The zoo on disk: families of checkpoints in safetensors shards, one manifest, nothing pickled.

A zoo is a folder with ``manifest.json`` and, per shard, ``weights-<content>.safetensors`` (every
tensor ``[families, members, ...]``), ``records-<content>.safetensors`` (where every member comes
from) and, where they were asked for, ``snapshots-<content>.safetensors`` (weights on the way).
Families come in groups ``<part>-k<members>``. The manifest carries the options that made the zoo,
the traced program of its networks and all checksums; ``zoo.writing`` writes them.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metamerge.checkpoints.manifests import ZOO_FORMAT as FORMAT
from metamerge.checkpoints.zoo_members import is_told
from metamerge.errors import ZooError
from metamerge.structure import Layout, Program, discover_program
from metamerge.weights import Weights
from zoo.files import read_tensors

FAMILY_PARTS = ("train", "validation", "test")
KINDS = ("weights", "records", "snapshots")  # files of a shard
SEGMENT = "segment"  # record: rows of the task, padded with -1
_NEEDED = ("digest", "groups", "options", "program", "task")  # of a manifest


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
    def groups(self) -> dict[str, dict[str, Any]]:
        """Name of a group of families -> its ``part``, ``families``, ``members`` and shards."""
        return self.manifest["groups"]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of members that its families have."""
        return tuple(sorted({group["members"] for group in self.groups.values()}))

    @cached_property
    def layout(self) -> Layout:
        """Weight graph of its networks, discovered and proved anew.

        Raises:
            ZooError: If nobody told which architecture they have.
        """
        if self.manifest["program"] is None:
            raise ZooError(
                f"{self.folder}: the architecture of these networks is not known. Adopt them anew "
                "with --architecture, --shape and --outputs, or pass model= to merge()."
            )
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
            ZooError: If there are none, or a file does not match its checksum.
        """
        return self._read(part, members, "weights")

    def records(self, part: str, members: int) -> Weights:
        """Where members come from, as tensors ``[f, m, ...]``.

        Args:
            part: ``train``, ``validation`` or ``test``.
            members: Members per family.

        Returns:
            ``init_seed``, ``rows``, ``rows_per_class``, ``steps``, ``losses`` and more.

        Raises:
            ZooError: If there are none, or a file does not match its checksum.
        """
        return self._read(part, members, "records")

    def snapshots(self, part: str, members: int) -> Weights:
        """Weights on the way, ``[f, m, s, ...]``.

        Args:
            part: ``train``, ``validation`` or ``test``.
            members: Members per family.

        Returns:
            One entry per tensor; without entries where none were kept.

        Raises:
            ZooError: If there are no such families, or a file does not match its checksum.
        """
        return self._read(part, members, "snapshots")

    def rows(self, part: str, members: int) -> Tensor:
        """Rows of the task that each member was trained on, ``[f, m, longest]``, padded with -1."""
        records = self.records(part, members)
        if SEGMENT not in records:
            raise ZooError(f"{self.folder}: nobody recorded which rows these members learned from.")
        return records[SEGMENT]

    def provenance(self, part: str, members: int) -> list[list[dict[str, Any]]]:
        """Where every member comes from: init seed, number of rows, rows per class and more."""
        records = self.records(part, members)
        told = {key: t for key, t in records.items() if is_told(key, t.ndim)}
        group = self.group(part, members)
        return [
            [
                {key: tensor[family, member].tolist() for key, tensor in told.items()}
                for member in range(members)
            ]
            for family in range(group["families"])
        ]

    def address(self, part: str, members: int, family: int) -> str:
        """What ``metamerge.merge`` takes to merge one family."""
        return f"{self.folder}#{group_name(part, members)}/{family}"

    def group(self, part: str, members: int) -> dict[str, Any]:
        """The families of one part and size: their number and their shards.

        Args:
            part: ``train``, ``validation`` or ``test``.
            members: Members per family.

        Returns:
            The group's entry in the manifest.

        Raises:
            ZooError: If there are none.
        """
        name = group_name(part, members)
        if name not in self.groups:
            raise ZooError(f"{self.folder}: no families {name!r}; there are {sorted(self.groups)}.")
        return self.groups[name]

    def _read(self, part: str, members: int, kind: str) -> Weights:
        shards = self.group(part, members)["shards"]
        return _joined([read_tensors(self.folder, s[kind]) for s in shards if kind in s])


def group_name(part: str, members: int) -> str:
    """Name of a group of families, as addresses have it."""
    return f"{part}-k{members}"


def files_of(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """All files that groups of families consist of.

    Args:
        groups: ``groups`` of a manifest.

    Yields:
        ``file`` and ``sha256`` of each.
    """
    for group in groups.values():
        for shard in group["shards"]:
            yield from (shard[kind] for kind in KINDS if kind in shard)


def _joined(shards: list[Weights]) -> Weights:
    """Shards as one; shorter rows and curves are padded with -1 and NaN."""
    if len(shards) < 2:
        return shards[0] if shards else {}
    joined = {}
    for key, first in shards[0].items():
        parts = [shard[key] for shard in shards]
        shape = [max(sizes) for sizes in zip(*(t.shape for t in parts), strict=True)]
        shape[0] = sum(len(t) for t in parts)
        room = first.new_full(shape, torch.nan if first.is_floating_point() else -1)
        start = 0
        for tensor in parts:
            room[(slice(start, start + len(tensor)), *map(slice, tensor.shape[1:]))] = tensor
            start += len(tensor)
        joined[key] = room
    return joined


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
    """The manifest of a zoo, or None where there is no readable one.

    Args:
        folder: Where it should lie.

    Returns:
        What it says.

    Raises:
        ZooError: If it is a zoo of another version.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    told = manifest.get("format") if isinstance(manifest, dict) else None
    if told != FORMAT and isinstance(told, str) and re.fullmatch(r"metamerge-zoo-\d+", told):
        raise ZooError(
            f"{folder} is a zoo of format {told!r}, this version has {FORMAT!r}. Build it again "
            "in another folder, or delete it."
        )
    return manifest if told == FORMAT and all(name in manifest for name in _NEEDED) else None
