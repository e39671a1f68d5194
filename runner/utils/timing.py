"""Seconds of a run by phase, counted from the start of the process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil

from runner.utils.signals import STARTED


class PhaseTimer:
    """`with timer("data"): ...` adds the block's wall time to the phase "data"; what a phase inside
    of it takes counts only there.

    Attributes:
        announce: tells of each phase by its name, as long as it lasts.
    """

    def __init__(self) -> None:
        self.announce: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
        self._inside = [0.0]  # seconds of finished inner phases, for each phase that is open
        self._before = 0.0
        process = psutil.Process()
        self._born = process.create_time()
        launchers = (parent.create_time() for parent in process.parents() if _launches(parent))
        began = os.environ.get(STARTED)
        started = min(launchers, default=self._born) if began is None else float(began)
        self._launcher = max(0.0, self._born - started)
        self._phases: dict[str, float] = {"start": self.elapsed()}
        self._until_first_step: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        self._inside.append(0.0)
        try:
            with self.announce(phase):
                yield
        finally:
            took, inner = time.monotonic() - began, self._inside.pop()
            self._inside[-1] += took
            self._phases[phase] = self._phases.get(phase, 0.0) + took - inner

    def carry(self, seconds: Mapping[str, float]) -> None:
        """Add what an earlier process spent on the same run, as its `seconds` had it."""
        self._before = seconds["total"]
        self._until_first_step = seconds["until_first_step"]
        for phase, spent in seconds.items():
            if phase not in ("total", "until_first_step"):
                self._phases[phase] = self._phases.get(phase, 0.0) + spent

    def step_done(self) -> bool:
        """Note the time of the first optimiser step, and tell that it was; later calls change
        nothing."""
        if self._until_first_step is not None:
            return False
        self._until_first_step = self.elapsed()
        return True

    def first_step(self) -> str:
        """Say when the first step was done, and what took longest before it."""
        waited = self._launcher + (self._until_first_step or 0.0)
        spent = {"launcher": self._launcher, **self._phases}
        longest = sorted(spent, key=lambda name: -spent[name])[:4]
        parts = [f"{name} {spent[name]:.1f}" for name in spent if name in longest]
        return f"first step after {waited:.1f} s: {', '.join(parts)}"

    def elapsed(self) -> float:
        """Seconds since the process began, and those of the processes before it."""
        return self._before + time.time() - self._born

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, until the first step was done, and in all."""
        times = {
            **self._phases,
            "until_first_step": self._until_first_step or 0.0,
            "total": self.elapsed(),
        }
        return {name: round(value, 3) for name, value in times.items()}


def _launches(process: psutil.Process) -> bool:
    """Whether a process above this one started the command: deepspeed's launcher, or ours; not a
    shell or a queue whose own command line names them."""
    try:
        interpreter, *words = process.cmdline()
    except (psutil.Error, ValueError):
        return False
    if not interpreter.rpartition("/")[2].startswith("python"):
        return False
    script = words[0].rpartition("/")[2] if words else ""
    return (
        script in ("deepspeed", "spantune", "ds")
        or words[:2] in (["-m", "runner"], ["-m", "spantune"])
        or "deepspeed.launcher" in " ".join(words)
    )
