"""How far runs are: from their folders, and from SLURM where they were given to it."""

from __future__ import annotations

import csv
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from runner.errors import DataError, RunDirError, RunnerError, SlurmError, StorageError, printable
from runner.run.attempts import AttemptRecord, EndRecord, attempt_numbers, entry_file
from runner.run.folder import RunDir
from runner.run.sweep import SWEEP_MANIFEST, read_manifest
from runner.slurm.client import FORGOTTEN, KILLED, SlurmJob, Submission, job_states, read_submission
from runner.slurm.starts import (
    NewestStart,
    last_line,
    modified,
    newest_start,
    started_before,
    started_elsewhere,
)
from runner.utils.files import below_here, read_json, read_regular
from runner.utils.tables import CellValue, read_rows
from runner.utils.text import duration, first_line

SHOWN = 20  # runs that are listed if none is named


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        run: its folder.
        state: in a word or two.
        over: whether it will not go on by itself.
        job: its name in SLURM; None outside.
        epoch, epochs: how much of the training is done, and how much there is.
        f1: of its newest evaluation, percent.
        left: seconds of training left at its present speed; None if it is not running.
        limit: time left until SLURM's limit, as SLURM spells it.
        place: where it runs.
        message: why it is over, if it did not succeed.
    """

    run: RunDir
    state: str
    over: bool
    job: str | None
    epoch: float | None
    epochs: int | None
    f1: float | None
    left: float | None
    limit: str
    place: str
    message: str = ""

    @property
    def sentence(self) -> str:
        """State and message."""
        return ": ".join(filter(None, (self.state, self.message)))

    def name(self, root: Path) -> str:
        """What to call the run; runs below `root` are called by what follows it."""
        path, root = self.run.path, root.absolute()
        return str(path.relative_to(root)) if root in path.parents else below_here(path)

    def row(self, root: Path) -> dict[str, CellValue]:
        """One row of the table."""
        done = "0" if self.epoch is None else f"{self.epoch:.3g}"
        return {
            "run": self.name(root),
            "state": self.state,
            "job": self.job,
            "epoch": f"{done}/{self.epochs}" if self.epochs else done,
            "F1 %": self.f1,
            "left": None if self.left is None else duration(self.left),
            "limit": self.limit or None,
            "on": self.place or None,
        }


def find_runs(named: Sequence[Path], root: Path) -> list[RunDir]:
    """The runs to tell of: those named, all trials of a sweep that is named, all below a folder
    that is named, or the newest below `root`, oldest first.

    Raises:
        RunDirError: if a name is none of these.
    """
    if named:
        pairs = ((path, _runs_at(path)) for path in named)
        return [
            run for path, runs in pairs for run in (_some_below(path) if runs is None else runs)
        ]
    runs = _runs_below(root)
    return sorted(runs, key=lambda run: max(map(modified, (run.job, run.path / SWEEP_MANIFEST))))[
        -SHOWN:
    ]


def named_runs(named: Sequence[Path]) -> list[RunDir]:
    """The runs that are meant by their own names, or by that of their sweep.

    Raises:
        RunDirError: if a name is neither; that runs lie below it is not enough.
    """
    meant: list[RunDir] = []
    for path in named:
        runs = _runs_at(path)
        if runs is None:
            raise RunDirError(
                f"{path} is no run folder: it has no job.toml; name those of the"
                f" {len(_some_below(path))} runs below it that are meant"
            )
        meant += runs
    return meant


def run_statuses(runs: Iterable[RunDir]) -> tuple[list[RunStatus], str | None]:
    """Where each run stands, `damaged: ...` if its folder does not tell; and a sentence if SLURM
    was asked and did not answer."""
    pairs = [(run, _submission(run)) for run in runs]
    job_names = [
        sub.name for run, sub in pairs if isinstance(sub, Submission) and not run.finished()
    ]
    jobs: Mapping[str, SlurmJob] = {}
    silence = None
    try:
        jobs = job_states(job_names)
    except SlurmError as error:
        silence = f"{error}; what follows is from the run folders alone"
    return [_shown(run, sub, jobs, answered=silence is None) for run, sub in pairs], silence


def table_rows(statuses: Sequence[RunStatus], root: Path) -> list[dict[str, CellValue]]:
    """The table of these runs, without columns that would be empty."""
    rows = [status.row(root) for status in statuses]
    empty = {key for key in (rows[0] if rows else ()) if all(row[key] is None for row in rows)}
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def _submission(run: RunDir) -> Submission | Exception | None:
    """The run's submission, or why its folder is damaged."""
    try:
        if (run.path / SWEEP_MANIFEST).is_file() and not run.job.is_file():
            read_manifest(run.path)  # of a sweep that could not be read
        run.finished()
        newest = max(attempt_numbers(run), default=0)
        for kind, record in (("json", AttemptRecord), ("end.json", EndRecord)):
            _check_entry(entry_file(run, newest, kind), record)
        return read_submission(run.slurm)
    except (RunnerError, OSError) as error:
        return error


def _check_entry(path: Path, kind: type) -> None:
    """DataError if an entry of the ledger is JSON of another kind; one that is none may be being
    written."""
    try:
        read_json(path, object)
    except (OSError, ValueError, RecursionError):
        return
    try:
        read_json(path, kind)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _shown(
    run: RunDir,
    submission: Submission | Exception | None,
    jobs: Mapping[str, SlurmJob],
    *,
    answered: bool,
) -> RunStatus:
    """Where a run stands: a folder that anybody may have filled costs its own row, no other."""
    try:
        if isinstance(submission, Exception):
            raise submission
        return _run_status(run, submission, jobs, answered=answered)
    except Exception as error:
        said = first_line(error).replace(f"{run.path}/", "")
        return RunStatus(run, f"damaged: {said}", True, None, None, None, None, None, "", "")


