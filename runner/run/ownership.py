"""Whose a folder is: ours only if a start, `submit` or a sweep made it, whatever is in it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner.errors import DataError
from runner.job.load import dump_job
from runner.job.schema import Job
from runner.run.attempts import attempt_numbers, entry_file, read_attempt
from runner.run.folder import RunDir
from runner.utils.files import is_there, read_json, storage_errors, write_atomic, write_json

# Keys of what we leave in folders of ours.
_PREPARED = {"host", "prepared"}
_SUBMITTED = {"job_id", "output", "submitted"}
_PROVENANCE = {"command", "git", "versions", "machine"}


def prepare(run: RunDir, job: Job) -> None:
    """Make or renew the folder of a run that starts later; it must be ours if it is there.

    Raises:
        StorageError: if it cannot be written.
    """
    with storage_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.prepared, {"host": socket.gethostname(), "prepared": now})
    write_atomic(run.job, dump_job(job))


def check_ours(run: RunDir) -> None:
    """Make sure that nothing of the user's can be overwritten or removed in a folder.

    Raises:
        DataError: if it is neither empty nor ours.
        StorageError: if that cannot be found out.
    """
    names = _names(run.path)
    if names == ["attempts"]:  # of a start that is making its entry just now
        names = [name for name in _names(run.attempts) if not name.startswith(".")]
    if not names or _has_entry(run) or _is_prepared(run):
        return
    raise _not_empty(run.path, names, "a run", "its attempts/ (an older spantune left none)")


def check_evaluation(run: RunDir) -> None:
    """The same for the folder of an evaluation, which begins with its provenance.

    Raises:
        DataError, StorageError: as `check_ours`.
    """
    if not _is_note(run.provenance, _PROVENANCE):
        check_empty(run.path, "an evaluation", f"its {run.provenance.name}")


def check_empty(folder: Path, what: str, sign: str) -> None:
    """Make sure that a folder holds nothing, since it lacks the sign of being ours.

    Raises:
        DataError: if it does, naming what it lacks.
        StorageError: if that cannot be found out.
    """
    if names := _names(folder):
        raise _not_empty(folder, names, what, sign)


def _not_empty(folder: Path, names: list[str], what: str, sign: str) -> DataError:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return DataError(
        f"{folder}: holds {shown} and is not {what} that spantune made, which would be known by"
        f" {sign}; nothing was touched: give a folder that is new or empty"
    )


def _names(folder: Path) -> list[str]:
    with storage_errors(folder):
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []


def _has_entry(run: RunDir) -> bool:
    """Whether a start of ours has noted itself, or is doing so."""
    for number in attempt_numbers(run):
        entry = entry_file(run, number, "json")
        if read_attempt(run, number) is not None:
            return True
        with storage_errors(entry):
            if entry.stat().st_size == 0:  # on a file system without links it is not made whole
                return True
    return False


def _is_prepared(run: RunDir) -> bool:
    """Whether `submit` or a sweep has made the folder: it left a note; before it did, the job that
    the folder is for."""
    return _is_note(run.prepared, _PREPARED) or _is_note(run.slurm, _SUBMITTED)


def _is_note(path: Path, keys: set[str]) -> bool:
    """Whether a file is one of ours: a table that has these keys."""
    if is_there(path):
        with storage_errors(path), suppress(ValueError):
            return keys <= read_json(path, dict[str, Any]).keys()
    return False
