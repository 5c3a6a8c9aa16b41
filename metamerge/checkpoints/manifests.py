"""Manifests: the JSON files beside our tensors that hold checksums and what belongs to them."""

import os
from pathlib import Path
from typing import BinaryIO

from metamerge.checkpoints.opening import display, read_json_object, sha256
from metamerge.errors import Unreadable

MANIFEST_NAME = "manifest.json"
CHECKPOINT_FORMAT = "metamerge-checkpoint-1"
ZOO_FORMAT = "metamerge-zoo-2"


def read_manifest(folder: Path) -> dict | None:
    """Read the manifest of a folder, if it has one of ours.

    Args:
        folder: Folder to look into.

    Returns:
        The manifest, or None where there is none or it belongs to another program.

    Raises:
        Unreadable: If the manifest is damaged or of a version that is not known here.
    """
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        return None
    manifest = read_json_object(path)
    kind = manifest.get("format")
    if not isinstance(kind, str) or not kind.startswith("metamerge-"):
        return None
    if kind not in (CHECKPOINT_FORMAT, ZOO_FORMAT):
        raise Unreadable(
            f"{display(path)}: has format {kind[:50]!r}, known are {CHECKPOINT_FORMAT!r} and "
            f"{ZOO_FORMAT!r}. Make it again with this version, or use the one that made it."
        )
    _check_types(manifest, path)
    return manifest


def verify(file: BinaryIO, path: Path, manifest: dict | None) -> bool:
    """Compare the checksum of an open file with its manifest.

    Args:
        file: Open file; afterwards it stands at its start.
        path: Path of the file, to find its entry and for messages.
        manifest: Manifest of its folder, or None.

    Returns:
        True if the checksum agrees, False if there is none to compare with.

    Raises:
        Unreadable: If the checksums differ.
    """
    entry = manifest["files"].get(path.name) if manifest else None
    if entry is None:
        return False
    found = sha256(file)
    if found != entry.get("sha256"):
        raise Unreadable(
            f"{display(path)}: has sha256 {found}, {MANIFEST_NAME} beside it says "
            f"{entry.get('sha256')}. The file is damaged or was replaced: get both again."
        )
    return True


def _check_types(manifest: dict, path: Path) -> None:
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(e, dict) for e in files.values()):
        raise Unreadable(f"{display(path)}: 'files' must map names to objects. Write it again.")
    if manifest["format"] == ZOO_FORMAT and not isinstance(manifest.get("groups"), dict):
        raise Unreadable(f"{display(path)}: 'groups' must be an object. Build the zoo again.")
    if not isinstance(manifest.get("program"), dict | None):
        raise Unreadable(f"{display(path)}: 'program' must be an object or null. Write it again.")
    if not isinstance(manifest.get("metadata", {}), dict):
        raise Unreadable(f"{display(path)}: 'metadata' must be an object. Write it again.")
