"""Turns the signals that announce the end of a process into a request to stop, which training polls
between its steps."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from runner.errors import Interrupted

# SLURM's warning before a time limit or a preemption, `scancel`, Ctrl-C, a lost terminal.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

STARTED = "SPANTUNE_STARTED"  # when a run's start began, if its launcher did other work before
LAUNCHER = "SPANTUNE_LAUNCHER"  # names our launcher's process id to its ranks
_LOOK_S = 0.1  # seconds between two looks at the launcher: cheap, and a short run hears in time
_PR_SET_PDEATHSIG = 1  # prctl.h

# The first request of this process, and how it ends while there is nothing to save yet. Signals
# reach a process, not an object, so these stand here.
_request: str | None = None
_exit_now: Callable[[str], None] | None = None


def listen(exit_now: Callable[[str], None] | None = None) -> None:
    """From here on signals make requests instead of ending the process.

    Called before torch is imported, which takes seconds.

    Args:
        exit_now: ends the process at a signal that comes before `defer_stop`, because nothing is
            there to be saved, and others may wait for it forever; it is given the signal's name.
    """
    global _exit_now
    _exit_now = exit_now
    for number in SIGNALS:
        # nohup had SIGHUP ignored: the run is to outlive its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def exit_early(_: str) -> None:
    """End a process that has not begun anything: the same command begins again (75)."""
    os._exit(Interrupted.exit_code)


def defer_stop() -> None:
    """From here on a request waits until training comes to it. A second Ctrl-C still ends the
    process at once."""
    global _exit_now
    _exit_now = None


def request_stop(reason: str) -> None:
    """Request an end for a reason that completes "stopped by ..."; only the first one counts."""
    global _request
    _request = _request or reason


def stop_reason() -> str | None:
    """Why this process is to come to an end, None while it may go on."""
    return _request


def forget_stop() -> None:
    """Take the request back: a process that runs several jobs begins the next one."""
    global _request
    _request = None


@contextmanager
def children_ignore_signals() -> Iterator[None]:
    """Processes that are started within never hear the signals: SLURM sends them to every process
    of a step, and a helper must not die of what is meant for the rank."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which children inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_children() -> None:
    """Let the system keep the exit codes of child processes, which it does not where whoever
    started this process has SIGCHLD ignored: each child would seem to have ended with 0."""
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def follow_launcher() -> None:
    """From here on the end of the launcher is a request to stop like a signal, in a thread of its
    own; called before what takes seconds is imported, and again without effect."""
    if any(thread.name == "launcher" for thread in threading.enumerate()):
        return
    launcher = Launcher()
    with suppress(OSError, AttributeError):  # else a stopped rank would not notice
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)

    def follow() -> None:
        while not launcher.is_gone():
            time.sleep(_LOOK_S)
        request_stop("the end of its launcher")
        if _exit_now is not None:
            _exit_now("the end of its launcher")

    threading.Thread(target=follow, daemon=True, name="launcher").start()


class Launcher:
    """The processes above a rank that started it: when they are gone, nobody waits for its end."""

    def __init__(self) -> None:
        self._above = _ancestors()
        self._was_gone = _has_lost_one(self._above)

    def is_gone(self) -> bool:
        """Whether one of them has ended (the system then gives the child another parent)."""
        return self._was_gone or _ancestors()[: len(self._above)] != self._above


def launcher_id() -> int | None:
    """The process that started all ranks of this machine; None where that cannot be told."""
    if LAUNCHER in os.environ:
        return int(os.environ[LAUNCHER])
    above = _ancestors()
    return above[0] if len(above) > 1 else None


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
        return [parent, _parent(parent)]
    except (OSError, ValueError, IndexError):
        return [parent]


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def _has_lost_one(above: list[int]) -> bool:
    """Whether a launcher had ended before this process came to look."""
    if LAUNCHER in os.environ:
        return os.environ[LAUNCHER] != str(above[0])
    if "CROSS_SIZE" not in os.environ:  # DeepSpeed's: others start ranks in other ways
        return False
    # A process that leads no session is in its parent's, unless it has been given another parent.
    pairs = zip([os.getpid(), *above], above, strict=False)
    with suppress(OSError):
        return any(
            parent and os.getsid(child) not in (child, os.getsid(parent)) for child, parent in pairs
        )
    return False


def _note(number: int, _: FrameType | None) -> None:
    request_stop(signal.Signals(number).name)
    if _exit_now is not None:
        _exit_now(signal.Signals(number).name)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
