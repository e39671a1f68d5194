"""Gives jobs to SLURM: prepares their run folders with a batch script in each, and submits."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from runner.errors import DataError, RunDirError, RunnerError, SlurmTimeout, StorageError
from runner.job.load import first_difference, recorded_job
from runner.job.sweep import Trial
from runner.run.attempts import attempt_numbers, describe_if_alive
from runner.run.folder import RunDir, new_stamp
from runner.run.ownership import check_ours, prepare
from runner.run.sweep import (
    SWEEP_JOB,
    SWEEP_MANIFEST,
    open_trials,
    updated_manifest,
    write_manifest,
)
from runner.slurm.client import (
    Submission,
    job_states,
    never_starts,
    read_submission,
    sbatch,
    write_submission,
)
from runner.slurm.request import SubmitRequest
from runner.slurm.script import script_options
from runner.utils.files import is_there, storage_errors, write_atomic


@dataclass(frozen=True)
class Submitted:
    """A job that SLURM has taken.

    Attributes:
        folder: of the run, or of the sweep.
        job_id: SLURM's number.
        runs: how many runs it makes.
        doubt: SLURM's words where it could not start it on the nodes as they are now.
    """

    folder: Path
    job_id: str
    runs: int
    doubt: str | None


def submit_run(request: SubmitRequest, root: Path, run_dir: Path | None) -> Submitted | None:
    """Submit one run: a new one below `root`, or the one in `run_dir`, which goes on. None if that
    is finished.

    Raises:
        DataError: if `run_dir` holds a run of another job.
        RunDirError: if that run is under way, or in the queue already.
        SlurmError: if SLURM does not take it; what was written for it is then taken back.
        SlurmTimeout: if SLURM may have taken it; all is left as it is.
        StorageError: if a file or folder cannot be written.
    """
    with _rollback_on_failure() as rollback, storage_errors():
        if run_dir is None:
            _note_folder(rollback, root / request.job.name)
            run = RunDir.create(root, request.job.name)
            rollback.callback(_put_back, run.path, None)
        else:
            run = RunDir(run_dir)
            _note_folder(rollback, run.path)
            run.path.mkdir(parents=True, exist_ok=True)
        with _folder_lock(run.path):
            check_ours(run)
            if is_there(run.job):
                difference = first_difference(recorded_job(run.job), request.job)
                if difference is not None:
                    raise DataError(f"{run.path}: holds a run of another job: {difference}")
                if run.finished():
                    return None
                for reason in taken_runs([run]).values():
                    raise RunDirError(reason)
            _note_run(rollback, run)
            # Also of a run that goes on: what two starts may differ in, the newest submission says.
            prepare(run, request.job)
            return _submit(request, run.path, {0: run}, request.script(run.path), rollback)


def submit_sweep(request: SubmitRequest, root: Path, folder: Path | None) -> Submitted | None:
    """Submit a sweep as an array job: those of its trials that have no result and are not in the
    queue. None if all have results.

    Raises:
        DataError: if `folder` holds another sweep.
        RunDirError: if all that is left to do is in the queue already.
        SlurmError: if SLURM does not take it; what was written for it is then taken back.
        SlurmTimeout: if SLURM may have taken it; all is left as it is.
        StorageError: if a file or folder cannot be written.
    """
    with _rollback_on_failure() as rollback, storage_errors():
        if folder is None:
            _note_folder(rollback, root / request.job.name)
            folder = RunDir.create(root, request.job.name).path
            rollback.callback(_put_back, folder, None)
        folder = folder.absolute()
        for name in (SWEEP_JOB, SWEEP_MANIFEST):
            _note_file(rollback, folder / name)
        folder.mkdir(parents=True, exist_ok=True)
        with _folder_lock(folder):
            names, to_run = _trials_to_run(request, folder)
            if not to_run:
                return None
            for trial in to_run.values():
                check_ours(RunDir(folder / trial.name))
            write_manifest(folder, request.job, request.trials)
            runs = {index: RunDir(folder / trial.name) for index, trial in to_run.items()}
            for index, run in runs.items():
                _note_run(rollback, run)
                prepare(run, to_run[index].job)
            return _submit(
                request, folder, runs, request.script(folder, names, list(runs)), rollback
            )


def draft(request: SubmitRequest, root: Path, run_dir: Path | None) -> str | None:
    """The script as it would be submitted now, None if there is nothing left to run; nothing is
    written.

    Raises:
        DataError, RunDirError: as of `submit_sweep`.
    """
    folder = (run_dir or root / request.job.name / new_stamp()).absolute()
    if not request.trials:
        return request.script(folder)
    names, to_run = _trials_to_run(request, folder)
    return request.script(folder, names, list(to_run)) if to_run else None


def in_queue(runs: Iterable[RunDir]) -> dict[Path, str]:
    """Say where those of the runs that are in SLURM's queue stand there, by run folder. SLURM is
    asked once for all, and not at all if none was submitted.

    Raises:
        SlurmError: if SLURM cannot be asked.
    """
    names: dict[Path, str] = {}
    for run in runs:
        submission = read_submission(run.slurm)
        if submission is not None:
            names[run.path] = submission.name
    jobs = job_states(list(names.values()))
    return {
        path: f"job {name} is {jobs[name].state}"
        for path, name in names.items()
        if name in jobs and not jobs[name].ended
    }


def taken_runs(runs: Iterable[RunDir]) -> dict[Path, str]:
    """Say by whom, or by which job in the queue, those of the runs are taken that are.

    Raises:
        SlurmError: if SLURM cannot be asked.
    """
    runs = list(runs)
    reasons = {
        path: f"{path} is submitted already: {where}" for path, where in in_queue(runs).items()
    }
    for run in runs:
        newest = max(attempt_numbers(run), default=0)
        alive = describe_if_alive(run, newest) if newest and run.path not in reasons else None
        if alive is not None:
            reasons[run.path] = f"{run.path} is being run by {alive}"
    return reasons


def _trials_to_run(request: SubmitRequest, folder: Path) -> tuple[list[str], dict[int, Trial]]:
    """The names of all trials of a sweep in the order of their array indices, and by index the
    trials that are to run: those without a result that nobody runs.

    Raises:
        RunDirError: if there are trials without a result, and all of them are under way.
    """
    manifest = updated_manifest(folder, request.job, request.trials)
    names = [entry.name for entry in manifest.trials]
    places = {name: index for index, name in enumerate(names)}
    unfinished = open_trials(folder, request.trials)
    taken = taken_runs(RunDir(folder / trial.name) for trial in unfinished)
    free = [trial for trial in unfinished if folder / trial.name not in taken]
    if unfinished and not free:
        raise RunDirError(
            f"{folder}: the {len(unfinished)} trials without a result run or are in the queue"
        )
    return names, {places[t.name]: t for t in sorted(free, key=lambda t: places[t.name])}


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Keep a second `submit` out of a folder meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirError(f"{folder} is being submitted by another spantune submit") from None
        except OSError:
            # The file system has no locks: if two submit at once, both jobs are queued, and the
            # second to start finds the run in use (73).
            pass
        yield
    finally:
        os.close(descriptor)


def _submit(
    request: SubmitRequest, folder: Path, runs: dict[int, RunDir], script: str, rollback: ExitStack
) -> Submitted:
    script_file = RunDir(folder).submit_script
    _note_file(rollback, script_file)
    write_atomic(script_file, script)
    options = script_options(script)
    before = {index: read_submission(run.slurm) for index, run in runs.items()}
    doubt = never_starts(script_file, options)
    try:
        job_id = sbatch(script_file, options)
    except SlurmTimeout as error:
        rollback.pop_all()
        raise SlurmTimeout(
            f"{error}; {folder} is kept for the job, and takes another one with --run-dir"
        ) from None
    rollback.pop_all()
    try:
        _record(request, folder, runs, job_id, before)
    except StorageError as error:
        raise StorageError(f"{error}; job {job_id} is submitted all the same") from None
    return Submitted(folder, job_id, len(runs), doubt)


def _record(
    request: SubmitRequest,
    folder: Path,
    runs: dict[int, RunDir],
    job_id: str,
    before: Mapping[int, Submission | None],
) -> None:
    """Write beside each run which job it is in, after which earlier ones."""
    is_array = bool(request.trials)
    pattern = "slurm-{}_{}.out" if is_array else "slurm-{}.out"
    for index, run in runs.items():
        last = before[index]
        submission = Submission(
            job_id=job_id,
            index=index if is_array else None,
            output=str(folder / pattern.format(job_id, index)),
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            options=request.section.model_dump(mode="json"),
            defaults=str(request.defaults) if request.defaults else None,
            earlier=[*last.earlier, last.name] if last else [],
        )
        write_submission(run.slurm, submission)


@contextmanager
def _rollback_on_failure() -> Iterator[ExitStack]:
    """A stack of what puts the folders back as they were, if the block ends with a RunnerError;
    `pop_all()` means that from there on nothing is put back."""
    rollback = ExitStack()
    try:
        yield rollback
    # Only then: an interrupt may come while sbatch is asked, and there may be a job by then that
    # needs its folder.
    except RunnerError:
        rollback.close()
        raise


def _note_file(rollback: ExitStack, path: Path) -> None:
    """Before a file is written: put back what is in it now, or remove it."""
    _note_folder(rollback, path.parent)
    rollback.callback(_put_back, path, path.read_bytes() if path.is_file() else None)


def _note_run(rollback: ExitStack, run: RunDir) -> None:
    """Before a run is prepared."""
    for path in (run.job, run.prepared):
        _note_file(rollback, path)


def _note_folder(rollback: ExitStack, path: Path) -> None:
    """Before a folder is made: remove it and those above it that are not there yet."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            rollback.callback(_put_back, folder, None)


def _put_back(path: Path, content: bytes | None) -> None:
    with suppress(OSError):
        if content is not None:
            path.write_bytes(content)
        elif path.is_dir():
            path.rmdir()  # fails if somebody else has put something into it: then it stays
        else:
            path.unlink(missing_ok=True)
