"""Which process a run belongs to, and whether it is still there."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

HOST, PID, STARTED = "metamerge.host", "metamerge.pid", "metamerge.started"


def process_tags(pid: int | None = None) -> dict[str, str]:
    """Host, number and start of a process, as tags of its run.

    The start is counted in ticks since the machine was booted, which no change of its clock moves.

    Args:
        pid: Process; this one by default.

    Returns:
        The tags; none where the system does not tell.
    """
    pid = os.getpid() if pid is None else pid
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        ticks = _ticks(pid)
    except OSError:
        return {}
    return {
        HOST: _host(),
        PID: str(pid),
        STARTED: f"boot {boot} namespace {namespace} tick {ticks}",
    }


def is_gone(tags: Mapping[str, str]) -> bool:
    """Whether a process has certainly ended.

    Args:
        tags: What ``process_tags`` gave in that process.

    Returns:
        False for a process of another host, for one that cannot be seen from here, and for one
        that runs.
    """
    here = process_tags()
    if not here or tags.get(HOST) != here[HOST]:
        return False
    _, boot, _, namespace, _, ticks = tags[STARTED].split()
    _, own_boot, _, own_namespace, _, _ = here[STARTED].split()
    if boot != own_boot:
        return True  # the machine was started again since
    if namespace != own_namespace:
        return False  # of another container
    pid = int(tags[PID])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # of another user
    try:
        return _ticks(pid) != ticks
    except OSError:
        return False


def _ticks(pid: int) -> str:
    """When a process was started; "ended" for one that waits for its parent to take note."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "ended" if stat[0] in "ZX" else stat[19]


def _host() -> str:
    machine = ""
    with suppress(OSError):
        machine = Path("/etc/machine-id").read_text().strip()[:8]
    return f"{socket.gethostname()} {machine}".strip()
