"""Zip archives as torch writes them: every record stored as it is, none larger than the file."""

import zipfile
from typing import BinaryIO

from metamerge.checkpoints.opening import file_size
from metamerge.checkpoints.safetensors_files import read_exactly
from metamerge.errors import TooLarge, Unreadable, Unsafe

EXPORT = "Export the tensors alone: torch.save(model.state_dict(), path), or as safetensors."

Records = dict[str, zipfile.ZipInfo]


def list_records(file: BinaryIO, name: str, max_bytes: int) -> Records:
    """List an archive and refuse one that unpacks to more than it is.

    Args:
        file: Open file.
        name: What messages call it.
        max_bytes: Largest number of bytes that it may unpack to.

    Returns:
        Records by their paths.

    Raises:
        Unsafe: If it is a program.
        TooLarge: If it claims more than its bytes or the limit give.
        Unreadable: If it is damaged.
        OSError: If it cannot be read.
    """
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
    total = sum(record.file_size for record in records)
    if total > max_bytes:
        raise TooLarge(f"{name}: unpacks to {total} bytes, the limit is {max_bytes}.")
    packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
    if packed or total > file_size(file):
        raise TooLarge(
            f"{name}: is {file_size(file)} bytes and unpacks to {total}; torch does not compress "
            f"(compressed: {packed[:3]}). {EXPORT}"
        )
    if len(by_name) < len(records) or any(record.flag_bits & 1 for record in records):
        raise Unreadable(f"{name}: has repeated or encrypted records in its archive. {EXPORT}")
    return by_name


def read_record(file: BinaryIO, record: zipfile.ZipInfo, name: str, limit: int) -> bytes:
    """Read one stored record; its checksum is left alone, since torch can write without one.

    Args:
        file: Open file.
        record: Which.
        name: What messages call the file.
        limit: Largest number of bytes.

    Returns:
        Its bytes.

    Raises:
        TooLarge: If it is larger than the limit.
        Truncated: If the file ends before it does.
        Unreadable: If it lies nowhere.
    """
    if record.file_size > limit:
        raise TooLarge(f"{name}: {record.filename!r} has {record.file_size} bytes. {EXPORT}")
    if record.header_offset < 0:
        raise Unreadable(f"{name}: has a damaged list of records. Copy or export it again.")
    lengths = read_exactly(file, record.header_offset + 26, 4, name)
    names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return read_exactly(file, record.header_offset + 30 + names, record.file_size, name)
