"""Which run folder a start belongs to: a new one, or one whose run goes on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from runner.errors import DataError, ExpectationError, RunnerError, StorageError
from runner.job.load import dump_job, first_difference, recorded_job
from runner.job.schema import Job, missed_expectation
from runner.run.attempts import attempt_numbers, attempts, is_alive, is_earlier_life
from runner.run.folder import RunDir
from runner.run.lease import Lease
from runner.run.ownership import check_ours
from runner.run.provenance import read_record
from runner.utils.files import is_there, storage_errors, write_atomic


@dataclass(frozen=True)
class StartOptions:
    """What the command line says about the run folder.

    Attributes:
        runs: folder of all runs.
        run_dir: the run's own folder, whatever it holds.
        resume: the folder of a run that is to go on; it must be there.
        restart: begin anew, whatever the folder holds.
    """

    runs: Path = Path("runs")
    run_dir: Path | None = None
    resume: Path | None = None
    restart: bool = False


def acquire_run(job: Job, options: StartOptions) -> Lease | RunDir:
    """Take the lease on the folder that a job is to run in, for rank 0; a run that is finished is
    returned as it is, without one.

    Raises:
        DataError: if the folder holds a run of another job, or what is no run of ours.
        RunDirError: if somebody is running it now.
        StorageError: if it cannot be made or written.
    """
    run = _folder(job, options)
    anew = options.restart and not any(map(is_earlier_life, attempts(run)))
    check_ours(run)
    if not anew and _is_finished(run, job):
        return run
    lease = Lease.acquire(run, anew=anew)
    try:  # once more: another start may have come before this one, and be over
        finished = not anew and _is_finished(run, job)
    except RunnerError as error:
        lease.release(error.exit_code)
        raise
    if finished:
        lease.release(0)
        return run
    if anew:
        _put_aside(lease)
    write_atomic(run.job, dump_job(job), lease.verify)
    return lease


def finished_run(job: Job, options: StartOptions) -> RunDir | None:
    """The folder that is named, if its run is finished already and was the same job's: what every
    rank can see for itself."""
    named = options.run_dir or options.resume
    if named is None or options.restart or not RunDir(named).finished():
        return None
    check_ours(RunDir(named))
    _check_job(RunDir(named), job)
    return RunDir(named)


def check_finished(job: Job, run: RunDir) -> None:
    """Hold a finished run against the job's [expect].

    Raises:
        ExpectationError: if it is missed, now as at its end.
    """
    missed = missed_expectation(job.expect, read_record(run.result))
    if missed:
        raise ExpectationError(f"{run.path}: the run is finished already, but {missed}")


def _folder(job: Job, options: StartOptions) -> RunDir:
    if options.run_dir is not None:
        with storage_errors():
            options.run_dir.mkdir(parents=True, exist_ok=True)
        return RunDir(options.run_dir)
    if options.resume is not None:
        return RunDir.open(options.resume)
    return _requeued(job, options.runs) or RunDir.create(options.runs, job.name)


def _requeued(job: Job, runs: Path) -> RunDir | None:
    """The unfinished run that a requeued SLURM job began, else the newest unfinished one of the
    same job that nobody runs; None in a job's first life."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    unfinished = [
        run
        for run in reversed(RunDir.all(runs, job.name))
        if not run.finished() and _is_of(run, job)
    ]
    begun_by_us = (run for run in unfinished if any(map(is_earlier_life, attempts(run))))
    free = (run for run in unfinished if attempt_numbers(run) and not is_alive(run))
    return next(begun_by_us, None) or next(free, None)


def _is_of(run: RunDir, job: Job) -> bool:
    try:
        return first_difference(recorded_job(run.job), job) is None
    except (DataError, StorageError):  # whose it is cannot be told now
        return False


def _is_finished(run: RunDir, job: Job) -> bool:
    """Whether a folder's run, which must be of this job, is finished."""
    _check_job(run, job)
    return run.finished()


def _check_job(run: RunDir, job: Job) -> None:
    if not is_there(run.job):
        return
    difference = first_difference(recorded_job(run.job), job)
    if difference:
        raise DataError(
            f"{run.path}: holds a run of another job: {difference}; give another folder, or"
            " --restart to begin anew"
        )


def _put_aside(lease: Lease) -> None:
    """Move all that an earlier run wrote into a folder of its own: nothing of it is lost, nothing
    counts any more. The ledger of attempts goes on."""
    run = lease.run
    aside = run.path / f"before-{lease.number:04d}"
    with storage_errors(aside):
        # The result first: a run without one is never taken for a finished one.
        for path in reversed(run.written):
            if is_there(path) and path != run.attempts:
                lease.verify()
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
