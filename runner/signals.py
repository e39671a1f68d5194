"""Turns the signals that announce the end of a process into a request that training looks at
between its steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SLURM's warning before a time limit or a preemption, `scancel`, Ctrl-C, a lost terminal.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# The first request of this process. Signals reach a process, not an object, so it stands here.
_request: str | None = None


def listen() -> None:
    """From here on signals make requests instead of ending the process.

    Called before torch is imported, which takes seconds. A second Ctrl-C ends the process at once.
    """
    for number in SIGNALS:
        # nohup had SIGHUP ignored: the run is to outlive its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def ask(reason: str) -> None:
    """Request an end for a reason that completes "stopped by ..."; only the first one counts."""
    global _request
    _request = _request or reason


def asked() -> str | None:
    """Why this process is to come to an end, None while it may go on."""
    return _request


def forget() -> None:
    """Take the request back: a process that runs several jobs begins the next one."""
    global _request
    _request = None


@contextmanager
def meant_for_us() -> Iterator[None]:
    """Processes that are started within never hear the signals: SLURM sends them to every process
    of a step, and a helper must not die of what is meant for the rank."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which children inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Launcher:
    """The processes above a rank that started it: when they are gone, nobody waits for its end."""

    def __init__(self) -> None:
        self._above = _ancestors()

    def is_gone(self) -> bool:
        """Whether one of them has ended since (the system then gives the child another parent)."""
        return _ancestors()[: len(self._above)] != self._above


def _ancestors() -> list[int]:
    """The parent's id; for DeepSpeed's launcher, which starts a second program, the one above too.

    Where /proc is absent the parent alone counts.
    """
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/cmdline", "rb") as file:
            command = file.read()
        if b"deepspeed.launcher.launch" not in command:
            return [parent]
        with open(f"/proc/{parent}/stat", "rb") as file:
            above = int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return [parent]
    return [parent, above]


def _note(number: int, _: FrameType | None) -> None:
    ask(signal.Signals(number).name)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
