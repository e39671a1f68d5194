"""Owns every file name of a run, and writes files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner.errors import RunDirError, StorageError


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
        self.predictions = self.path / "predictions.jsonl"
        self.curves_svg = self.path / "curves.svg"
        self.curves_png = self.path / "curves.png"
        self.report = self.path / "report.md"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.log = self.path / "log.txt"
        self.result = self.path / "result.json"
        self.submit_script = self.path / "submit.sh"
        self.slurm = self.path / "slurm.json"

    @classmethod
    def create(cls, root: Path, job_name: str, exact: Path | None = None) -> RunDir:
        """Make a new run folder under `root`, or at `exact`; one that already holds a run is
        refused.

        Raises:
            RunDirError: if `exact` already holds a run.
            StorageError: if the folder cannot be made.
        """
        with storage_errors():
            if exact is not None:
                exact.mkdir(parents=True, exist_ok=True)
                run = cls(exact)
                try:
                    run.job.touch(exist_ok=False)
                except FileExistsError:
                    raise RunDirError(
                        f"{exact} already holds a run; give another folder to --run-dir or move"
                        " that one away"
                    ) from None
                return run
            stamp = new_stamp()
            for attempt in range(100):
                path = root / job_name / (stamp if attempt == 0 else f"{stamp}-{attempt}")
                try:
                    path.mkdir(parents=True)
                except FileExistsError:
                    continue
                return cls(path)
        raise RunDirError(f"{root / job_name}/{stamp} and 99 names after it are taken")

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Take an existing run folder.

        Raises:
            RunDirError: if there is no run at `path`.
        """
        run = cls(path)
        if not run.job.is_file():
            raise RunDirError(f"{path} is no run folder: it has no job.toml")
        return run

    def checkpoint(self, step: int) -> str:
        """Name of the checkpoint taken after `step` optimiser steps."""
        return f"step-{step:06d}"

    def finished(self) -> bool:
        """Whether the run succeeded."""
        return self.result.is_file()


def below_here(name: str | Path) -> str:
    """Spell a path relative to the current folder where it is below it; other names stay."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(name)


def new_stamp() -> str:
    """Name a new run by the time, UTC to the second."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def write_atomic(path: Path, text: str) -> None:
    """Write a text file aside and rename it into place.

    Raises:
        StorageError: naming the file and the reason; what stood there before is untouched.
    """
    with storage_errors(path):
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            # A command line may hold bytes that are no UTF-8; \udcff is their spelling in JSON too.
            with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, aside and renamed."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def storage_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an OSError into one sentence that names the file and, for a full disk or quota, what to
    do."""
    try:
        yield
    except OSError as error:
        name = path or error.filename or "a file"
        hint = "; free some space or choose another folder with --runs" if _is_full(error) else ""
        raise StorageError(f"{name}: {error.strerror or error}{hint}") from error


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
