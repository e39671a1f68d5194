"""A sweep's folder, and its trials one after another on this machine.

`sweep.toml` is the job that the trials vary, `sweep.json` names every trial that the sweep has or
had; each trial's run folder stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from runner.errors import DataError, Interrupted
from runner.job.load import dump_job
from runner.job.schema import Job
from runner.job.sweep import Trial
from runner.run.folder import RunDir
from runner.run.ownership import check_empty, check_ours, prepare
from runner.utils.files import is_there, read_json, storage_errors, write_atomic, write_json

# Ended by a signal, or told to save: the person wants the machine back, not the next trial.
_STOPPED = {Interrupted.exit_code, 128 + 2, 128 + 9, 128 + 15}

SWEEP_MANIFEST = "sweep.json"
SWEEP_JOB = "sweep.toml"


@dataclass(frozen=True)
class TrialEntry:
    """A trial as the manifest has it: its name, which is no path and leads nowhere else, and the
    values that the sweep gave it by key."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
    values: dict[str, Any]


@dataclass(frozen=True)
class SweepManifest:
    """What `sweep.json` holds: the job's name, and all trials in the order of their array
    indices."""

    name: str
    trials: list[TrialEntry]


def run_trials(
    folder: Path, job: Job, trials: Sequence[Trial], start: Callable[[RunDir], int]
) -> Iterator[tuple[str, int | None]]:
    """Run each trial that has no result yet; a trial that fails does not keep the others from
    running, one that is interrupted does.

    Args:
        folder: of the sweep; it is made, or goes on.
        job: the job that the trials vary.
        trials: all of them.
        start: runs the job in a run folder and returns its exit code.

    Yields:
        a trial's name and None before it starts, its name and exit code when it has ended.
    """
    with storage_errors(folder):
        write_manifest(folder, job, trials)
    for trial in open_trials(folder, trials):
        run = RunDir(folder / trial.name)
        check_ours(run)
        prepare(run, trial.job)
        yield trial.name, None
        code = start(run)
        yield trial.name, code
        if code in _STOPPED:
            return


def sweep_code(codes: Iterable[int]) -> int:
    """The exit code of a whole sweep: that of its interruption, else of the first trial that
    failed."""
    failures = [code for code in codes if code]
    return next((code for code in failures if code in _STOPPED), failures[0] if failures else 0)


def write_manifest(folder: Path, job: Job, trials: Sequence[Trial]) -> list[str]:
    """Make or renew the folder of a sweep: `sweep.toml` and `sweep.json`; return the names of all
    its trials, in the order of their array indices."""
    manifest = updated_manifest(folder, job, trials)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SWEEP_JOB, dump_job(job))
    write_json(folder / SWEEP_MANIFEST, manifest)
    return [entry.name for entry in manifest.trials]


def updated_manifest(folder: Path, job: Job, trials: Sequence[Trial]) -> SweepManifest:
    """The manifest with these trials: those that `folder` has already, if it holds the sweep, then
    new ones.

    Raises:
        DataError: if it holds the sweep of another job, or what is neither a sweep nor nothing.
    """
    known: list[TrialEntry] = []
    if not is_there(folder / SWEEP_MANIFEST):
        check_empty(folder, "the folder of a sweep", f"its {SWEEP_MANIFEST}")
    else:
        manifest = read_manifest(folder)
        if manifest.name != job.name:
            raise DataError(
                f"{folder} holds the sweep of another job, {manifest.name}; give another folder"
            )
        known = manifest.trials
    # A trial keeps its index for ever. One that the job no longer has stays in the manifest,
    # because its results stay in the folder.
    names = {entry.name for entry in known}
    new = [TrialEntry(trial.name, trial.values) for trial in trials if trial.name not in names]
    return SweepManifest(job.name, known + new)


def read_manifest(folder: Path) -> SweepManifest:
    """Read `sweep.json`.

    Raises:
        DataError: if there is none, or it is damaged.
        StorageError: if it cannot be read now.
    """
    path = folder / SWEEP_MANIFEST
    try:
        with storage_errors(path):
            try:
                return read_json(path, SweepManifest)
            except FileNotFoundError:
                what = f"no folder of a sweep: it has no {SWEEP_MANIFEST}"
                raise DataError(f"{folder} is {what}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def open_trials(folder: Path, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have no result yet: failed ones, and those that never ran."""
    return [trial for trial in trials if not RunDir(folder / trial.name).finished()]
