"""Write checkpoints whole or not at all.

Everything is written and synced in a new folder beside the target, which takes the target's place
in one step. A process that is killed leaves the old folder or the new one, complete, and at worst
a hidden folder ``.<name>.<random>.partial`` that can be deleted.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from metamerge.checkpoints.exchange import exchange
from metamerge.checkpoints.manifests import (
    CHECKPOINT_FORMAT,
    MANIFEST_NAME,
    ZOO_FORMAT,
    read_manifest,
)
from metamerge.checkpoints.opening import display, open_regular, sha256
from metamerge.checkpoints.plain import plain_weights
from metamerge.errors import CheckpointError, ConfigError, IncompatibleWeights
from metamerge.weights import Weights

WEIGHTS_NAME = "model.safetensors"


def save_checkpoint(
    weights: Weights,
    folder: str | os.PathLike,
    *,
    metadata: dict | None = None,
    program: dict | None = None,
    overwrite: bool = False,
) -> Path:
    """Write weights into a folder of their own: ``model.safetensors`` and ``manifest.json``.

    The same arguments give the same bytes. Tensors that share memory are written out each.

    Args:
        weights: Weights to write.
        folder: Target; made if missing, with its parents.
        metadata: What to record about them; must be JSON.
        program: JSON graph of the network, for readers that have no module.
        overwrite: Whether a checkpoint that was written here before may be replaced. The old one
            stays in place until the new one is complete.

    Returns:
        The path of the folder.

    Raises:
        ConfigError: If the target may not be written, or metadata or program are not JSON.
        IncompatibleWeights: If there are no tensors, or one cannot be stored.
        OSError: If the disk is full or read-only; the target is then as it was before.
    """
    target = check_output(folder, overwrite=overwrite)
    tensors = _storable(weights)
    _manifest({}, metadata or {}, program)  # fails before anything is written
    with whole_folder(target, overwrite=overwrite) as partial:
        digest = _write_tensors(tensors, partial / WEIGHTS_NAME)
        write_manifest(partial, {WEIGHTS_NAME: digest}, metadata=metadata or {}, program=program)
    return target


@contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Fill a new folder that takes the target's place at the end, or vanishes with an error.

    Args:
        target: Folder, as ``check_output`` returned it; made with its parents.
        overwrite: Whether it may take the place of a folder that is not empty.

    Yields:
        The folder to write files into, each of which has to be synced.

    Raises:
        ConfigError: If someone else wrote to the target meanwhile.
        OSError: If the disk is full or read-only; the target is then as it was before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{secrets.token_hex(6)}.partial"
    try:
        partial.mkdir()
        yield partial
        sync(partial)
        _put_in_place(partial, target, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what is left over: the new or the old folder


def write_manifest(
    folder: Path, digests: Mapping[str, str], *, metadata: dict, program: dict | None
) -> None:
    """Write and sync the manifest of a checkpoint.

    Args:
        folder: Where its files lie.
        digests: File name -> sha256 in hexadecimal digits.
        metadata: What to record; must be JSON.
        program: JSON graph of the network, or None.

    Raises:
        ConfigError: If metadata or program are not JSON.
        OSError: If it cannot be written.
    """
    write_text(_manifest(digests, metadata, program), folder / MANIFEST_NAME)


def check_output(
    folder: str | os.PathLike, *, overwrite: bool = False, sources: Iterable[object] = ()
) -> Path:
    """Check that a checkpoint may be written to a folder, before any work is done for it.

    Args:
        folder: Target folder; it need not exist.
        overwrite: Whether a checkpoint that was written there before may be replaced.
        sources: What will be read; paths among them must not lie in the target.

    Returns:
        The target with links resolved.

    Raises:
        ConfigError: If the target is a file, lies in a zoo, holds something already that may not
            be replaced, or holds one of the sources.
        PermissionError: If the place cannot be written to.
    """
    target = Path(os.path.realpath(os.path.expanduser(folder)))
    for source in sources:
        _check_apart(target, source)
    if any(_is_zoo(place) for place in (target, *target.parents)):
        raise ConfigError(f"{display(target)}: lies in a zoo. Write to a folder outside of it.")
    if os.path.lexists(target):
        _check_replaceable(target, overwrite)
    existing = next(place for place in (target.parent, *target.parents) if place.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{display(existing)}: cannot be written to. Choose another folder.")
    return target


def _check_apart(target: Path, source: object) -> None:
    """Refuse a target that is, or lies around, a path that is read."""
    if not isinstance(source, str | os.PathLike):
        return
    path = Path(os.path.realpath(os.path.expanduser(source)))
    if path == target or target in path.parents:
        raise ConfigError(
            f"{display(target)}: holds {display(source)}, which is read. Choose another folder."
        )


def _is_zoo(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:  # the manifest of some other program
        return False
    return manifest is not None and manifest["format"] == ZOO_FORMAT


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Accept an empty folder, or with ``overwrite`` one that holds a checkpoint and no more."""
    if not target.is_dir():
        raise ConfigError(f"{display(target)}: is a file. Give a folder for the checkpoint.")
    names = set(os.listdir(target))
    if not names:
        return
    if not overwrite:
        raise ConfigError(
            f"{display(target)}: exists and is not empty. Choose another folder or set overwrite."
        )
    manifest = read_manifest(target)
    ours = {MANIFEST_NAME, *manifest["files"]} if manifest else set()
    if names - ours:
        raise ConfigError(
            f"{display(target)}: also holds {sorted(names - ours)[:5]}, which overwriting would "
            f"delete. Choose another folder."
        )


