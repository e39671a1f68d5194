"""What a run says of itself: rows of its tables on the terminal, hashes, last lines."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import numpy as np
import pytest
from rich.console import Console

from runner.data.dataset import Dataset, Example
from runner.data.splits import LoadedSets, Split
from runner.job.load import dump_job
from runner.job.schema import Job
from runner.run.folder import RunDir
from runner.train.summary import (
    INTERVAL_COLUMNS,
    closing_lines,
    data_hashes,
    epoch_rows,
    latest_threshold,
    opening_lines,
    probe_changes,
)
from runner.utils.tables import append_row, rich_table

SCORES = {
    "train_loss_nats": 3.9456,
    "train_span_accuracy_percent": 3.146,
    "validation_loss_nats": 2.885,
    "exact_match_percent": 18.25,
    "exact_match_low_percent": 14.0,
    "exact_match_high_percent": 23.0,
    "f1_percent": 29.84,
    "f1_low_percent": 25.0,
    "f1_high_percent": 34.5,
    "span_accuracy_percent": 12.9,
    "train_seconds": 60.25,
    "evaluation_seconds": 4.0,
    "examples_per_second": 15.9,
}


@pytest.fixture
def run(tmp_path) -> RunDir:
    found = RunDir(tmp_path)
    for epoch in (1, 2):
        append_row(found.eval_table, {"epoch": epoch, **SCORES, "f1_percent": 29.84 * epoch})
    return found


def test_the_table_of_epochs_tells_scores_with_their_intervals(run):
    first, second = epoch_rows(run)
    assert list(first.values()) == [
        *(1, 3.9456, 3.146, 2.885, 12.9, " 18.2 ±4.5", " 29.8 ±4.8", 64, 15.9)
    ]
    assert second[INTERVAL_COLUMNS[1]] == " 59.7 ±4.8"


def test_the_table_of_epochs_fits_a_terminal_line_by_line(tmp_path):
    """Also with the widest scores, and a loss so small that it has an exponent."""
    wide = {"exact_match_percent": 50.0, "exact_match_low_percent": 0.0}
    wide |= {"exact_match_high_percent": 100.0, "train_loss_nats": 5e-4}
    wide |= {"train_seconds": 12345.0, "examples_per_second": 1234.5}
    run = RunDir(tmp_path)
    append_row(run.eval_table, {"epoch": 1, **SCORES})
    append_row(run.eval_table, {"epoch": 12, **SCORES, **wide})
    screen = Console(file=io.StringIO(), width=80)
    screen.print(rich_table("", epoch_rows(run), right=INTERVAL_COLUMNS))
    lines = cast(io.StringIO, screen.file).getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    head, *rows = (f"{line} " for line in lines if "±" in line)
    assert len(rows) == 2
    assert "5.00e-04" in rows[1]
    assert "50.0 ±50.0" in rows[1]
    # A column's numbers stand under each other: they end where its name ends.
    for end in (head.index("CI") + 2, head.rindex("CI") + 2, head.index("win/s") + 5):
        assert all(row[end - 1].isdigit() and row[end] == " " for row in rows)


def test_with_several_sets_each_has_a_row_that_fits_too(tmp_path):
    wide = {"exact_match_percent": 50.0, "exact_match_low_percent": 0.0}
    wide |= {"exact_match_high_percent": 100.0, "train_loss_nats": 5e-4}
    wide |= {"validation_loss_nats": 5e-4, "train_seconds": 12345.0}
    run = RunDir(tmp_path)
    sets = [{"source": "o/n", "name": "x" * 40}, {"source": "o/n", "name": "second"}]
    data = {"train": "o/n", "validation": sets}
    train = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-5}
    job = {"name": "n", "data": data, "model": {"name": "o/n"}, "train": train}
    run.job.write_text(dump_job(Job.model_validate(job)))
    for table in (run.eval_table, run.eval_table_of("second")):
        append_row(table, {"epoch": 12, **SCORES, **wide})
    append_row(run.eval_table, {"epoch": 13, **SCORES, **wide})  # before that of the second
    rows = epoch_rows(run)
    assert [(row["epoch"], row["set"]) for row in rows] == [(12, "xxxxxxxxx..."), (12, "second")]
    assert [row["train\nloss"] for row in rows] == [5e-4, None]
    screen = Console(file=io.StringIO(), width=80)
    screen.print(rich_table("", rows, right=INTERVAL_COLUMNS))
    shown = cast(io.StringIO, screen.file).getvalue().splitlines()
    lines = [line for line in shown if line.strip()]
    assert len(lines) == 5  # two of the head, a rule, a line for each row
    assert max(map(len, lines)) <= 80


def asked(epoch: int, probe: int, answer: str, start: int = 0) -> dict[str, Any]:
    place = {"start_character": start, "end_character": start + len(answer)}
    row = {"epoch": epoch, "probe": probe, "question": f"Question {probe}?", "answer": answer}
    return row | {"score": 0.5, **place, "expected": None}


def test_the_table_of_probes_shows_each_answer_that_is_new_and_the_last():
    rows = [
        *(asked(0, 1, "wash", 189), asked(0, 2, "")),
        *(asked(1, 1, "nine", 74), asked(1, 2, "")),
        *(asked(2, 1, "nine", 74), asked(2, 2, "linen", 4)),
        *(asked(3, 1, "nine", 74), asked(3, 2, "wash", 189)),
    ]
    shown = [tuple(row.values()) for row in probe_changes(rows)]
    assert shown == [
        ("Question 1?", "no training", "wash", 0.5, "189-193"),
        ("", "epoch 1", "nine", 0.5, "74-78"),
        ("", "epoch 3", "nine", 0.5, "74-78"),  # the last is shown in any case
        ("Question 2?", "no training", "(no answer)", 0.5, "0-0"),
        ("", "epoch 2", "linen", 0.5, "4-9"),
        ("", "epoch 3", "wash", 0.5, "189-193"),
    ]
    assert list(probe_changes(rows)[0]) == ["question", "after", "answer", "score", "characters"]
    assert probe_changes([]) == []


def test_the_latest_threshold_is_read_back_to_the_bit(tmp_path):
    run = RunDir(tmp_path)
    assert latest_threshold(run) is None
    for threshold in (0.5, 0.1 + 0.2):
        append_row(run.eval_table, {"epoch": 1, "null_threshold_logits": threshold})
    assert latest_threshold(run) == 0.1 + 0.2


def test_a_run_that_always_answers_has_no_threshold(run):
    assert latest_threshold(run) is None


def test_two_samples_of_one_slice_have_a_hash_each():
    one, other = (
        SimpleNamespace(dataset=SimpleNamespace(source="o/n:dev", sha256=digest))
        for digest in ("a1", "b2")
    )
    sets: Any = {"a": one}, {"b": other, "c": one}
    assert data_hashes(LoadedSets(sets[0], {"b": sets[1]["b"]}, None)) == {
        "training": "a1",
        "validation": "b2",
    }
    assert data_hashes(LoadedSets(*sets, sets[0]["a"])) == {
        "training": "a1",
        "validation b": "b2",
        "validation c": "a1",
        "tuning": "a1",
    }


def test_the_first_lines_count_rows_that_contradict_themselves():
    told = "2 questions taken as without an answer where is_impossible is true beside an answer"
    windows = MagicMock(lengths_N=np.array([3]))
    dataset = Dataset("t", (Example("a", "q", "c", (), ()),), "f" * 64, (), None, (told,))
    split = Split(dataset, windows, cached=False)
    session = MagicMock(notes=(), caveats=[], parameters=[{"parameters": 1, "trained": 1}])
    session.splits.sets.named.return_value = {"train": split}
    assert f"train: {told}" in opening_lines(session)


def test_the_last_lines_say_what_was_scored(tmp_path):
    data = {"train": "o/n:train", "validation": "o/n:dev", "validation_sample": 1500}
    train = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-5}
    job = Job.model_validate({"name": "n", "data": data, "model": {"name": "o/n"}, "train": train})
    result = {
        "metrics": {"exact_match": 40.1, "f1": 57.0},
        "intervals": {"exact_match": [34.4, 45.9], "f1": [52.0, 62.25]},
        "questions": 1500,
        "seconds": {"total": 61.0},
    }
    lines = closing_lines(job, RunDir(tmp_path), result)
    assert lines[0] == (
        "Exact match 40.1 % [34.4 to 45.9], F1 57.0 % [52.0 to 62.2] on o/n:dev,"
        " 1,500 of its questions drawn with the seed"
    )
    assert "1,500 questions" in lines[1]
