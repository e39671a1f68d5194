"""Tells what a run does while it goes on: terminal and log.txt, tables, curves, trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from runner.checkpoint.best import BestEvaluation
from runner.errors import RunnerError, StorageError
from runner.eval.evaluation import Evaluation
from runner.eval.inference import Predictions
from runner.eval.results import headline
from runner.job.schema import Job
from runner.report.plots import draw_curves
from runner.run.folder import RunDir
from runner.run.lease import Lease
from runner.tracking.client import Trackers, start_trackers
from runner.train.setup import Session
from runner.train.state import Totals, TrainState
from runner.train.summary import (
    INTERVAL_COLUMNS,
    detail_lines,
    epoch_rows,
    eval_row,
    opening_lines,
    probe_table,
    train_row,
    write_repairs,
)
from runner.utils.console import Reporter, Step
from runner.utils.files import below_here, write_json
from runner.utils.ranks import Rank
from runner.utils.tables import CellValue, append_row, append_rows, rich_table
from runner.utils.text import first_line

_ROWS_PAUSE_S = 1.0  # between two times that rows of train.csv are written
_PROMPT_ROWS = 10  # of a start, which are written at once: that is when somebody looks
# Phases of a run's timer that a person waits for, by their names.
PHASES = {
    "data": "reading the data",
    "model": "loading the model",
    "frozen": "computing the frozen layers",
    "evaluation": "evaluating",
    "verification": "proving the export: a fresh process opens model/",
}
ALL_ROWS = 10_000


class RunLog:
    """What rank 0 tells of a run; on other ranks every method is silent.

    Args:
        job, run: whose.
        rank: this one.
        lease: on the run folder, on rank 0: it is verified before each file is written.
        verbose: whether the terminal gets all that the log does.
    """

    def __init__(
        self, job: Job, run: RunDir, rank: Rank, lease: Lease | None, *, verbose: bool = False
    ) -> None:
        self._job, self._run, self._rank = job, run, rank
        self._fence = lease.verify if lease else lambda: None
        self._reporter = Reporter(run.log, speaks=rank.is_main, verbose=verbose)
        self._has_table = False
        self._scoring_s: float | None = None  # what the newest evaluation took
        self._validation_share = 0.0  # windows that are scored, for each that is trained an epoch
        self.line(f"{job.name}: {below_here(str(run.path))}", indent="")
        self._step_rows: list[dict[str, CellValue]] = []
        self._steps_written = -math.inf
        self._prompt_rows = _PROMPT_ROWS
        self._trackers = Trackers((), 0, self.line)
        if rank.is_main:
            config = job.model_dump(mode="json", exclude_none=True, exclude={"probe", "track"})
            self._trackers = start_trackers(job.track, run, job.name, config, self.line)

    def line(self, text: str, indent: str = "  ", *, detail: bool = False) -> None:
        """Print a line; a detail goes into the log, and to the terminal of a verbose run."""
        self._reporter.line(f"{indent}{text}", detail=detail)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Name a phase of the timer while it lasts, if it takes long."""
        text = PHASES.get(name) if self._rank.is_main else None
        return self._reporter.phase(f"  {text}") if text else nullcontext()

    def table(self, title: str, rows: Sequence[dict[str, CellValue]], **options: Any) -> None:
        """Print a table."""
        if self._rank.is_main:
            self._reporter.table(rich_table(title, rows, **options))

    def begin(self, session: Session) -> None:
        """Say what is about to happen."""
        if not self._rank.is_main:
            return
        write_json(self._run.deepspeed, session.config, self._fence)
        write_repairs(self._run, session.splits.sets, self._fence)
        for text in opening_lines(session):
            self.line(text)
        for text in detail_lines(session):
            self.line(text, detail=True)
        scored = sum(len(split.windows) for split in session.splits.sets.validation.values())
        self._validation_share = scored / session.sampler.windows
        if self._job.model.freeze:
            self.table("Frozen layers", session.parameters)

    def resume(self, state: TrainState, total_steps: int, checkpoint: str) -> None:
        """Say where a run goes on, and remind the trackers of what it had found."""
        self._trackers.resume(state.probe_rows)
        self.line(f"goes on after step {state.step} of {total_steps} ({checkpoint})")

    @contextmanager
    def steps(self, state: TrainState) -> Iterator[Step]:
        """Follow the steps of the epoch that is trained."""
        section, total = self._job.train, state.steps_per_epoch
        epochs, every = range(state.epoch, section.epochs + 1), section.eval_every
        scorings = sum(epoch % every == 0 or epoch == section.epochs for epoch in epochs)

        def later(pace: float) -> float:
            # Before the first evaluation: a forward pass is a third of a training step.
            guess = pace * total * self._validation_share / 3
            scoring = guess if self._scoring_s is None else self._scoring_s
            return pace * total * (len(epochs) - 1) + scorings * scoring

        title = f"epoch {state.epoch}/{section.epochs}"
        with self._reporter.steps(title, total, section.log_every, later) as follow:
            try:
                yield follow
            except BaseException:
                with suppress(StorageError):
                    self.write_steps()
                raise
            self.write_steps()

    def step(self, state: TrainState, totals: Totals, engine: Any) -> None:
        """A row of train.csv: the first ones are written at once, later ones once a second at most,
        because the device has nothing to do while a file server is waited for."""
        if self._rank.is_main:
            self._step_rows.append(train_row(state, totals, engine))
            self._prompt_rows -= 1
            if self._prompt_rows >= 0 or time.monotonic() - self._steps_written >= _ROWS_PAUSE_S:
                self.write_steps()

    def write_steps(self) -> None:
        """Write the rows of train.csv that are not there yet. A checkpoint keeps the table: nobody
        waits for the disk."""
        if self._step_rows:
            table, rows = self._run.train_table, self._step_rows
            append_rows(table, rows, self._fence, durable=False)
            for row in rows:
                self._trackers.log(table.stem, row)
            rows.clear()
            self._steps_written = time.monotonic()

    def probes(self, state: TrainState, epoch: int, found: Predictions) -> None:
        """Rows of probes.csv: the probes' answers after an epoch, 0 before training."""
        rows = probe_table(epoch, found, self._job.probe)
        state.probe_rows.extend(rows)
        for row in rows:
            self._row(self._run.probe_table, row)

    def evaluation(self, state: TrainState, scores: Mapping[str, Evaluation]) -> None:
        """A row of eval.csv for each validation set, the curves, and a row of the table of epochs
        for each."""
        tables = [self._run.eval_table, *map(self._run.eval_table_of, [*scores][1:])]
        for table, found in zip(tables, scores.values(), strict=True):
            self._row(table, eval_row(state.epoch, state.step, state.totals, found))
        self.curves()
        self._scoring_s = sum(found.predictions.seconds for found in scores.values())
        if self._rank.is_main:
            table = rich_table("", epoch_rows(self._run), right=INTERVAL_COLUMNS)
            self._reporter.table(table, rows=len(scores) if self._has_table else ALL_ROWS)
            self._has_table = True

    def scores(self) -> None:
        """The whole table of epochs, where other lines stand between its rows."""
        rows = epoch_rows(self._run)
        if len(rows) > 1 + len(self._run.further_sets) and not self._reporter.live:
            self.table("", rows, right=INTERVAL_COLUMNS)

    def curves(self) -> None:
        """The curves so far; a picture that cannot be drawn or written is drawn again later."""
        if not self._rank.is_main:
            return
        try:
            draw_curves(self._run, self._job.name, self._fence)
        except StorageError as error:
            self.line(f"no curves: {error}")
        except RunnerError:  # the folder is no longer ours
            raise
        # The user's fonts, caches, settings of matplotlib: an epoch is worth more than a picture.
        except Exception as error:
            self.line(f"no curves: {type(error).__name__}: {first_line(error)}")

    def finish(self, best: BestEvaluation) -> None:
        """Give the trackers the last scores, and let them end."""
        further = {
            f"{name}/{metric}": value
            for name, scores in best.further.items()
            for metric, value in headline(scores).items()
        }
        self._trackers.log("result", headline(best.scores) | further)
        self._trackers.close()

    def _row(self, table: Path, row: dict[str, CellValue]) -> None:
        append_row(table, row, self._fence)
        self._trackers.log(table.stem, row)
