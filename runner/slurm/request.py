"""What SLURM is to be asked for a job, checked as far as that goes without its data."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.errors import JobError
from runner.job.assets import not_cached
from runner.job.messages import doubts
from runner.job.schema import Job, Slurm, batch_layout
from runner.job.slurm_values import expand_hosts
from runner.job.sweep import Trial, load_trials
from runner.run.launch import MAIN
from runner.slurm.defaults import defaults_file, resolve
from runner.slurm.script import sbatch_script


@dataclass(frozen=True)
class SubmitRequest:
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
        """What is asked for and hardly meant, and what may be missing where the nodes have no
        network."""
        return [*doubts(self.job.model_copy(update={"slurm": self.section})), *self._lacks()] + [
            f"{asset.name} is not in the cache of the hub; if the nodes have no network, first"
            f" run: {asset.fetch}"
            for asset in not_cached(self.job, self.section.environment)
        ]

    def _lacks(self) -> list[str]:
        """What a run on a cluster rarely goes without, and is not asked for."""
        section, said = self.section, []
        if not section.gpus_per_node and "gres" not in section.sbatch:
            said.append("no GPU is asked for: set slurm.gpus_per_node = 1")
        if section.cpus_per_task in (None, 1) and "exclusive" not in section.sbatch:
            said.append("each rank has one CPU core: set slurm.cpus_per_task = 8, say")
        if section.time is None:
            said.append('no time limit is asked for: set slurm.time = "4:00:00", say')
        return said


def prepare(path: str, overrides: Sequence[str], written_by: str) -> SubmitRequest:
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
    return SubmitRequest(job, trials, section, defaults, written_by)


def expand(section: Slurm) -> Slurm:
    """Put the values of `~` and `$NAME` in, as they are here, and look whether the environment is
    there.

    Raises:
        JobError: with one line a problem.
    """
    problems: list[str] = []

    def expanded(key: str, text: str) -> str:
        try:
            return expand_hosts(text)
        except ValueError as error:
            problems.append(f"slurm.{key}: {error}")
            return text

    venv = None if section.venv is None else expanded("venv", section.venv)
    container = tuple(expanded("container", word) for word in section.container)
    environment = {k: expanded(f"environment.{k}", v) for k, v in section.environment.items()}
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
