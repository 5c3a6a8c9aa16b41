"""Read one checkpoint file, whatever its name: its content decides how."""

from pathlib import Path
from typing import BinaryIO

from metamerge.checkpoints.checkpoint import Checkpoint
from metamerge.checkpoints.manifests import ZOO_FORMAT, read_manifest, verify
from metamerge.checkpoints.opening import display, file_size, open_regular
from metamerge.checkpoints.safetensors_files import read_header, read_tensor
from metamerge.checkpoints.torch_files import LEGACY_MAGIC, ZIP_MAGIC, read_torch_file
from metamerge.errors import Unreadable, Unsafe
from metamerge.weights import Weights

_LFS = b"version https://git-lfs"


def read_file(path: Path, max_bytes: int) -> Checkpoint:
    """Read one file; where a manifest of ours lists it, its checksum is compared.

    Args:
        path: A safetensors file or one of torch.save.
        max_bytes: Largest number of tensor bytes.

    Returns:
        The checkpoint, with the program and metadata of the manifest or, without one, the
        metadata of the file.

    Raises:
        Unreadable: If it is not a checkpoint, contradicts its manifest, or belongs to a zoo.
        CheckpointError: If it cannot be read safely and in full.
        IncompatibleWeights: If a tensor cannot be merged.
    """
    name = display(path)
    with open_regular(path) as file:
        manifest = read_manifest(path.parent)
        if manifest and manifest["format"] == ZOO_FORMAT and path.name in manifest["files"]:
            raise Unreadable(
                f"{name}: holds families of a zoo. Address one as "
                f"{display(path.parent)}#{path.stem}/<family> or .../<family>/<member>."
            )
        refuse_placeholder(file, name)
        verified = verify(file, path, manifest)
        weights, metadata = _read_content(file, path, name, max_bytes)
    if not verified:
        return Checkpoint(name, weights, metadata=metadata)
    return Checkpoint(name, weights, manifest.get("program"), manifest.get("metadata", {}), True)


def refuse_placeholder(file: BinaryIO, name: str) -> None:
    """Refuse files that stand for one that was never downloaded.

    Args:
        file: Open file that stands at its start.
        name: What messages call it.

    Raises:
        Unreadable: If it is empty or a Git LFS pointer.
    """
    start = file.read(len(_LFS))
    if not start:
        raise Unreadable(f"{name}: is empty. Download or copy it again.")
    if start == _LFS:
        raise Unreadable(f"{name}: is a Git LFS pointer, not the file itself. Run git lfs pull.")


def _read_content(file: BinaryIO, path: Path, name: str, max_bytes: int) -> tuple[Weights, dict]:
    """Tell safetensors from torch files by their first bytes and read them."""
    file.seek(0)
    start = file.read(64)
    named_safetensors = path.suffix.lower() == ".safetensors"
    is_safetensors = _is_safetensors(start, file_size(file))
    if start.startswith((ZIP_MAGIC, LEGACY_MAGIC)) and not named_safetensors:
        return read_torch_file(file, name, max_bytes), {}
    if start.startswith((ZIP_MAGIC, LEGACY_MAGIC)) or (_is_pickle(start) and not is_safetensors):
        raise Unsafe(
            f"{name}: holds a Python pickle"
            f"{' under the name of a safetensors file' if named_safetensors else ''}, which could "
            f"run code. Give a safetensors file, or a state dict saved by torch.save as .pt."
        )
    if not named_safetensors and not is_safetensors:
        raise Unreadable(
            f"{name}: is neither a safetensors file nor one of torch.save. Check what it is."
        )
    header = read_header(file, name, max_bytes)
    weights = {key: read_tensor(file, entry, name) for key, entry in header.entries.items()}
    return weights, header.metadata


def _is_pickle(start: bytes) -> bool:
    """Tell whether bytes could begin a pickle of protocol 2 or later."""
    return start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def _is_safetensors(start: bytes, size: int) -> bool:
    length = int.from_bytes(start[:8], "little")
    return len(start) > 8 and start[8:9] == b"{" and length <= size - 8
