"""What a run tells while it goes on."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from runner.job.schema import Track
from runner.run.folder import RunDir
from runner.train.run_log import RunLog
from runner.utils.ranks import Rank
from runner.utils.tables import append_row, read_rows


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path, capsys):
    run = RunDir(tmp_path)
    append_row(run.train_table, {"step": "of whom?", "epoch": 1, "loss_nats": 2})
    job: Any = SimpleNamespace(name="n", track=Track(), model_dump=lambda **_: {})
    RunLog(job, run, Rank(0, 1, 0, 1), None).curves()
    assert "no curves: " in capsys.readouterr().out


def log_of_steps(tmp_path, monkeypatch, clock) -> tuple[Any, RunDir, Any]:
    """A log whose rows are numbers of steps, a folder, and the fsyncs that it asks for."""
    run, synced = RunDir(tmp_path), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file)))
    monkeypatch.setattr("runner.train.run_log.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("runner.train.run_log.train_row", lambda state, *_: {"step": state})
    train: Any = SimpleNamespace(epochs=1, log_every=1)
    job: Any = SimpleNamespace(name="n", track=Track(), train=train, model_dump=lambda **_: {})
    return RunLog(job, run, Rank(0, 1, 0, 1), None), run, synced


def test_rows_of_steps_are_written_once_a_second_and_waited_for_by_nobody(tmp_path, monkeypatch):
    clock = [100.0]
    log, run, synced = log_of_steps(tmp_path, monkeypatch, clock)
    seen = []
    for number in range(10):
        log.step(number, None, None)
        seen.append(len(read_rows(run.train_table)))
        clock[0] += 0.25
    assert seen == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9]
    log.write_steps()
    log.write_steps()
    assert [row["step"] for row in read_rows(run.train_table)] == [str(n) for n in range(10)]
    assert synced == []


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_an_epoch_leaves_no_row_of_its_steps_unwritten(tmp_path, monkeypatch, error):
    log, run, _ = log_of_steps(tmp_path, monkeypatch, [0.0])
    state: Any = SimpleNamespace(epoch=1, steps_per_epoch=2)
    with pytest.raises(error) if error else nullcontext(), log.steps(state):
        log.step(1, None, None)
        log.step(2, None, None)
        if error:
            raise error
    assert len(read_rows(run.train_table)) == 2
