"""Lets the ranks agree, step by step, on stopping and saving."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from runner.distributed.collectives import control_group
from runner.utils import signals
from runner.utils.ranks import Rank

RETRY_SHARE = 0.25  # of the time between two checkpoints, after one that failed


@dataclass(frozen=True)
class StopSave:
    """What all ranks do at this step: stop, or save."""

    stop: bool
    save: bool


class StopSaveSync:
    """Lets the ranks agree, step by step, on stopping and saving.

    Each call starts a reduction of a few bytes and takes the result of the one before, which has
    arrived meanwhile: nobody waits, and all ranks act one step later than the first of them wished.

    Args:
        seconds: after which rank 0 wishes to save.
    """

    def __init__(self, rank: Rank, seconds: float) -> None:
        self._rank, self._seconds = rank, seconds
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._saved = time.monotonic()

    def poll(self) -> StopSave:
        """What to do now. Every rank must call this equally often."""
        due = self._rank.is_main and time.monotonic() - self._saved >= self._seconds
        wishes_2 = torch.tensor([signals.stop_reason() is not None, due], dtype=torch.uint8)
        group = control_group()
        if group is None:
            stop, save = wishes_2.tolist()
            return StopSave(bool(stop), bool(save))
        pending = self._pending
        work = dist.all_reduce(wishes_2, op=dist.ReduceOp.MAX, group=group, async_op=True)
        self._pending = (wishes_2, work)
        if pending is None:
            return StopSave(stop=False, save=False)
        found_2, work = pending
        work.wait()
        stop, save = found_2.tolist()
        return StopSave(bool(stop), bool(save))

    def saved(self, *, whole: bool = True) -> None:
        """Note that everything was saved: what was wished until now is done. Every rank must call
        this at the same step.

        Args:
            whole: False after a save that failed: the next is due sooner, for what a kill costs
                grows meanwhile.
        """
        self._saved = time.monotonic() - (0 if whole else (1 - RETRY_SHARE) * self._seconds)
        if self._pending is not None:
            # A wish to stop stays one: the signal is still there at the next step.
            self._pending[1].wait()
            self._pending = None
