"""Peak resident memory of a process and its children, as the operating system counted it.

Linux: VmHWM of /proc/PID/status, summed over the tree: an upper bound, as the peaks of two
processes need not coincide and shared pages count twice. macOS: ru_maxrss of this process alone.
Windows: psutil, where it is installed. Elsewhere None, never a guess.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

PROC = Path("/proc")


def peak_memory_bytes(pid: int | None = None) -> int | None:
    """The most memory that was resident at once.

    Args:
        pid: A process; None: this one.

    Returns:
        Bytes, or None where this system does not tell.
    """
    pid = os.getpid() if pid is None else pid
    if sys.platform == "linux":
        found = [_status_bytes(process, "VmHWM") for process in _tree(pid)]
        known = [value for value in found if value is not None]
        return sum(known) if known else None
    if sys.platform == "darwin" and pid == os.getpid():
        resource = importlib.import_module("resource")
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes there
    if sys.platform == "win32":
        return _windows_bytes(pid)
    return None


def _status_bytes(pid: int, field: str) -> int | None:
    try:
        status = (PROC / str(pid) / "status").read_text()
    except OSError:  # the process has ended
        return None
    for line in status.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _tree(root: int) -> list[int]:
    """A process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        parent = int(stat.rpartition(")")[2].split()[1])  # the command's name may hold anything
        children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def _windows_bytes(pid: int) -> int | None:
    try:
        psutil = importlib.import_module("psutil")
    except ModuleNotFoundError:
        return None
    return int(psutil.Process(pid).memory_info().peak_wset)
