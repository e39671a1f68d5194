"""Reads the ledger of a run's starts: who made each, who is alive, what of their work counts.

`attempts/0002.json` says who started, `0002.alive` is touched as long as it lives, `0002.end.json`
says how it ended, `0002.sealed` lists the checkpoints of earlier starts that count. `lease` writes
it.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field

from runner.errors import DataError, Interrupted, printable
from runner.run.folder import RunDir, committed_steps
from runner.utils.files import is_there, read_json, storage_errors
from runner.utils.processes import is_stopped, machine_id, process_start, same_process
from runner.utils.text import duration

Record = TypeVar("Record")

SILENT_S = 120.0  # seconds without a sign of life, after which a start elsewhere counts as dead
_AHEAD_S = 2.0  # seconds by which a sign of life may lie in the future without a clock being set
MAX_IDLE = 3  # starts in a row without progress, after which a run is not requeued
MAX_STARTS = 50  # starts after which it is not requeued in any case

_NOT_KNOWN = (
    "it lists the checkpoints that count, none of which was touched; put it back, or begin anew"
    " with --restart"
)


@dataclass(frozen=True)
class AttemptRecord:
    """Who made a start: the content of `attempts/NNNN.json`.

    Attributes:
        attempt: its number, from 1.
        host, pid: where its rank 0 runs.
        slurm_job_id, slurm_restart_count: of the SLURM job that it belongs to; None outside.
        started: seconds since 1970.
        from_step: the committed step that it went on from; None as long as it has not loaded one.
        machine: names the boot and the process namespace in which `pid` means something.
        born: when that process began, to tell it from a later one with the same id, as
            `process_start` gives it; seconds since 1970 in entries of earlier versions.
        anew: whether it began from nothing although the folder held a run.
        nonce: tells it from the start of that number in a folder that was removed and made anew;
            empty in entries of earlier versions.
    """

    attempt: int
    host: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    slurm_job_id: str | None
    slurm_restart_count: int
    started: Annotated[float, Field(ge=0, le=1e11)]
    from_step: int | None
    machine: str
    born: float
    anew: bool
    nonce: str = ""

    @classmethod
    def here(cls, attempt: int, *, anew: bool) -> AttemptRecord:
        """The record of a start that this process makes."""
        return cls(
            attempt=attempt,
            host=socket.gethostname(),
            pid=os.getpid(),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"),
            slurm_restart_count=_restarts(),
            started=time.time(),
            from_step=None,
            machine=machine_id(),
            born=process_start(os.getpid()),
            anew=anew,
            nonce=secrets.token_hex(8),
        )


@dataclass(frozen=True)
class EndRecord:
    """How a start ended: the content of `attempts/NNNN.end.json`.

    Attributes:
        exit_code: of its rank 0.
        step: the newest step that it knew to be committed; None before it had loaded one.
        ended: seconds since 1970.
        message: why, as it was told the user; empty after success and in entries of earlier
            versions.
    """

    exit_code: int
    step: int | None
    ended: float
    message: str = ""


def attempt_numbers(run: RunDir) -> list[int]:
    """Numbers of all attempts, ascending.

    Raises:
        StorageError: if they cannot be listed now.
    """
    with storage_errors(run.attempts):
        try:
            names = os.listdir(run.attempts)
        except FileNotFoundError:
            return []
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{4,}\.json", name, re.ASCII))


def attempts(run: RunDir) -> list[AttemptRecord]:
    """Every start whose entry can be read, the newest last."""
    return [record for number in attempt_numbers(run) if (record := read_attempt(run, number))]


def sealed(run: RunDir) -> tuple[int, list[str]]:
    """The newest attempt that could commit anything, and the earlier attempts' checkpoints that
    count; attempt 0 if there is none.

    Raises:
        DataError: if the list of an attempt that had one is lost or damaged: what counts is then
            not known, and to begin anew in silence would be to throw away what the user has.
        StorageError: if the ledger cannot be read now.
    """
    for number in reversed(attempt_numbers(run)):
        path = entry_file(run, number, "sealed")
        try:
            with storage_errors(path):
                try:
                    return number, read_json(path, list[str])
                except FileNotFoundError:
                    pass
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is damaged: {error}; {_NOT_KNOWN}") from None
        record = read_attempt(run, number)
        if record is not None and record.from_step is not None:  # which is noted after it
            raise DataError(f"{path}: is lost; {_NOT_KNOWN}")
        if record is not None and record.anew:
            return number, []  # it came no further than putting the earlier run aside
    return 0, []


def begun_anew(run: RunDir) -> int:
    """The newest attempt that began from nothing: the first, or one that was told to."""
    return max([1, *(record.attempt for record in attempts(run) if record.anew)])


def is_alive(run: RunDir) -> bool:
    """Whether somebody runs in the folder now."""
    newest = max(attempt_numbers(run), default=0)
    return bool(newest) and describe_if_alive(run, newest) is not None


def attempts_without_progress(run: RunDir) -> int:
    """How many starts in a row, the newest included, began where the run still stands: none of them
    has committed a step. A start that never got as far as loading counts as one."""
    starts: list[AttemptRecord] = []
    for record in attempts(run):
        starts = [record] if record.anew else [*starts, record]
    stands_at = max([0, *(record.from_step or 0 for record in starts), *committed_steps(run)])
    idle = 0
    for record in reversed(starts):
        if record.from_step is not None and record.from_step < stands_at:
            break
        idle += 1
    return idle


def check_budget(run: RunDir) -> None:
    """Look whether a run that was interrupted, or lost its node, may be requeued.

    Raises:
        Interrupted: if its last starts have brought it no further, or there were too many.
    """
    starts, idle = len(attempt_numbers(run)), attempts_without_progress(run)
    if idle >= MAX_IDLE:
        raise Interrupted(
            f"{run.path}: the last {idle} starts have saved nothing new, so it is not requeued; see"
            f" {run.log.name}, and submit it again once the reason is gone"
        )
    if starts >= MAX_STARTS:
        raise Interrupted(f"{run.path}: {starts} starts are too many; it is not requeued")


def is_earlier_life(record: AttemptRecord) -> bool:
    """Whether a start was made by this very SLURM job before it was requeued."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None or job_id != record.slurm_job_id:
        return False
    return record.slurm_restart_count < _restarts()


