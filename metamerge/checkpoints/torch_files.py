"""Read what torch.save wrote, in its zip format and in the older one, without running its code.

First the outline is read and held against the file: every tensor lies within its memory, every
block of memory is there in full. Only then torch.load(weights_only=True) makes the tensors.
"""

import io
import warnings
from typing import BinaryIO

import torch

from metamerge.checkpoints.archives import EXPORT, Records, list_records, read_record
from metamerge.checkpoints.exported_files import LIST, read_exported
from metamerge.checkpoints.opening import file_size
from metamerge.checkpoints.plain import plain_weights
from metamerge.checkpoints.safetensors_files import read_exactly
from metamerge.checkpoints.torch_outline import Outline, TensorOutline
from metamerge.checkpoints.torch_pickle import MAX_OUTLINE_BYTES, read_outline
from metamerge.errors import IncompatibleWeights, TooLarge, Truncated, Unreadable
from metamerge.weights import Weights

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
WRAPPERS = ("state_dict", "model", "model_state_dict")
_LEGACY_PREAMBLE = (0x1950A86A20F9469CFC6C, 1001)


def read_torch_file(file: BinaryIO, name: str, max_bytes: int) -> Weights:
    """Read the state dict of an open torch checkpoint.

    Args:
        file: Open file that begins with ``ZIP_MAGIC`` or ``LEGACY_MAGIC``.
        name: What messages call it.
        max_bytes: Largest number of bytes that it may unpack to.

    Returns:
        Weights on the CPU, in the order of the file; one of the usual wrappers such as
        ``{"state_dict": ...}`` is taken off. Tensors that shared memory still do.

    Raises:
        Unsafe: If the file holds more than tensors and plain values, or is a program.
        TooLarge: If it claims more than its bytes or the limit give.
        Truncated: If it ends early.
        Unreadable: If it is damaged or holds no state dict.
        IncompatibleWeights: If a tensor is sparse, quantised, complex or without values.
    """
    file.seek(0)
    if file.read(4) == ZIP_MAGIC:
        records = list_records(file, name, max_bytes)
        if any(path.endswith(f"/{LIST}") for path in records):
            return read_exported(file, records, name)
        outline = _zip_outline(file, records, name)
    else:
        outline = _legacy_outline(file, name)
    total = sum(storage.nbytes for storage in outline.storages.values())
    if total > max_bytes:
        raise TooLarge(f"{name}: holds {total} bytes of tensors, the limit is {max_bytes}.")
    wrapper = _wrapper(outline.tree, name)
    state = outline.tree if wrapper is None else outline.tree[wrapper]
    for key, value in state.items():
        if isinstance(value, TensorOutline) and value.odd:
            raise IncompatibleWeights(
                f"{name}: {key!r} is {value.odd}. Save it as a plain dense tensor."
            )
    loaded = _load(file, name)
    return plain_weights(name, loaded if wrapper is None else loaded[wrapper])


def _zip_outline(file: BinaryIO, by_name: Records, name: str) -> Outline:
    """Read the description of an archive, and hold its storages against its records."""
    descriptions = [n for n in by_name if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(descriptions) != 1:
        raise Unreadable(f"{name}: is a zip archive, but not one of torch.save. {EXPORT}")
    folder = descriptions[0].removesuffix("data.pkl")
    outline = read_outline(
        io.BytesIO(read_record(file, by_name[descriptions[0]], name, MAX_OUTLINE_BYTES)), name
    )
    for storage in outline.storages.values():
        record = by_name.get(f"{folder}data/{storage.key}")
        if record is None or record.file_size != storage.nbytes:
            got = "nothing" if record is None else f"{record.file_size}"
            raise Unreadable(
                f"{name}: record {storage.key[:200]!r} should hold {storage.nbytes} bytes, "
                f"got {got}. Save it again."
            )
    return outline


def _legacy_outline(file: BinaryIO, name: str) -> Outline:
    """Read the pickles of the older format and walk over the storages that follow them."""
    file.seek(0)
    for expected in _LEGACY_PREAMBLE:
        if read_outline(file, name).tree != expected:
            raise Unreadable(f"{name}: is of an unknown version of torch.save. {EXPORT}")
    read_outline(file, name)  # what the machine was that wrote it
    outline = read_outline(file, name)
    keys = read_outline(file, name).tree
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(outline.storages):
        raise Unreadable(f"{name}: describes other memory than it holds. Save it again.")
    position, size = file.tell(), file_size(file)
    for key in keys:
        storage = outline.storages[key]
        end = position + 8 + storage.nbytes
        if end > size:
            raise Truncated(f"{name}: ends early: expected {end} bytes, got {size}. Copy it again.")
        if int.from_bytes(read_exactly(file, position, 8, name), "little") != storage.numel:
            raise Unreadable(f"{name}: memory {key[:200]!r} has another size than described.")
        position = end
    return outline


def _wrapper(tree: object, name: str) -> str | None:
    """Find where the state dict lies: at the top (None), or under one of the usual names."""
    if not isinstance(tree, dict):
        raise Unreadable(f"{name}: holds a {type(tree).__name__}, not a state dict. {EXPORT}")
    if _holds_tensors(tree):
        return None
    found = [key for key in WRAPPERS if _holds_tensors(tree.get(key))]
    if len(found) == 1:
        return found[0]
    choices = found or [str(key)[:50] for key in list(tree)[:10]]
    kind = "several state dicts" if found else "no state dict"
    raise Unreadable(f"{name}: holds {kind} (keys: {choices}). {EXPORT}")


def _holds_tensors(tree: object) -> bool:
    return isinstance(tree, dict) and any(isinstance(v, TensorOutline) for v in tree.values())


def _load(file: BinaryIO, name: str) -> object:
    """Let torch make the tensors; its own messages advise unsafe loading and are not passed on."""
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise TooLarge(f"{name}: does not fit into memory.") from None
        except Exception as error:  # pickle, zip, runtime and lookup errors, by kind of damage
            raise Unreadable(
                f"{name}: torch cannot load it ({type(error).__name__}). Save it again."
            ) from None
