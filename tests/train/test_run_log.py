"""What a run tells while it goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from runner.job.schema import Track
from runner.run.folder import RunDir
from runner.train.run_log import RunLog
from runner.utils.ranks import Rank
from runner.utils.tables import append_row


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path, capsys):
    run = RunDir(tmp_path)
    append_row(run.train_table, {"step": "of whom?", "epoch": 1, "loss_nats": 2})
    job: Any = SimpleNamespace(name="n", track=Track(), model_dump=lambda **_: {})
    RunLog(job, run, Rank(0, 1, 0, 1), None).curves()
    assert "no curves: " in capsys.readouterr().out
