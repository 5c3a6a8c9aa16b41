"""Read the checkpoint of a folder: one file, or the shards that an index lists."""

import os
from pathlib import Path

from metamerge.checkpoints.checkpoint import Checkpoint
from metamerge.checkpoints.files import read_file
from metamerge.checkpoints.manifests import CHECKPOINT_FORMAT, ZOO_FORMAT, read_manifest
from metamerge.checkpoints.opening import display
from metamerge.checkpoints.shards import INDEX_SUFFIX, read_sharded
from metamerge.errors import Unreadable

SINGLE_NAME = "model.safetensors"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".pt2", ".bin", ".ckpt", ".dat")


def read_folder(folder: Path, max_bytes: int) -> Checkpoint:
    """Read the one checkpoint that a folder holds.

    Args:
        folder: Folder to look into; folders below it are left alone.
        max_bytes: Largest number of tensor bytes.

    Returns:
        The checkpoint.

    Raises:
        Unreadable: If the folder holds no checkpoint or several, or is a zoo.
        CheckpointError: If the checkpoint cannot be read safely and in full.
        IncompatibleWeights: If a tensor cannot be merged.
    """
    path = find_checkpoint(folder)
    if path.name.endswith(INDEX_SUFFIX):
        return read_sharded(path, max_bytes)
    return read_file(path, max_bytes)


def find_checkpoint(folder: Path) -> Path:
    """Find the one checkpoint that a folder holds.

    An index of shards comes first, then ``model.safetensors``, then the only file with the ending
    of a checkpoint.

    Args:
        folder: Folder to look into; folders below it are left alone.

    Returns:
        Path of the file, or of the index of shards.

    Raises:
        Unreadable: If the folder holds no checkpoint or several, or is a zoo.
    """
    _check_manifest(folder)
    names = _names(folder)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        return folder / indexes[0]
    files = [name for name in names if Path(name).suffix.lower() in _SUFFIXES]
    if SINGLE_NAME in files and not indexes:
        return folder / SINGLE_NAME
    choices = indexes + files
    if not choices:
        raise Unreadable(f"{display(folder)}: holds no checkpoint ({', '.join(_SUFFIXES)}).")
    if len(choices) > 1:
        listed = ", ".join(display(name) for name in choices[:10])
        raise Unreadable(
            f"{display(folder)}: holds {len(choices)} checkpoint files ({listed}). Give one file."
        )
    return folder / choices[0]


def _check_manifest(folder: Path) -> None:
    """Check that the folder is not a zoo and that nothing of a checkpoint of ours is missing."""
    manifest = read_manifest(folder)
    if manifest and manifest["format"] == ZOO_FORMAT:
        known = sorted(manifest["groups"])[:10]
        raise Unreadable(
            f"{display(folder)}: is a zoo. Address a family as {display(folder)}#<group>/<family>, "
            f"with <group> one of {known}."
        )
    if manifest and manifest["format"] == CHECKPOINT_FORMAT:
        missing = [name for name in manifest["files"] if not os.path.lexists(folder / name)]
        if missing:
            raise Unreadable(f"{display(folder)}: its manifest lists {missing[:10]}, not found.")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise Unreadable(f"{display(folder)}: cannot be listed ({error.strerror}).") from None
