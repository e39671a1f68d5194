"""Which process a record names: one that lives on this machine, or one that cannot be asked; and
what makes this one faster for a while."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


def machine_id() -> str:
    """Where process ids can be compared: this boot of the kernel, this namespace of processes."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass
    return " ".join(parts)


def process_start(pid: int) -> float:
    """When a process began: seconds after the boot, by a clock that nobody sets; where the system
    does not tell that, seconds since 1970.

    Raises:
        psutil.NoSuchProcess: if there is none.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The name before the last parenthesis may hold anything.
        return int(text.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return psutil.Process(pid).create_time()


def same_process(pid: int, born: float) -> bool:
    """Whether the process of this machine that began at `born` still runs."""
    try:
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE  # killed, but its code is not collected
        # The other clock is that of earlier versions; the two never come near each other.
        began = (process_start(pid), process.create_time())
        return not dead and min(abs(time - born) for time in began) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process of this machine."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


@contextmanager
def collector_paused(*, for_good: bool = False) -> Iterator[None]:
    """Make many objects and no garbage, without Python's search for cycles in between: each of its
    full collections looks at every object of torch, and a quarter of an import's time is theirs.

    Args:
        for_good: what exists at the end stays, and no later collection looks at it: for imports.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if was_enabled:
            gc.enable()
