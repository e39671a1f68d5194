"""Ends all ranks with one sentence: ranks that do not meet, an early signal, full memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from runner.distributed.collectives import all_gather, is_connection_lost
from runner.distributed.watchdog import Watchdog
from runner.errors import Interrupted, MachineError
from runner.run.folder import RunDir
from runner.utils.files import below_here
from runner.utils.signals import stop_reason


@contextmanager
def before_rendezvous() -> Iterator[None]:
    """Explain why ranks do not meet, before there is a folder in which they could leave word."""
    try:
        yield
    except Exception as error:
        if not is_connection_lost(error):
            raise
        if stop_reason():
            raise Interrupted(f"stopped by {stop_reason()} before training began") from None
        first = " ".join(str(error).split())[:200]
        raise MachineError(f"the ranks have not met: {first}") from None


def stop_if_asked(run: RunDir) -> None:
    """End before the first step, if a signal has reached any rank. Every rank must call this."""
    reasons = [reason for reason in all_gather(stop_reason()) if reason is not None]
    if reasons:
        raise _stopped_early(run, reasons[0])


def leave_if_asked(run: RunDir) -> None:
    """End this rank before the first step, if a signal has reached it: in the midst of long work
    that the ranks do one after another, or in shares. The others learn of it where they meet."""
    if reason := stop_reason():
        raise _stopped_early(run, reason)


def _stopped_early(run: RunDir, reason: str) -> Interrupted:
    return Interrupted(
        f"{below_here(str(run.path))}: stopped by {reason} before training began; nothing was lost,"
        " and the same command goes on"
    )


@contextmanager
def explaining_oom(watch: Watchdog) -> Iterator[None]:
    """Say in a sentence that memory ran out: on which rank, where, and, by the error's notes, over
    which questions."""
    remedy = (
        "lower train.micro_batch_size (the same steps in smaller passes), score.batch_size or"
        " data.max_length"
    )
    with _told(lambda: f" on rank {watch.rank} at {watch.place}", remedy):
        yield


@contextmanager
def explaining_inference_oom() -> Iterator[None]:
    """Say in a sentence that memory ran out while a model was opened or asked."""
    with _told(lambda: "", "lower --batch-size, or take another --device"):
        yield


@contextmanager
def _told(where: Callable[[], str], remedy: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "can't allocate memory" not in str(error):  # the CPU's words
            raise
        first = " ".join(str(error).split()).partition(". ")[0][:200]
        place = ", ".join([where(), *getattr(error, "__notes__", ())])
        raise MachineError(f"out of memory{place}: {first}; {remedy}") from error
