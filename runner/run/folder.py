"""Owns every file name of a run."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from runner.errors import DataError, RunDirError, StorageError
from runner.job.load import recorded_job
from runner.utils.files import is_there, storage_errors


class RunDir:
    """The folder of one run: `runs/<job name>/<stamp>/`. `result.json` is there if and only if the
    run succeeded."""

    def __init__(self, path: str | Path) -> None:
        # Absolute: a fresh process with another working folder opens what is in it.
        self.path = Path(path).absolute()
        self.job = self.path / "job.toml"
        self.provenance = self.path / "provenance.json"
        self.deepspeed = self.path / "deepspeed.json"
        self.train_table = self.path / "train.csv"
        self.eval_table = self.path / "eval.csv"
        self.probe_table = self.path / "probes.csv"
        self.repairs = self.path / "repairs.jsonl"
        self.predictions = self.path / "predictions.jsonl"
        self.curves_svg = self.path / "curves.svg"
        self.curves_png = self.path / "curves.png"
        self.report = self.path / "report.md"
        self.report_page = self.path / "report.html"
        self.evaluations = self.path / "evaluations"
        self.checkpoints = self.path / "checkpoints"
        self.attempts = self.path / "attempts"
        self.prepared = self.path / ".prepared.json"
        self.model = self.path / "model"
        self.weights = self.model / "model.safetensors"
        self.log = self.path / "log.txt"
        self.trackers = self.path / "trackers"
        self.result = self.path / "result.json"
        self.submit_script = self.path / "submit.sh"
        self.slurm = self.path / "slurm.json"

    @classmethod
    def create(cls, root: Path, job_name: str) -> RunDir:
        """Make a new, empty run folder under `root`.

        Raises:
            StorageError: if the folder cannot be made.
        """
        stamp = new_stamp()
        with storage_errors():
            for number in range(100):
                path = root / job_name / (stamp if number == 0 else f"{stamp}-{number}")
                try:
                    path.mkdir(parents=True)
                except FileExistsError:
                    continue
                return cls(path)
        raise StorageError(f"{root / job_name}/{stamp} and 99 names after it are taken")

    @classmethod
    def all(cls, root: Path, job_name: str) -> list[RunDir]:
        """Every run of a job under `root`, the newest last."""
        folders = (root / job_name).glob("*/job.toml")
        return [cls(file.parent) for file in sorted(folders, key=lambda f: _stamp(f.parent.name))]

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Take an existing run folder.

        Raises:
            RunDirError: if there is no run at `path`.
        """
        run = cls(path)
        if not is_there(run.job):
            raise RunDirError(f"{path} is no run folder: it has no job.toml")
        return run

    @cached_property
    def set_names(self) -> tuple[str, ...]:
        """Names of the validation sets, by the run's own job; none without one.

        Raises:
            StorageError: if that cannot be read now.
        """
        try:
            return tuple(str(one.name) for one in recorded_job(self.job).data.scored)
        except DataError:
            return ()

    @property
    def further_sets(self) -> tuple[str, ...]:
        """Those after the first, whose files have names of their own."""
        return self.set_names[1:]

    def eval_table_of(self, name: str) -> Path:
        """eval.csv of a further validation set."""
        return self.path / f"eval-{name}.csv"

    def predictions_of(self, name: str) -> Path:
        """predictions.jsonl of a further validation set."""
        return self.path / f"predictions-{name}.jsonl"

    @property
    def tables(self) -> tuple[Path, ...]:
        """The tables that grow as training goes on."""
        further = map(self.eval_table_of, self.further_sets)
        return (self.train_table, self.eval_table, *further, self.probe_table)

    @property
    def answer_files(self) -> tuple[Path, ...]:
        """The predictions of all validation sets."""
        return (self.predictions, *map(self.predictions_of, self.further_sets))

    @property
    def written(self) -> tuple[Path, ...]:
        """All that a run writes; what stands beside it (submit.sh, a user's notes) is not its."""
        return (
            *(self.job, self.provenance, self.deepspeed, *self.tables, *self.answer_files),
            self.repairs,
            *(self.curves_svg, self.curves_png, self.report, self.report_page, self.evaluations),
            *(self.checkpoints, self.attempts, self.model, self.log, self.result),
        )

    def finished(self) -> bool:
        """Whether the run succeeded.

        Raises:
            StorageError: if that cannot be told now.
        """
        return is_there(self.result)


def checkpoint_name(step: int, attempt: int, *, scored: bool) -> str:
    """Name of the checkpoint that an attempt takes after `step` optimiser steps, before or after
    the model was scored there."""
    return f"step-{step:06d}{'-scored' if scored else ''}-a{attempt:04d}"


def checkpoint_place(name: str) -> tuple[int, bool, int] | None:
    """Step, scored, attempt of a checkpoint's name, which order checkpoints; None for other
    names."""
    found = re.fullmatch(r"step-(\d{6,})(-scored)?-a(\d{4,})", name, re.ASCII)
    return (int(found[1]), bool(found[2]), int(found[3])) if found else None


def committed_steps(run: RunDir) -> list[int]:
    """Steps of all checkpoints that stand under their final name.

    Raises:
        StorageError: if they cannot be listed now.
    """
    with storage_errors(run.checkpoints):
        try:
            places = map(checkpoint_place, os.listdir(run.checkpoints))
        except FileNotFoundError:
            return []
    return [place[0] for place in places if place]


def new_stamp() -> str:
    """Name a new run by the time, UTC to the second."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def _stamp(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if stem.count("-") and number.isdecimal() else (name, 0)
