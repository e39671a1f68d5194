"""What ranks tell each other beside the training: values, failures, and whether to save or to stop.

All of it goes over a group of its own on the CPU, so that it never waits for a GPU and a rank that
died is noticed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from runner.errors import RunnerError
from runner.utils.ranks import Rank

Result = TypeVar("Result")

# How long a collective may wait. Ranks wait for rank 0 to read and download as long as that takes;
# `watch` knows better than a timeout which of them is stuck.
COLLECTIVE_TIMEOUT = timedelta(hours=24)

# How long ranks that are all there may take to connect to each other, for a new group.
RENDEZVOUS = timedelta(minutes=5)

_group: Any = None


def open_control_group() -> None:
    """Make the group; every rank must call this, once the process group is there."""
    global _group
    if _group is None and dist.get_world_size() > 1:
        _group = dist.new_group(backend="gloo", timeout=RENDEZVOUS)
        wait_for_work(_group)


def wait_for_work(group: Any) -> None:
    """From here on a group (None: of all) waits as long as the ranks' work may take."""
    _set_pg_timeout(COLLECTIVE_TIMEOUT, group)


def control_group() -> Any:
    """The group, to start work on it that nobody waits for; None with one rank."""
    return _group


def main_first(rank: Rank, work: Callable[[], Result]) -> Result:
    """Let rank 0 do `work` first (it may fill a cache), then the others; a failure of rank 0 ends
    all of them."""
    failure: list[Any] = [None]
    result: Result | None = None
    if rank.is_main:
        try:
            result = work()
        except RunnerError as error:
            failure = [error]
        except Exception as error:
            failure = [error]
            _announce(failure)
            raise
    _announce(failure)
    if failure[0] is not None:
        raise failure[0]
    return result if rank.is_main else work()  # type: ignore[return-value]


def _announce(failure: list[Any]) -> None:
    if _group is not None:
        dist.broadcast_object_list(failure, src=0, group=_group)


def broadcast(value: Result | None) -> Result:
    """Give rank 0's value to every rank."""
    box = [value]
    if _group is not None:
        dist.broadcast_object_list(box, src=0, group=_group)
    return box[0]  # type: ignore[return-value]


def gather_to_main(value: Result) -> list[Result] | None:
    """Collect every rank's value on rank 0, in rank order; None elsewhere."""
    if _group is None:
        return [value]
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, box, dst=0, group=_group)
    return box


def all_gather(value: Result) -> list[Result]:
    """Give every rank's value to all ranks, in rank order."""
    if _group is None:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value, group=_group)
    return box


def is_connection_lost(error: Exception) -> bool:
    """Whether an exception says that another rank can no longer be reached."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL"))
