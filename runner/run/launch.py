"""Starts the ranks of a run on this machine, passes signals on to them, and ends with their exit
code.

`deepspeed runner/main.py JOB.toml` does the same; but its launcher imports torch twice before the
ranks do, ends ranks one by one at a signal, and exits with 0 if a signal ends it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from runner.errors import MachineError
from runner.utils.ranks import free_port
from runner.utils.signals import LAUNCHER, SIGNALS

MAIN = Path(__file__).parents[1] / "main.py"
GRACE_S = 60.0  # seconds that ranks have to come to an end by themselves after the first has failed
_POLL_S = 0.1


def launch(arguments: Sequence[str], ranks: int | None, script: Path = MAIN) -> int:
    """Run `runner/main.py ARGUMENTS` on each rank and return the exit code of the run.

    Args:
        arguments: what each rank's command gets.
        ranks: processes to start; None: one for each GPU, or one where there is none.
        script: what is started.

    Raises:
        MachineError: if a rank was killed, and none is left to say so.
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
    children: list[subprocess.Popen[bytes]] = []
    with _signals_passed_on(children):
        for rank in range(world):
            child = subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                # Ctrl-C reaches this process alone, which passes it on once.
                start_new_session=True,
            )
            children.append(child)
        codes = _wait(children)
    # A rank's own exit code counts more than that another one was killed.
    exited = [code for code in codes if code > 0]
    killed = [code for code in codes if code < 0]
    if exited or not killed:
        return exited[0] if exited else 0
    if -killed[0] == signal.SIGINT:
        return 128 + signal.SIGINT  # the second Ctrl-C
    name = signal.Signals(-killed[0]).name
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
def _signals_passed_on(children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass every signal on to all children instead of ending here; none outlives the block."""

    def pass_on(number: int, _: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    # nohup had SIGHUP ignored: the run is to outlive its terminal.
    numbers = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN or n != signal.SIGHUP]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all ranks; returns their codes in the order of their ends. Once one has failed, the
    others have `GRACE_S` seconds to find out and end."""
    running, codes, deadline = list(children), [], None
    while running:
        for child in [child for child in running if child.poll() is not None]:
            running.remove(child)
            codes.append(child.returncode)
            if child.returncode and deadline is None:
                deadline = time.monotonic() + GRACE_S
                for other in running:  # one that is still at its start would wait for it in vain
                    other.send_signal(signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for child in running:
                child.kill()
        time.sleep(_POLL_S if running else 0)
    return codes
