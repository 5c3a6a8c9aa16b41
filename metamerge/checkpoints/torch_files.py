"""Read what torch.save wrote, in its zip format and in the older one, without running its code.

First the outline is read and held against the file: every tensor lies within its memory, every
block of memory is there in full. Only then torch.load(weights_only=True) makes the tensors.
"""

import io
import warnings
import zipfile
from typing import BinaryIO

import torch

from metamerge.checkpoints.opening import file_size
from metamerge.checkpoints.plain import plain_weights
from metamerge.checkpoints.safetensors_files import read_exactly
from metamerge.checkpoints.torch_outline import Outline, TensorOutline
from metamerge.checkpoints.torch_pickle import EXPORT, MAX_OUTLINE_BYTES, read_outline
from metamerge.errors import IncompatibleWeights, TooLarge, Truncated, Unreadable, Unsafe
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
    is_zip = file.read(4) == ZIP_MAGIC
    outline = _zip_outline(file, name, max_bytes) if is_zip else _legacy_outline(file, name)
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


def _zip_outline(file: BinaryIO, name: str, max_bytes: int) -> Outline:
    """Check the archive, read its description, and hold its storages against its records."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except OSError:
        raise
    except Exception:  # zipfile lets struct, Unicode and arithmetic errors of bad archives through
        raise Unreadable(f"{name}: is a damaged zip archive. Copy or export it again.") from None
    by_name = {record.filename: record for record in records}
    if any(path.endswith("/constants.pkl") for path in by_name):
        raise Unsafe(f"{name}: is a TorchScript program. {EXPORT}")
    _check_records(records, file_size(file), name, max_bytes)
    descriptions = [n for n in by_name if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(descriptions) != 1:
        raise Unreadable(f"{name}: is a zip archive, but not one of torch.save. {EXPORT}")
    folder = descriptions[0].removesuffix("data.pkl")
    outline = read_outline(io.BytesIO(_record(file, by_name[descriptions[0]], name)), name)
    for storage in outline.storages.values():
        record = by_name.get(f"{folder}data/{storage.key}")
        if record is None or record.file_size != storage.nbytes:
            got = "nothing" if record is None else f"{record.file_size}"
            raise Unreadable(
                f"{name}: record {storage.key[:200]!r} should hold {storage.nbytes} bytes, "
                f"got {got}. Save it again."
            )
    return outline


def _check_records(records: list, size: int, name: str, max_bytes: int) -> None:
    """Refuse archives that unpack to more than they are; torch stores its records as they are."""
    total = sum(record.file_size for record in records)
    if total > max_bytes:
        raise TooLarge(f"{name}: unpacks to {total} bytes, the limit is {max_bytes}.")
    packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
    if packed or total > size:
        raise TooLarge(
            f"{name}: is {size} bytes and unpacks to {total}; torch.save does not compress "
            f"(compressed: {packed[:3]}). {EXPORT}"
        )
    names = {record.filename for record in records}
    if len(names) < len(records) or any(record.flag_bits & 1 for record in records):
        raise Unreadable(f"{name}: has repeated or encrypted records in its archive. {EXPORT}")


def _record(file: BinaryIO, record: zipfile.ZipInfo, name: str) -> bytes:
    """Read one stored record; its checksum is left alone, since torch can write without one."""
    if record.file_size > MAX_OUTLINE_BYTES:
        raise TooLarge(f"{name}: its description has {record.file_size} bytes. {EXPORT}")
    if record.header_offset < 0:
        raise Unreadable(f"{name}: has a damaged list of records. Copy or export it again.")
    lengths = read_exactly(file, record.header_offset + 26, 4, name)
    names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return read_exactly(file, record.header_offset + 30 + names, record.file_size, name)


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
