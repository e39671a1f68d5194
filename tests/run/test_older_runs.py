"""Run folders of earlier versions: finished ones are read as ever, and cut ones go on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from runner.report.read import read_run
from runner.run.folder import RunDir
from runner.utils.tables import read_rows

ROOT = Path(__file__).parents[2]
# Made by commit e497f8b, before the packages of runner/ came to be: a tiny BERT, 46 steps, one run
# finished and one stopped after step 41. Data and model are named below /srv/qa.
FOLDERS = ROOT / "tests" / "golden" / "runs_e497f8b.tar.xz"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The folders, their jobs told where model and questions are now."""
    with tarfile.open(FOLDERS) as archive:
        archive.extractall(tmp_path, filter="data")
    names = {"/srv/qa/model": tmp_path / "model"}
    for split in ("train", "validation"):
        names[f"/srv/qa/{split}.json"] = ROOT / "jobs" / "data" / f"product_qa_{split}.json"
    for run in ("finished", "cut"):
        job = tmp_path / run / "job.toml"
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


def test_a_run_that_was_cut_short_goes_on_to_its_end(zygote, older):
    """On the machine that made both it ends with the bits of the undisturbed one."""
    run = RunDir(older / "cut")
    assert not run.result.exists()
    codes, text = zygote.run(run.job, "--run-dir", run.path, "--threads", 1)
    assert codes == [0], text
    assert "goes on after step 41 of 46 (step-000041-a0001)" in text
    undisturbed = json.loads((older / "outcome.json").read_text())
    rows = read_rows(run.train_table)
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed["train.csv"]]
    for mine, theirs in zip(rows, undisturbed["train.csv"], strict=True):
        assert float(mine["loss_nats"]) == pytest.approx(float(theirs["loss_nats"]), rel=1e-3)
