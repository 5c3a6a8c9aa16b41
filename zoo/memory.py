"""Memory that a training step frees stays with the process, for the step after it."""

import ctypes
import os

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt(3)
WANTED = ((MMAP_THRESHOLD, 1 << 30), (TRIM_THRESHOLD, (1 << 31) - 1), (TOP_PAD, 64 << 20))  # bytes


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed rather than return it to the system at once.

    Activations of convolutional networks are blocks of tens of megabytes, which glibc maps anew
    each time; the system then clears them page by page. In the training of mergers of convolutional
    networks on a CPU that is a third of the time. What a process holds at most grows by a fifth.

    Returns:
        Whether it does. Not with another C library, and not against variables of the environment
        that say otherwise (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all(mallopt(parameter, size) == 1 for parameter, size in WANTED)