# --- who is alive --------------------------------------------------------------------------------


def describe_if_alive(run: RunDir, number: int) -> str | None:
    """Describe an attempt that is alive; None if it is over."""
    if is_there(entry_file(run, number, "end.json")):
        return None
    record, silence = read_attempt(run, number), _silence(run, number)
    if record is not None and record.machine == machine_id():
        if not same_process(record.pid, record.born):
            return None
        # Who runs here lives, whatever the clock says; one that is stopped may be succeeded.
        if silence > SILENT_S and is_stopped(record.pid):
            return None
    elif silence > SILENT_S:
        return None
    if record is None:
        return f"a start that just began ({duration(max(0.0, silence))} ago)"
    # A job that SLURM starts again has ended before, whatever its last sign of life.
    if is_earlier_life(record):
        return None
    if silence < -_AHEAD_S:
        return f"{describe(record)}, whose last sign of life lies {duration(-silence)} ahead"
    return f"{describe(record)}, whose last sign of life is {duration(max(0.0, silence))} old"


def stands_still(run: RunDir, number: int) -> bool:
    """Whether an attempt that seems to be alive only has a sign of life that lies in the future, as
    a clock leaves it that is set back, and gives no other one while we watch, for `SILENT_S`."""
    if _silence(run, number) >= -_AHEAD_S:
        return False
    record = read_attempt(run, number)
    if record is not None and record.machine == machine_id():
        return False  # its process was found to run
    signs, deadline = _signs(run, number), time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_S / 10))
        if _signs(run, number) != signs:
            return False
    return True


def describe(record: AttemptRecord) -> str:
    """Host, job, process and age of a start."""
    job = f"job {printable(record.slurm_job_id)}, " if record.slurm_job_id else ""
    age = duration(max(0.0, time.time() - record.started))
    return f"{printable(record.host)} ({job}process {record.pid}, started {age} ago)"


def _silence(run: RunDir, number: int) -> float:
    """Seconds since an attempt's last sign of life; negative if that lies in the future."""
    # By the clock of the file system itself: hosts may disagree on the time.
    probe = run.attempts / f".clock-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    signs = _signs(run, number)
    now = _written(probe, os.O_WRONLY | os.O_CREAT)
    probe.unlink(missing_ok=True)
    return now - max(signs, default=now)


def _signs(run: RunDir, number: int) -> list[float]:
    """When an attempt's sign of life and its entry were written last."""
    times = []
    for kind in ("alive", "json"):
        try:
            # Opened, not only looked at: a network file system then asks its server anew.
            times.append(_written(entry_file(run, number, kind), os.O_RDONLY))
        except FileNotFoundError:
            continue
    return times


def _written(path: Path, flags: int) -> float:
    file = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # never a pipe's wait
    try:
        return os.fstat(file).st_mtime
    finally:
        os.close(file)


def _restarts() -> int:
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdecimal() else 0


# --- its files -----------------------------------------------------------------------------------


def entry_file(run: RunDir, number: int, kind: str) -> Path:
    """The file of an attempt: its entry ("json"), its sign of life ("alive"), its end
    ("end.json"), ..."""
    return run.attempts / f"{number:04d}.{kind}"


def read_attempt(run: RunDir, number: int) -> AttemptRecord | None:
    """Who made a start; None while its entry is being written, or if it is lost or damaged.

    Raises:
        StorageError: if it cannot be read now.
    """
    return _read(entry_file(run, number, "json"), AttemptRecord)


def read_end(run: RunDir, number: int) -> EndRecord | None:
    """How a start ended; None as long as it has not said so.

    Raises:
        StorageError: if it cannot be read now.
    """
    return _read(entry_file(run, number, "end.json"), EndRecord)


def _read(path: Path, kind: type[Record]) -> Record | None:
    with storage_errors(path):
        try:
            return read_json(path, kind)
        except (FileNotFoundError, ValueError, RecursionError):
            return None
