"""Works through the trials of a sweep on this machine, one after another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runner.errors import DataError, Interrupted
from runner.job.load import dump_job
from runner.job.schema import Job
from runner.job.sweep import Trial
from runner.run.folder import RunDir
from runner.utils.files import storage_errors, write_atomic, write_json

# Ended by a signal, or told to save: the person wants the machine back, not the next trial.
_STOPPED = {Interrupted.exit_code, 128 + 2, 128 + 9, 128 + 15}

SWEEP_MANIFEST = "sweep.json"

JOB = "sweep.toml"


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
        with storage_errors(run.path):
            run.path.mkdir(exist_ok=True)
        write_atomic(run.job, dump_job(trial.job))
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
    its trials, in the order of their array indices.

    A trial keeps its index for ever. Trials of an earlier start that the job no longer has stay in
    the manifest, because their results stay in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = manifest_entries(folder, job, trials)
    write_atomic(folder / JOB, dump_job(job))
    write_json(
        folder / SWEEP_MANIFEST,
        {
            "name": job.name,
            "trials": [{"name": name, "values": values} for name, values in entries.items()],
        },
    )
    return list(entries)


def manifest_entries(folder: Path, job: Job, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """The values of all trials that a sweep has or had, by name, in the order of their array
    indices: those of `folder`, if it holds the sweep already, then new ones.

    Raises:
        DataError: if it holds the sweep of another job.
    """
    known = read_manifest(folder) if (folder / SWEEP_MANIFEST).is_file() else {}
    if known and known["name"] != job.name:
        raise DataError(
            f"{folder} holds the sweep of another job, {known['name']}; give another folder"
        )
    entries = {entry["name"]: entry["values"] for entry in known["trials"]} if known else {}
    return entries | {trial.name: trial.values for trial in trials if trial.name not in entries}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `sweep.json`: the sweep's `name`, and `trials` with `name` and `values`.

    Raises:
        DataError: if there is none, or none that can be read.
    """
    try:
        manifest = json.loads((folder / SWEEP_MANIFEST).read_text(encoding="utf-8"))
        _ = manifest["name"], [(entry["name"], entry["values"]) for entry in manifest["trials"]]
    except FileNotFoundError:
        raise DataError(f"{folder} is no folder of a sweep: it has no {SWEEP_MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / SWEEP_MANIFEST}: cannot be read: {error}") from None
    return manifest


def open_trials(folder: Path, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have no result yet: failed ones, and those that never ran."""
    return [trial for trial in trials if not RunDir(folder / trial.name).finished()]
