"""Let two folders swap their names in one step."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def exchange(first: Path, second: Path) -> None:
    """Swap two folders of one file system.

    On Linux the kernel does it in one step. Elsewhere, and on file systems that cannot, it takes
    three renames, between which ``second`` is missing for a moment; its old content is then found
    as ``<first>.old``.

    Args:
        first: Folder that takes the place of ``second``.
        second: Folder that takes the place of ``first``.

    Raises:
        OSError: If the folders cannot be renamed; they then keep their names.
    """
    if not _exchanged_by_kernel(first, second):
        _exchange_by_renames(first, second)


def _exchanged_by_kernel(first: Path, second: Path) -> bool:
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _exchange_by_renames(first: Path, second: Path) -> None:
    aside = first.with_name(f"{first.name}.old")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)
