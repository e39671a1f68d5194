"""Seconds of a run by phase, counted from the start of the process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil


class Clock:
    """`with clock("data"): ...` adds the block's wall time to the phase "data"; what a phase inside
    of it takes counts only there."""

    def __init__(self) -> None:
        self._inside = [0.0]  # seconds of finished inner phases, for each phase that is open
        self._before = 0.0
        self._born = psutil.Process().create_time()
        self._phases: dict[str, float] = {"start": self.elapsed()}
        self._until_first_step: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        self._inside.append(0.0)
        try:
            yield
        finally:
            took, inner = time.monotonic() - began, self._inside.pop()
            self._inside[-1] += took
            self._phases[phase] = self._phases.get(phase, 0.0) + took - inner

    def carry(self, seconds: Mapping[str, float]) -> None:
        """Add what an earlier process spent on the same run, as its `seconds` told."""
        self._before = seconds["total"]
        self._until_first_step = seconds["until_first_step"]
        for phase, spent in seconds.items():
            if phase not in ("total", "until_first_step"):
                self._phases[phase] = self._phases.get(phase, 0.0) + spent

    def step_done(self) -> None:
        """Note the time of the first optimiser step; later calls change nothing."""
        if self._until_first_step is None:
            self._until_first_step = self.elapsed()

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