def _run_status(
    run: RunDir, submission: Submission | None, jobs: Mapping[str, SlurmJob], *, answered: bool
) -> RunStatus:
    start, job = newest_start(run), None
    if submission is not None and answered and not run.finished():
        job = {submission.name: FORGOTTEN, **jobs}[submission.name]
    if (start and submission and started_elsewhere(start, submission)) and (
        start.alive or (job is not None and job.ended)
    ):
        submission = job = None
    if start and submission and job and job.ended and started_before(start, submission):
        start = None  # the job that was submitted since has begun nothing
    state, over = _state(run, start, job)
    training, evaluations = _rows(run.train_table), _rows(run.eval_table)
    epoch = _number(training[-1], "epoch") if training else None
    epochs = _epochs(run)
    is_running = start is not None and start.alive
    speed = _speed(training) if is_running else None
    return RunStatus(
        run,
        state,
        over,
        submission.name if submission else None,
        epoch,
        epochs,
        _number(evaluations[-1], "f1_percent") if evaluations else None,
        (epochs - epoch) / speed if speed and epochs and epoch is not None else None,
        job.time_left if job and job.state == "RUNNING" else "",
        (job.nodes if job and not over else "") or (_where(start) if start and is_running else ""),
        _message(run, start) if over else "",
    )


def _message(run: RunDir, start: NewestStart | None) -> str:
    """Why a run is over; nothing if it succeeded. Of one that was killed, and of a job that failed
    before its run began, nothing is left but the last line of the log."""
    if run.finished() and (start is None or start.exit_code != 78):
        return ""
    if start is not None and start.message:
        said = start.message
        for name in (str(run.path), below_here(run.path)):  # which the reader knows
            said = said.removeprefix(f"{name}: ")
        return said
    return last_line(run)


def _state(run: RunDir, start: NewestStart | None, job: SlurmJob | None) -> tuple[str, bool]:
    """A run's state in a few words, and whether it is over."""
    alive = start is not None and start.alive
    if run.finished():
        missed = start is not None and start.exit_code == 78
        return ("finished, [expect] missed" if missed else "finished"), True
    if job is not None and job.waits:
        word = "pending" if start is None else "requeued"
        return (f"{word} ({job.reason})" if job.reason not in ("", "None") else word), False
    if job is not None and not job.ended:
        if job.state != "RUNNING":
            return ("suspended" if job.state == "SUSPENDED" else "ending"), False
        return ("running" if alive else "starting"), False
    if alive:
        return "running", False
    if job is not None and job.state in KILLED:
        return job.state.lower().replace("_", " "), True
    if start is None:
        return ("not started" if job is None else "ended before it began"), True
    if start.exit_code is None:
        return "lost: it was killed", True
    if start.exit_code == 75:
        return "interrupted", True
    return f"failed ({start.exit_code})", True


def _runs_at(path: Path) -> list[RunDir] | None:
    """The run in a folder, or those of the sweep in it; None if there is neither."""
    if (path / SWEEP_MANIFEST).is_file():
        trials = [RunDir(path / entry.name) for entry in read_manifest(path).trials]
        # A link may lead to a run that nobody has named.
        return [run for run in trials if run.job.is_file() and not run.path.is_symlink()]
    run = RunDir(path)
    return [run] if run.job.is_file() else None


def _some_below(path: Path) -> list[RunDir]:
    return _runs_below(path) or [RunDir.open(path)]  # which says what it lacks


def _runs_below(root: Path) -> list[RunDir]:
    """All runs one and two folders below, and the trials of all sweeps there."""
    found: list[RunDir] = []
    for pattern in ("*", "*/*"):
        for job in sorted(root.glob(f"{pattern}/job.toml")):
            above = job.parent.parent
            # What --restart has put aside in a run is no run; of trials the manifest tells.
            if job.is_file() and (above == root or not _is_run_or_sweep(above)):
                found.append(RunDir(job.parent))
        for manifest in sorted(root.glob(f"{pattern}/{SWEEP_MANIFEST}")):
            try:
                found += _runs_at(manifest.parent) or ()
            except (DataError, StorageError):
                found.append(RunDir(manifest.parent))  # shown as damaged
    return found


def _is_run_or_sweep(path: Path) -> bool:
    return any((path / name).is_file() for name in ("job.toml", SWEEP_MANIFEST))


def _where(start: NewestStart) -> str:
    return "here" if start.record.host == socket.gethostname() else printable(start.record.host)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        return read_rows(path)
    except (OSError, StorageError, ValueError, csv.Error):
        return []


def _number(row: Mapping[str, str], key: str) -> float | None:
    try:
        return float(row[key])
    except (KeyError, ValueError, TypeError):  # a row that is being written
        return None


def _epochs(run: RunDir) -> int | None:
    try:
        job: dict[str, Any] = tomli.loads(read_regular(run.job).decode("utf-8"))
        return int(job["train"]["epochs"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _speed(training: Sequence[Mapping[str, str]]) -> float | None:
    """Epochs a second over the last rows of this start; its clock begins anew with each start."""
    points = [(_number(row, "elapsed_seconds"), _number(row, "epoch")) for row in training[-50:]]
    known = [(seconds, epoch) for seconds, epoch in points if seconds is not None and epoch]
    last = len(known) - 1
    first = last
    while first > 0 and known[first - 1][0] < known[first][0]:
        first -= 1
    if first >= last:
        return None
    (began, before), (ended, after) = known[first], known[last]
    return (after - before) / (ended - began) if after > before else None
