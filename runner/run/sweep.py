"""Works through the trials of a sweep on this machine, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from runner.errors import Interrupted
from runner.job.load import dump_job
from runner.job.schema import Job
from runner.job.sweep import Trial, open_trials, write_manifest
from runner.run.folder import RunDir, storage_errors, write_atomic

# Ended by a signal, or told to save: the person wants the machine back, not the next trial.
_STOPPED = {Interrupted.exit_code, 128 + 2, 128 + 9, 128 + 15}


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