def _storable(weights: Weights) -> Weights:
    """Bring tensors to the CPU, each with memory of its own."""
    plain = plain_weights("save_checkpoint", weights)
    if not plain:
        raise IncompatibleWeights("save_checkpoint: there are no tensors to write.")
    if "__metadata__" in plain:
        raise IncompatibleWeights("save_checkpoint: '__metadata__' is reserved. Rename the tensor.")
    return _untied({key: tensor.cpu() for key, tensor in plain.items()})


def _untied(weights: Weights) -> Weights:
    seen: set[int] = set()
    untied = {}
    for key, tensor in weights.items():
        memory = tensor.untyped_storage().data_ptr()
        untied[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return untied


def _manifest(digests: Mapping[str, str], metadata: dict, program: dict | None) -> str:
    manifest = {
        "format": CHECKPOINT_FORMAT,
        "files": {name: {"sha256": digest} for name, digest in digests.items()},
        "metadata": metadata,
        "program": program,
    }
    try:
        return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata and program must be JSON: {error}.") from None


def _write_tensors(weights: Weights, path: Path) -> str:
    """Write and sync a safetensors file and give its checksum."""
    try:
        save_file(weights, path, metadata={"format": "pt"})  # more keys come in random order
    except SafetensorError as error:
        raise OSError(f"{display(path)}: cannot be written ({error}).") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # as the umask has it; the library gives 0600
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    with open_regular(path) as file:
        return sha256(file)


def write_text(text: str, path: Path) -> None:
    """Write and sync a new text file.

    Args:
        text: Its content.
        path: Where; there must not be a file of this name.

    Raises:
        OSError: If it cannot be written.
    """
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can sync folders.

    Args:
        folder: Which.

    Raises:
        OSError: If it cannot be synced.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name; ``partial`` is then gone or is the old folder."""
    if overwrite and target.is_dir() and any(target.iterdir()):
        exchange(partial, target)
    else:
        try:
            os.rename(partial, target)
        except OSError:
            if target.is_dir() and any(target.iterdir()):
                raise ConfigError(
                    f"{display(target)}: was written by someone else meanwhile. Choose another "
                    f"folder or set overwrite."
                ) from None
            raise
    sync(target.parent)
