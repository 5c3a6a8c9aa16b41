"""How much memory does a process take? The kernel's own account, on Linux."""

from pathlib import Path


def memory_of(process: int | str = "self") -> dict[str, int]:
    """What the kernel counts of a process.

    ``resource.getrusage`` would not do: a process that another one started counts what its parent
    held at that moment, which hides all that it takes itself as long as it takes less.

    Args:
        process: Its number; this process by default.

    Returns:
        KiB by the kernel's names, such as ``VmHWM``, the largest resident memory, counted anew from
        when ``5`` is written to the process's ``clear_refs``; empty where there is no such process.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.endswith("kB"))
    return {name: int(value.split()[0]) for name, value in pairs}


def peak() -> int:
    """Largest resident memory of this process, in bytes."""
    return 1024 * memory_of()["VmHWM"]
