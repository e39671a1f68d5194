"""Run folders of earlier versions: finished ones are read as ever, and cut ones go on."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest

from runner.report.read import read_run
from runner.run.folder import RunDir
from runner.slurm.status import run_statuses
from runner.utils.tables import read_rows

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Made by commit e497f8b, before the packages of runner/ came to be: a tiny BERT, 46 steps, one
    run finished and one stopped after step 41."""
    return _unpacked(GOLDEN / "runs_e497f8b.tar.xz", tmp_path)


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """Made by the first commit whose checkpoints note labels and job: the same, stopped after step
    27."""
    return _unpacked(GOLDEN / "runs_54b9454.tar.xz", tmp_path)


def _unpacked(folders: Path, tmp_path: Path) -> Path:
    """The folders, their jobs told where model and questions are now: they were below /srv/qa."""
    with tarfile.open(folders) as archive:
        archive.extractall(tmp_path, filter="data")
    names = {"/srv/qa/model": tmp_path / "model"}
    for split in ("train", "validation"):
        names[f"/srv/qa/{split}.json"] = ROOT / "jobs" / "data" / f"product_qa_{split}.json"
    for job in tmp_path.glob("*/job.toml"):
        text = job.read_text()
        for old, new in names.items():
            text = text.replace(old, str(new))
        job.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "{run}"), "report.html"),
        (("status", "{run}"), "finished"),
        (("evaluate", "{run}", "--data", "{data}[:4]"), "Exact match"),
        (("predict", "{run}", "--question", "Who?", "--context", "Ada wrote it."), '"answer"'),
    ],
)
def test_a_finished_run_is_read_as_ever(zygote, older, arguments, words):
    names = {"run": older / "finished", "data": ROOT / "jobs/data/product_qa_validation.json"}
    words_given = [word.format(**names) for word in arguments]
    codes, text = _command(zygote, words_given)
    assert codes == [0], text
    assert words in text


def test_an_end_that_was_noted_without_a_message_has_the_last_line_of_the_log(older):
    [status], _ = run_statuses([RunDir(older / "cut")])
    assert status.state == "interrupted"
    assert re.match(r"log\.txt ends with: \d\d:\d\d:\d\d epoch 2/2 18/23 ", status.message)
    [status], _ = run_statuses([RunDir(older / "finished")])
    assert (status.state, status.message) == ("finished", "")


def _command(zygote, words: list[str]) -> tuple[list[int], str]:
    code = (
        "import os, sys\n"
        "import runner.cli.command\n"
        f"code = runner.cli.command.main({words!r})\n"
        "sys.stdout.flush()\n"
        "os._exit(code)\n"
    )
    return zygote.run(code=code)


def test_its_records_say_what_they_said(older):
    found = read_run(older / "finished")
    result = json.loads(RunDir(older / "finished").result.read_text())
    assert found.result == result
    assert len(found.predictions) == 8


def test_a_run_cut_short_before_labels_were_the_tokens_of_the_answer_is_refused(zygote, older):
    run = RunDir(older / "cut")
    before = sorted((run.path / "checkpoints").rglob("*"))
    codes, text = zygote.run(run.job, "--run-dir", run.path, "--threads", 1)
    assert codes == [65], text
    refusals = [line for line in text.splitlines() if "labels by another rule" in line]
    assert len(refusals) == 1
    assert sorted((run.path / "checkpoints").rglob("*")) == before


def test_a_run_that_was_cut_short_goes_on_to_its_end(zygote, cut):
    """On the machine that made both it ends with the bits of the undisturbed one."""
    run = RunDir(cut / "cut")
    assert not run.result.exists()
    codes, text = zygote.run(run.job, "--run-dir", run.path, "--threads", 1)
    assert codes == [0], text
    assert "goes on after step 27 of 46 (step-000027-a0001)" in text
    undisturbed = json.loads((cut / "outcome.json").read_text())
    rows = read_rows(run.train_table)
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed["train.csv"]]
    for mine, theirs in zip(rows, undisturbed["train.csv"], strict=True):
        assert float(mine["loss_nats"]) == pytest.approx(float(theirs["loss_nats"]), rel=1e-3)


def test_a_run_whose_job_file_was_edited_is_another_jobs(zygote, cut):
    run = RunDir(cut / "cut")
    text = run.job.read_text()
    run.job.write_text(text.replace("learning_rate = 0.01", "learning_rate = 0.02"))
    codes, said = zygote.run(run.job, "--run-dir", run.path, "--threads", 1)
    assert codes == [65], said
    assert "belongs to another job: train.learning_rate is 0.01 there and 0.02 now" in said
    assert not run.result.exists()


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        ("lost", 65, "0001.sealed: is lost; it lists the checkpoints that count"),
        ("empty", 65, "0001.sealed: is damaged: "),
        ("unreadable", 74, "0001.sealed: Is a directory"),
    ],
)
def test_a_run_that_cannot_tell_what_counts_never_begins_in_silence(
    zygote, cut, damage, code, words
):
    run = RunDir(cut / "cut")
    ledger = run.attempts / "0001.sealed"
    ledger.unlink()
    if damage == "empty":
        ledger.touch()
    elif damage == "unreadable":
        ledger.mkdir()
    before = sorted(run.checkpoints.rglob("*"))
    codes, said = zygote.run(run.job, "--run-dir", run.path, "--threads", 1)
    assert codes == [code], said
    assert words in said
    assert sorted(run.checkpoints.rglob("*")) == before
    assert run.train_table.exists()


def test_a_damaged_record_of_where_numbers_come_from_costs_a_line(zygote, cut):
    run = RunDir(cut / "cut")
    run.provenance.write_text("")
    codes, said = zygote.run(run.job, "--run-dir", run.path, "--threads", 1)
    assert codes == [0], said
    assert "goes on after step 27 of 46" in said
    assert "provenance.json: cannot be read: " in said
    assert "it is written anew, as of now" in said
    assert json.loads(run.provenance.read_text())["ranks"] == 1
