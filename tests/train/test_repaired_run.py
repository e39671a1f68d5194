"""A run on answers that stand a little elsewhere, in another language, lists what it mended."""

from __future__ import annotations

import json

import pytest

from runner.cli.command import main
from runner.run.folder import RunDir

CONTEXT = "Die Leuchte hat einen Schirm aus Leinen und einen Fuß aus Buche."
JOB = """
name = "mended"
[data]
train = "{data}"
validation = "{data}"
on_bad_row = "{on_bad_row}"
max_length = 64
stride = 16
[model]
name = "{model}"
dropout = 0.0
[score]
language = "de"
[train]
epochs = 1
batch_size = 4
learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mended")
    rows = [
        {
            "id": f"q{n}",
            "question": f"Woraus ist der Schirm, Frage {n}?",
            "context": CONTEXT,
            "answer": "Leinen",
            "answer_start": CONTEXT.index("Leinen") + (n == 3),
        }
        for n in range(8)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for on_bad_row in ("fail", "repair"):
        text = JOB.format(data=data, model=tiny("bert"), on_bad_row=on_bad_row)
        (folder / f"{on_bad_row}.toml").write_text(text)
    return folder


def test_what_is_mended_is_listed_and_told(folder, zygote, capsys):
    codes, said = zygote.run(folder / "repair.toml", "--run-dir", folder / "run")
    assert codes == [0], said
    run = RunDir(folder / "run")
    lines = [json.loads(line) for line in run.repairs.read_text().splitlines()]
    assert [line["set"] for line in lines] == ["train", "validation"]
    assert lines[0] == {
        "set": "train",
        "place": "data.jsonl:4",
        "id": "q3",
        "text": "Leinen",
        "answer_start": 34,
        "used_text": "Leinen",
        "used_start": 33,
        "why": "stands 1 character earlier",
    }
    log = run.log.read_text()
    assert "train: answers mended (repairs.jsonl): 1, first: data.jsonl:4" in log
    assert "by SQuAD v1.1 with MLQA's rules for de" in log
    assert "MLQA" in run.report.read_text() or "words of de" in run.report.read_text()
    # Another evaluation scores as the run did, unless it is told otherwise.
    arguments = ["--data", str(folder / "data.jsonl"), "--on-bad-row", "repair"]
    assert main(["evaluate", str(run.path), *arguments]) == 0
    told = capsys.readouterr().out
    assert "MLQA's rules for de, 1 mended (repairs.jsonl)" in told
    assert main(["evaluate", str(run.path), *arguments, "--language", "en", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answering"]["score"]["language"] == "en"
    assert result["data"]["repaired"] == 1


def test_a_refusal_says_what_would_help(folder, zygote):
    codes, said = zygote.run(folder / "fail.toml", "--run-dir", folder / "refused")
    assert codes == [65]
    assert 'data.on_bad_row = "repair" would mend 1 of them' in said
