"""Where the ranks of one run meet, and nobody else: each says whose it is before it shares
anything."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from runner.errors import Interrupted, MachineError
from runner.job.schema import Job
from runner.utils.files import parse_json
from runner.utils.processes import machine_id
from runner.utils.ranks import launch_name
from runner.utils.signals import launcher_id, stop_reason

Place = tuple[Any, int, int]  # torch's store, this rank, how many there are

_HOST = "spantune/host"  # the key of rank 0's ticket
_ASK_S = 3.0  # seconds to ask whoever holds a port
_YIELD_S = 10.0  # seconds in which rank 0 says why a run does not begin, before another rank does


@dataclass(frozen=True)
class Ticket:
    """What the ranks of one run have alike, and those of another have not.

    Attributes:
        run: the job's name, for who reads it.
        digest: of the job, without the names of places, and of what a launcher calls this start.
        host: of this rank.
        machine: the boot and the process namespace in which `launcher` means something.
        launcher: the process that started all ranks of this machine; None where nobody can tell.
    """

    run: str
    digest: str
    host: str
    machine: str
    launcher: int | None

    @classmethod
    def of(cls, job: Job) -> Ticket:
        """This process's ticket for a run of a job."""
        # Data and model may lie elsewhere on another machine.
        places = {"data": {"train", "validation", "tuning"}, "model": {"name", "revision"}}
        content = [job.model_dump(mode="json", exclude=places), launch_name()]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return cls(job.name, digest, socket.gethostname(), machine_id(), launcher_id())

    def admits(self, other: Ticket) -> bool:
        """Whether two ranks belong together, as far as they can tell."""
        if None in (self.launcher, other.launcher) or self.machine != other.machine:
            return self.digest == other.digest
        return (self.digest, self.launcher) == (other.digest, other.launcher)

    def __str__(self) -> str:
        launcher = f", launched by process {self.launcher}" if self.launcher else ""
        return f"{self.run} ({self.host}{launcher})"


ALONE = Ticket("", "", "", "", None)  # where there is no other run


def meet(ticket: Ticket, patience_s: float) -> Place:
    """Wait for the other ranks of this run, in a thread of its own: a signal ends the waiting, for
    one that is gone perhaps, which the store would not let this process hear.

    Args:
        ticket: this rank's.
        patience_s: seconds to wait for the others.

    Raises:
        MachineError: if another run's ranks meet at this address, or another holds it.
        Interrupted: if a signal came first.
        RuntimeError: torch's own, if the ranks do not come.
    """
    wait = _Work(lambda: _meet(ticket, patience_s))
    # Both of its waits have this long; what holds the port may not answer at all.
    deadline = time.monotonic() + 2 * patience_s + _YIELD_S
    while not wait.is_over(0.05):
        if reason := stop_reason():
            raise Interrupted(f"stopped by {reason} before training began")
        if time.monotonic() > deadline:
            raise MachineError(f"the ranks have not met: {_address()} does not answer")
    return wait.result()


class _Work:
    """Something that is done in a thread of its own, and may never come to an end."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._found = work, None
        self._thread = threading.Thread(target=self._do, daemon=True)
        self._thread.start()

    def _do(self) -> None:
        try:
            self._found = self._work()
        except Exception as error:
            self._found = error

    def is_over(self, seconds: float) -> bool:
        """Whether it is done, or is so within this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What it has found; its exception is raised."""
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


def _meet(ticket: Ticket, patience_s: float) -> Place:
    patience = timedelta(seconds=patience_s)
    try:
        store, index, world = next(rendezvous("env://", timeout=patience))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise MachineError(_refusal(_holder())) from None
    mine = json.dumps(asdict(ticket))
    # Where a launcher keeps the store, rank 0 is not the only one who may come first.
    host = store.compare_set(_HOST, "", mine) if index == 0 else store.get(_HOST)
    theirs = parse_json(host, Ticket)
    if not ticket.admits(theirs) or store.add(f"spantune/came/{index}", 1) > 1:
        if index:
            time.sleep(_YIELD_S)
        error = MachineError(_refusal(theirs))
        error.speaks = True
        raise error
    # Strangers may have been counted for ours: only those who belong here have left their number.
    store.set(f"spantune/met/{index}", "")
    store.wait([f"spantune/met/{rank}" for rank in range(world)], patience)
    return store, index, world


def _holder() -> Ticket | None:
    """Whose ranks meet at our address; None if another program has it."""

    def ask() -> Ticket:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=_ASK_S)
        store = TCPStore(host, port, None, False, patience, wait_for_workers=False)
        return parse_json(store.get(_HOST), Ticket)

    asked = _Work(ask)
    with suppress(RuntimeError, ValueError):
        return asked.result() if asked.is_over(2 * _ASK_S) else None
    return None


def _refusal(theirs: Ticket | None) -> str:
    whose = f"the ranks of another run meet there: {theirs}" if theirs else "is taken already"
    return (
        f"{_address()}: {whose}; give this run a port of its own: deepspeed --master_port=PORT"
        " (torchrun: --master-port=PORT; others: MASTER_PORT)"
    )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
