"""Gives jobs to SLURM: checks them, prepares their run folders with a batch script in each, and
submits."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from runner.assets import not_cached
from runner.attempts import life, numbers
from runner.errors import DataError, JobError, RunDirError, SlurmError
from runner.job import Job, Slurm
from runner.jobfile import dump_job, first_difference, recorded_job
from runner.launch import MAIN
from runner.layout import batch_layout
from runner.rundir import RunDir, new_stamp, storage_errors, write_atomic
from runner.slurm import sbatch_script, script_options
from runner.slurm_defaults import defaults_file, resolve
from runner.slurm_jobs import (
    Submission,
    ask_jobs,
    never_starts,
    read_submission,
    sbatch,
    write_submission,
)
from runner.slurm_values import expanded
from runner.sweep import Trial, load_trials, open_trials, write_manifest


@dataclass(frozen=True)
class Order:
    """A checked job and what SLURM is to be asked for it.

    Attributes:
        job: the job; with trials, the one that they vary.
        trials: of a sweep; none makes a plain job.
        section: its [slurm] over the cluster's defaults, variables expanded.
        defaults: the file of these; None without one.
        written_by: the command line, for the script's header.
    """

    job: Job
    trials: list[Trial]
    section: Slurm
    defaults: Path | None
    written_by: str

    def script(self, folder: Path, names: Sequence[str] = (), indices: Sequence[int] = ()) -> str:
        """The batch script for a run in `folder`, or for these of the trials in it."""
        sweep = self.job.sweep
        return sbatch_script(
            self.section,
            name=self.job.name,
            folder=folder,
            command=node_command(self.section),
            written_by=self.written_by,
            trials=names,
            indices=indices,
            max_parallel=sweep.max_parallel if sweep else None,
        )

    def where(self) -> str:
        """What is asked for, in a few words."""
        section = self.section
        gpus, ranks = section.gpus_per_node, section.tasks_per_node
        kind = f" {section.gpu_type}" if section.gpu_type else ""
        each = f"{gpus}{kind} GPU(s)" if gpus else f"{ranks} CPU rank(s)"
        parts = [f"{section.nodes} node(s) with {each}"]
        parts += [f"partition {section.partition}"] if section.partition else []
        parts += [f"at most {section.time}"] if section.time else []
        return ", ".join(parts)

    def notes(self) -> list[str]:
        """What may be missing where the nodes have no network."""
        return [
            f"{asset.name} is not in the cache of the hub; if the nodes have no network, first"
            f" run: {asset.fetch}"
            for asset in not_cached(self.job, self.section.environment)
        ]

    def draft(self, root: Path, run_dir: Path | None) -> str:
        """The script as it would be submitted now; nothing is written."""
        folder = (run_dir or root / self.job.name / new_stamp()).absolute()
        names = [trial.name for trial in self.trials]
        return self.script(folder, names, range(len(names)))


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


def check_order(path: str, overrides: Sequence[str], written_by: str) -> Order:
    """Check all of a job that can be checked without its data: the file, the cluster's defaults,
    how the batch divides over the ranks, the environment.

    Raises:
        JobError: with one line a problem.
    """
    job, trials = load_trials(path, overrides)
    defaults = defaults_file()
    section = resolve(job.slurm, defaults)
    problems: list[str] = []
    for each in [trial.job for trial in trials] or [job]:
        try:
            batch_layout(each.train, section.nodes * section.tasks_per_node)
        except JobError as error:
            problems += error.problems
    try:
        section = expand(section)
    except JobError as error:
        problems += error.problems
    if problems:
        raise JobError([f"{path}: {problem}" for problem in dict.fromkeys(problems)])
    return Order(job, trials, section, defaults, written_by)


def expand(section: Slurm) -> Slurm:
    """Put the values of `~` and `$NAME` in, as they are here, and look whether the environment is
    there.

    Raises:
        JobError: with one line a problem.
    """
    problems: list[str] = []

    def put(key: str, text: str) -> str:
        try:
            return expanded(text)
        except ValueError as error:
            problems.append(f"slurm.{key}: {error}")
            return text

    venv = None if section.venv is None else put("venv", section.venv)
    container = tuple(put("container", word) for word in section.container)
    environment = {k: put(f"environment.{k}", v) for k, v in section.environment.items()}
    is_here = venv is None or container or problems or os.path.exists(f"{venv}/bin/python")
    if not is_here:
        problems.append(f"slurm.venv: {venv} is no environment: it has no bin/python")
    if problems:
        raise JobError(problems)
    return section.model_copy(
        update={"venv": venv, "container": container, "environment": environment}
    )


def node_command(section: Slurm) -> list[str]:
    """What starts spantune on a node: the container's words, a python, this checkout's script."""
    python = "python3" if section.container else sys.executable
    python = f"{section.venv}/bin/python" if section.venv else python
    return [*section.container, python, "-u", str(MAIN)]


def submit_run(order: Order, root: Path, run_dir: Path | None) -> Submitted | None:
    """Submit one run: a new one below `root`, or the one in `run_dir`, which goes on. None if that
    is finished.

    Raises:
        DataError: if `run_dir` holds a run of another job.
        RunDirError: if that run is under way, or in the queue already.
        SlurmError: if SLURM does not take it; a new run folder is then removed again.
    """
    run = RunDir(run_dir) if run_dir is not None else None
    if run is not None and run.job.is_file():
        difference = first_difference(recorded_job(run.job), order.job)
        if difference is not None:
            raise DataError(f"{run.path}: holds a run of another job: {difference}")
        if run.finished():
            return None
        check_idle(run)
        return _submit(order, run.path, {0: run}, order.script(run.path))
    if run is None:
        run = RunDir.create(root, order.job.name)
    try:
        with storage_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        write_atomic(run.job, dump_job(order.job))
        return _submit(order, run.path, {0: run}, order.script(run.path))
    except (SlurmError, JobError):
        _remove(run.path)
        raise


def submit_sweep(order: Order, root: Path, folder: Path | None) -> Submitted | None:
    """Submit a sweep as an array job: those of its trials that have no result and are not in the
    queue. None if all have results.

    Raises:
        DataError: if `folder` holds another sweep.
        RunDirError: if all that is left to do is in the queue already.
        SlurmError: if SLURM does not take it; a new folder is then removed again.
    """
    new = folder is None or not folder.exists()
    folder = (folder or root / order.job.name / new_stamp()).absolute()
    try:
        names = write_manifest(folder, order.job, order.trials)
        left = open_trials(folder, order.trials)
        if not left:
            return None
        runs: dict[int, RunDir] = {}
        for trial in left:
            run = RunDir(folder / trial.name)
            if is_idle(run):
                runs[names.index(trial.name)] = run
                run.path.mkdir(exist_ok=True)
                write_atomic(run.job, dump_job(trial.job))
        if not runs:
            raise RunDirError(
                f"{folder}: the {len(left)} trials without a result run or are in the queue"
            )
        indices = sorted(runs)
        return _submit(order, folder, runs, order.script(folder, names, indices))
    except (SlurmError, JobError):
        if new:
            _remove(folder)
        raise


def queued(run: RunDir) -> str | None:
    """Say where a run stands in SLURM's queue; None if it is not there.

    Raises:
        SlurmError: if it was submitted, and SLURM cannot be asked.
    """
    submission = read_submission(run.slurm)
    if submission is None:
        return None
    jobs = ask_jobs([submission.name])
    if submission.name not in jobs or jobs[submission.name].ended:
        return None
    return f"job {submission.name} is {jobs[submission.name].state}"


def check_idle(run: RunDir) -> None:
    """Make sure that nobody runs a run, and that it is not in the queue.

    Raises:
        RunDirError: saying who, or which job.
        SlurmError: if SLURM cannot be asked.
    """
    waiting = queued(run)
    if waiting is not None:
        raise RunDirError(f"{run.path} is submitted already: {waiting}")
    newest = max(numbers(run), default=0)
    alive = life(run, newest) if newest else None
    if alive is not None:
        raise RunDirError(f"{run.path} is being run by {alive}")


def is_idle(run: RunDir) -> bool:
    """Whether nobody runs a run, and it is not in the queue."""
    try:
        check_idle(run)
    except RunDirError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove the folder of a run that never was, and its job's if there is no other."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def _submit(order: Order, folder: Path, runs: dict[int, RunDir], script: str) -> Submitted:
    at = RunDir(folder).submit_script
    write_atomic(at, script)
    options = script_options(script)
    doubt = never_starts(at, options)
    job_id = sbatch(at, options)
    is_array = bool(order.trials)
    pattern = "slurm-{}_{}.out" if is_array else "slurm-{}.out"
    for index, run in runs.items():
        before = read_submission(run.slurm)
        submission = Submission(
            job_id=job_id,
            index=index if is_array else None,
            output=str(folder / pattern.format(job_id, index)),
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            options=order.section.model_dump(mode="json"),
            defaults=str(order.defaults) if order.defaults else None,
            earlier=[*before.earlier, before.name] if before else [],
        )
        write_submission(run.slurm, submission)
    return Submitted(folder, job_id, len(runs), doubt)
