"""Files that are there whole or not at all: written aside, synced, then renamed."""

import json
import os
import secrets
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from metamerge.checkpoints.writing import sync
from metamerge.errors import ZooError
from metamerge.weights import Weights

UNFINISHED = ".unfinished-"  # how the names of files that are still being written begin


def write_tensors(folder: Path, stem: str, tensors: Weights) -> dict[str, Any]:
    """Write tensors into a file that is named by its content.

    Args:
        folder: Where it shall lie.
        stem: How its name begins.
        tensors: What it holds.

    Returns:
        ``file``, its name, and ``sha256``.

    Raises:
        OSError: If it cannot be written; nothing of it is then left.
    """
    content = save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()})
    digest = sha256(content).hexdigest()
    name = f"{stem}-{digest[:16]}.safetensors"
    write_bytes(folder / name, content)
    return {"file": name, "sha256": digest}


def write_json(path: Path, content: Any) -> str:
    """Write JSON, always in the same order.

    Args:
        path: Where.
        content: What.

    Returns:
        The text.

    Raises:
        OSError: If it cannot be written; the path is then as it was.
    """
    text = json.dumps(content, sort_keys=True)
    write_bytes(path, text.encode())
    return text


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, or replace it, in one step.

    Args:
        path: Where.
        content: What.

    Raises:
        OSError: If it cannot be written; the path is then as it was.
    """
    unfinished = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


def read_tensors(folder: Path, entry: dict[str, Any]) -> Weights:
    """Read a file of tensors, checked against its checksum.

    Args:
        folder: Where it lies.
        entry: ``file`` and ``sha256``.

    Returns:
        Its tensors.

    Raises:
        ZooError: If it is missing or damaged.
    """
    path = folder / entry["file"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ZooError(f"{path}: cannot be read ({error.strerror}). {REPAIR}") from error
    found = sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise ZooError(
            f"{path}: sha256 is {found[:12]}…, the manifest says {entry['sha256'][:12]}…. {REPAIR}"
        )
    try:
        return dict(sorted(load(content).items()))
    except (SafetensorError, KeyError) as error:  # written so by somebody else
        raise ZooError(f"{path}: holds no tensors ({error}). {REPAIR}") from error


REPAIR = "Build the zoo again with the same options: what is damaged is trained anew."


def is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    """Tell whether a file is there and as it was written.

    Args:
        folder: Where it lies.
        entry: ``file`` and ``sha256``.

    Returns:
        Whether its checksum agrees.
    """
    try:
        with (folder / entry["file"]).open("rb") as file:
            return file_digest(file, "sha256").hexdigest() == entry["sha256"]
    except OSError:
        return False
