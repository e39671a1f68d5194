"""The newest start of a run: who made it, whether it goes on, where it speaks and what it says."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from runner.errors import DataError, RunDirError, StorageError
from runner.run.attempts import (
    SILENT_S,
    AttemptRecord,
    attempts,
    describe_if_alive,
    entry_file,
    read_end,
)
from runner.run.folder import RunDir
from runner.slurm.client import Submission, read_submission
from runner.utils.files import read_regular, storage_errors

_TAIL = 8192  # bytes at the end of a log in which its last line is looked for
# What srun adds to the words of a rank that has failed.
_SRUN_ADDS = re.compile(r"srun: error: .*: (Exited with exit code|Terminated|Killed)")


@dataclass(frozen=True)
class NewestStart:
    """The newest start of a run, as its ledger tells.

    Attributes:
        record: who made it.
        exit_code: how it ended; None as long as it has not said so.
        alive: whether it is going on.
        message: why it ended, where it says so.
    """

    record: AttemptRecord
    exit_code: int | None
    alive: bool
    message: str = ""


def newest_start(run: RunDir) -> NewestStart | None:
    """Read the newest start from the ledger; None before the first."""
    try:
        started = attempts(run)
        end = read_end(run, started[-1].attempt) if started else None
    except StorageError:  # somebody else's, which we may not read
        return None
    if not started:
        return None
    record = started[-1]
    if end is not None:
        return NewestStart(record, end.exit_code, alive=False, message=end.message)
    try:
        return NewestStart(record, None, describe_if_alive(run, record.attempt) is not None)
    except (OSError, StorageError):  # somebody else's folder, which we may only read
        silence = time.time() - modified(entry_file(run, record.attempt, "alive"))
        return NewestStart(record, None, silence < SILENT_S)


def started_elsewhere(start: NewestStart, submission: Submission) -> bool:
    """Whether a start is no life of the job that was submitted last, and began later: what SLURM
    says of that job, and what the job said, is then not about it. (A trial's SLURM_JOB_ID is not
    its name in the array, so of an array every job counts.)"""
    job, is_trial = start.record.slurm_job_id, submission.index is not None
    if job == submission.job_id or (is_trial and job is not None):
        return False
    return _began(start, submission) > 0


def started_before(start: NewestStart, submission: Submission) -> bool:
    """Whether a start was over before the job that was submitted last came to be: what it left says
    nothing of that job."""
    return start.record.slurm_job_id != submission.job_id and _began(start, submission) < 0


def _began(start: NewestStart, submission: Submission) -> float:
    """Seconds from a submission to a start; 0 if its time cannot be read."""
    with suppress(ValueError, OverflowError):
        return start.record.started - datetime.fromisoformat(submission.submitted).timestamp()
    return 0.0


def log_file(run: RunDir) -> Path:
    """Where a run's log is: the output of its newest SLURM job, or its own log if that is newer
    or there is no such job."""
    submission, start = read_submission(run.slurm), newest_start(run)
    if submission is None or (start is not None and started_elsewhere(start, submission)):
        return run.log
    # SLURM writes it into the folder that was submitted, wherever that is now: the run's, or the
    # sweep's. No path is taken from a file.
    folder = run.path if submission.index is None else run.path.parent
    return folder / f"slurm-{submission.name}.out"


def read_log(path: Path, start: int, most: int = 1_000_000) -> bytes:
    """What stands in a log from this byte on, a piece at a time; nothing if it is not there.

    Raises:
        RunDirError: if it is a link, which may lead anywhere.
        StorageError: if it cannot be read.
    """
    if path.is_symlink():
        raise RunDirError(f"{path} is a link, which is not followed")
    with storage_errors(path), suppress(FileNotFoundError):
        return read_regular(path, start, most)
    return b""


def last_line(run: RunDir) -> str:
    """The last line of a run's log, after the log's name: all that is known of an end that left no
    message. Empty where there is none, or it cannot be read now."""
    try:
        path = log_file(run)
        size = path.stat().st_size
        tail = read_log(path, max(0, size - _TAIL), _TAIL).decode("utf-8", "backslashreplace")
    except (DataError, OSError, RunDirError, StorageError):
        return ""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    said = [line for line in lines if not _SRUN_ADDS.match(line)] or lines
    return f"{path.name} ends with: {said[-1]}" if said else ""


def modified(path: Path) -> float:
    """When a file was written last, in seconds since 1970; 0 if that cannot be told."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
