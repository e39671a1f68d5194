"""Starts the ranks of a run on this machine, passes signals on to them (Ctrl-Z too), and ends with
their exit code.

`deepspeed runner/main.py JOB.toml` does the same; but its launcher imports torch twice before the
ranks do, ends ranks one by one at a signal, and exits with 0 if a signal ends it.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runner.errors import Interrupted, MachineError
from runner.utils.console import print_error
from runner.utils.ranks import free_port
from runner.utils.signals import LAUNCHER, SIGNALS, STARTED

MAIN = Path(__file__).parents[1] / "main.py"
GRACE_S = 60.0  # seconds that ranks have to come to an end by themselves after the first has failed
_POLL_S = 0.1

FIRST_SIGINT = "stopping: the step that is under way ends, then all is saved; Ctrl-C again ends now"
SECOND_SIGINT = "ending now; the same command goes on from the last checkpoint"


def launch(
    arguments: Sequence[str],
    ranks: int | None,
    script: Path = MAIN,
    *,
    since: float | None = None,
) -> int:
    """Run `runner/main.py ARGUMENTS` on each rank and return the exit code of the run.

    Args:
        arguments: what each rank's command gets.
        ranks: processes to start; None: one for each GPU, or one where there is none.
        script: what is started.
        since: when this run's own start began, in seconds since 1970; None: with this process.

    Raises:
        MachineError: if a rank was killed, and none is left to say so.
        Interrupted: if a signal to this process ended all ranks before they listened.
    """
    world = ranks or visible_gpus() or 1
    shared = {
        "PYTHONUNBUFFERED": "1",
        LAUNCHER: str(os.getpid()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    if since is not None:
        shared[STARTED] = repr(since)
    children: list[subprocess.Popen[bytes]] = []
    with _listening(children) as heard:
        for rank in range(world):
            child = subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                # Ctrl-C reaches this process alone, which passes it on once.
                start_new_session=True,
            )
            children.append(child)
        codes, told = _wait(children, heard)
    # A rank's own exit code counts more than that another one was killed.
    exited = [code for code in codes if code > 0]
    killed = [code for code in codes if code < 0]
    if exited or not killed:
        return exited[0] if exited else 0
    if -killed[0] == signal.SIGINT:
        return 128 + signal.SIGINT  # the second Ctrl-C
    name = signal.Signals(-killed[0]).name
    if -killed[0] in told:
        raise Interrupted(f"stopped by {name} before training began; the same command begins again")
    hint = " (out of memory?)" if -killed[0] == signal.SIGKILL else ""
    raise MachineError(
        f"the run was killed by {name}{hint}; the same command goes on from its last checkpoint"
    )


def visible_gpus() -> int:
    """How many GPUs a process here sees, without asking CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([part for part in named.split(",") if part.strip() not in ("", "-1")])
    try:
        return len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])
    except OSError:
        return 0


@contextmanager
def _listening(children: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Collect the signals that come, instead of ending here; no child outlives the block."""
    heard: list[int] = []
    # What is ignored stays so: nohup has SIGHUP ignored, a shell without jobs SIGTSTP.
    kept = [
        number
        for number in (signal.SIGHUP, signal.SIGTSTP)
        if signal.getsignal(number) == signal.SIG_IGN
    ]
    before = {
        number: signal.signal(number, lambda number, _: heard.append(number))
        for number in (*SIGNALS, signal.SIGTSTP)
        if number not in kept
    }
    try:
        yield heard
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]], heard: list[int]) -> tuple[list[int], set[int]]:
    """Wait for all ranks and pass on what is heard meanwhile; returns their codes in the order of
    their ends, and the signals. Once one has failed, the others have `GRACE_S` seconds to find out
    and end: of this process's own time, which stands still while it is stopped."""
    running, codes, told, grace_s = list(children), [], set[int](), math.inf
    interrupted = False
    while running:
        while heard:
            told.add(number := heard.pop(0))
            if number == signal.SIGINT:  # at once: a step may take a while
                print_error(SECOND_SIGINT if interrupted else FIRST_SIGINT)
                interrupted = True
            _pass_on(number, running)
        for child in [child for child in running if child.poll() is not None]:
            running.remove(child)
            codes.append(child.returncode)
            if child.returncode and grace_s == math.inf:
                grace_s = GRACE_S
                for other in running:  # one that is still at its start would wait for it in vain
                    other.send_signal(signal.SIGTERM)
        if grace_s <= 0:
            for child in running:
                child.kill()
        grace_s -= _POLL_S
        time.sleep(_POLL_S if running else 0)
    return codes, told


def _pass_on(number: int, ranks: list[subprocess.Popen[bytes]]) -> None:
    """Give a signal to all ranks; for Ctrl-Z, stop them and this process until it goes on."""
    if number != signal.SIGTSTP:
        for rank in ranks:
            rank.send_signal(number)
        return
    # Each rank leads a session, in which the system discards SIGTSTP.
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
