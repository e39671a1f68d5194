"""Seconds of a run by phase, counted from the start of the process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class Clock:
    """`with clock("data"): ...` adds the block's wall time to the phase "data"."""

    def __init__(self) -> None:
        self._born = psutil.Process().create_time()
        self._phases: dict[str, float] = {"start": self.elapsed()}
        self._until_first_step: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - began

    def step_done(self) -> None:
        """Note the time of the first optimiser step; later calls change nothing."""
        if self._until_first_step is None:
            self._until_first_step = self.elapsed()

    def elapsed(self) -> float:
        """Seconds since the process began."""
        return time.time() - self._born

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, until the first step was done, and in all."""
        times = {
            **self._phases,
            "until_first_step": self._until_first_step or 0.0,
            "total": self.elapsed(),
        }
        return {name: round(value, 3) for name, value in times.items()}
