"""`predict`, `evaluate` and `report` as commands: what goes where, exit codes, wrong arguments."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.cli import command as cli
from runner.predict.stream import in_words
from tests.sample_runs import make_run, predictions

ROOT = Path(__file__).parents[2]
PRODUCTS = ROOT / "jobs" / "data" / "product_qa_validation.json"
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting."


@pytest.fixture
def spantune(capsys, monkeypatch):
    """`spantune(*arguments)`: exit code, stdout and stderr of the command, in this process: other
    tests start it as a process of its own."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what making a model has said
        code = cli.main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return run


@pytest.fixture(params=["ascii", "latin-1", "utf-16"])
def printed(request, monkeypatch):
    """Runs the command at a terminal of another encoding; returns the bytes that it prints."""

    def run(*arguments: object) -> bytes:
        screen = io.TextIOWrapper(io.BytesIO(), encoding=request.param)
        monkeypatch.setattr(sys, "stdout", screen)
        assert cli.main(list(map(str, arguments))) == 0
        return screen.buffer.getvalue()

    return run


def test_what_programs_read_is_utf_8_at_every_terminal(printed, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    context = "Im Caf\u00e9 Z\u00fcrich \u2713 \U0001f600"
    answer = json.loads(
        printed("predict", tiny("bert"), "--question", "\u00fc?", "--context", context).decode()
    )
    assert answer["question"] == "\u00fc?"
    assert context[answer["start"] : answer["end"]] == answer["answer"]
    row = {"id": "\u00fc", "question": "Who?", "context": context, "answers": {}}
    row["answers"] = {"text": ["Caf\u00e9"], "answer_start": [3]}
    Path("d\u00e4.jsonl").write_text(json.dumps(row), encoding="utf-8")
    Path("p.json").write_text('{"\u00fc": "Caf\u00e9"}', encoding="utf-8")
    result = json.loads(printed("evaluate", "p.json", "--data", "d\u00e4.jsonl", "--json").decode())
    assert result["data"]["source"] == "d\u00e4.jsonl"
    assert json.loads(printed("schema").decode())["title"] == "Job"
    job = (ROOT / "jobs" / "quickstart.toml").read_text(encoding="utf-8")
    Path("j.toml").write_text(job.replace('= "data/', f'= "{ROOT}/jobs/data/'), encoding="utf-8")
    monkeypatch.setenv("SPANTUNE_SLURM", "")
    script = printed("submit", "j.toml", "--dry-run", "--runs", "l\u00e4ufe").decode()
    assert f"{tmp_path}/l\u00e4ufe/quickstart/" in script


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "m", "--question", "Who?"], "give both --question and --context"),
        (["predict", "m", "f.json", "--question", "Who?", "--context", "Ann."], "no FILE"),
        (["predict", "m", "f.json", "--column", "q=x"], "KEY is one of id, question, context"),
        (["evaluate", "m", "--data", "f.json", "--column", "question"], "write KEY=NAME"),
        *(
            (["evaluate", "p.json", "--data", "f.json", *option], f"{option[0]} is for a model")
            for option in (
                ("--output", "found"),
                ("--null-threshold", "1"),
                ("--max-answer-length", "9"),
                ("--batch-size", "8"),
                ("--device", "cpu"),
                ("--threads", "1"),
            )
        ),
        *(
            (["evaluate", "m", "--data", "f.json", *option], "is for a file of predictions")
            for option in (("--no-answer", "na.json"), ("--no-answer-threshold", "0.5"))
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_2(arguments, words, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("spantune: ")
    assert words in err
    assert err.count("\n") == 1


def test_nobody_is_left_waiting_at_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert cli.main(["predict", "m"]) == 2
    assert "lines of JSON on stdin" in capsys.readouterr().err


def test_one_question_given_on_the_command_line(spantune, tiny):
    code, out, err = spantune(
        "predict", tiny("bert"), "--question", "How long?", "--context", CONTEXT, "--n-best", 2
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert CONTEXT[found["start"] : found["end"]] == found["answer"]
    assert len(found["n_best"]) == 2
    assert out.count("\n") == 1


def test_bad_rows_fail_or_are_left_out(spantune, tiny, tmp_path):
    path = tmp_path / "q.csv"
    path.write_text(f"Frage,context\nHow long?,{CONTEXT}\n,{CONTEXT}\n")
    arguments = ("predict", tiny("bert"), path, "--column", "question=Frage")
    code, out, err = spantune(*arguments)
    assert (code, out) == (65, "")
    assert err.splitlines()[1] == "  q.csv:3: question is empty"
    code, out, err = spantune(*arguments, "--on-bad-row", "drop")
    assert (code, out.count("\n")) == (0, 1)
    assert err.splitlines() == ["left out: q.csv:3: question is empty", "1 left out, 1 answered"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["predict", "no/such/model", "--question", "Who?", "--context", "Ann."], 69, "no folder"),
        (["predict", "MODEL", "nowhere.jsonl"], 69, "nowhere.jsonl: no such file"),
        (["predict", "MODEL", "--question", " ", "--context", "Ann."], 65, "question is empty"),
        (["evaluate", "MODEL", "--data", "nowhere.json"], 69, "nowhere.json: no such file"),
        (["evaluate", "nowhere.json", "--data", "DATA"], 69, "nowhere.json: no such file"),
        (["report", "nowhere"], 73, "neither a run folder nor an evaluation"),
    ],
)
def test_what_is_not_there_is_one_sentence(spantune, tiny, arguments, code, words):
    names = {"MODEL": str(tiny("bert")), "DATA": f"{PRODUCTS}[:3]"}
    found, out, err = spantune(*(names.get(part, part) for part in arguments))
    assert (found, out) == (code, "")
    assert words in err
    assert "Traceback" not in err


def test_evaluate_shows_scores_with_intervals_and_keeps_them_in_the_run(spantune, tiny, tmp_path):
    run = make_run(tmp_path / "run", predictions(5))
    (run / "model").symlink_to(tiny("bert"))
    code, out, err = spantune("evaluate", run, "--data", f"{PRODUCTS}[:6]")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith("product_qa_validation.json[:6]: 6 questions, SQuAD v1.1")
    assert re.match(r"Exact match [\d.]+ % \[[\d.]+ to [\d.]+\], F1 [\d.]+ % \[", lines[1])
    folder = run / "evaluations" / "product_qa_validation.json-0-6"
    assert lines[-1] == f"Written to {folder}: report.html, predictions.jsonl, result.json"
    assert json.loads((folder / "result.json").read_text())["questions"] == 6
    # The run's own page tells of it from now on.
    assert spantune("report", run)[0] == 0
    assert "product_qa_validation.json[:6] | 6 |" in (run / "report.md").read_text().replace(
        "\\", ""
    )


def test_evaluate_counts_rows_that_contradict_themselves(spantune, tmp_path):
    row = {"question": "Who?", "context": "Ann.", "answer": "Ann", "is_impossible": True}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (tmp_path / "p.json").write_text('{"id": 1, "answer": ""}')
    code, out, _ = spantune("evaluate", tmp_path / "p.json", "--data", tmp_path / "d.jsonl")
    assert code == 0
    assert out.splitlines()[-1] == (
        "1 question taken as without an answer where is_impossible is true beside an answer, first:"
        " d.jsonl:1"
    )


def test_evaluate_a_file_of_predictions(spantune, tmp_path):
    golds = json.loads(PRODUCTS.read_text())["data"]
    rows = [qa for a in golds for p in a["paragraphs"] for qa in p["qas"]][:4]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps({qa["id"]: qa["answers"][0]["text"] for qa in rows}))
    code, out, err = spantune("evaluate", path, "--data", f"{PRODUCTS}[:4]")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["exact_match", "100.000000", "[100.0", "to", "100.0]"]
    code, out, _ = spantune("evaluate", path, "--data", f"{PRODUCTS}[:4]", "--json", "--v2")
    assert code == 0
    assert json.loads(out)["metrics"]["HasAns_total"] == 4


def test_report_of_one_run_and_of_several(spantune, tmp_path):
    first = make_run(tmp_path / "a", predictions())
    second = make_run(tmp_path / "b", predictions(better=6))
    code, out, err = spantune("report", first)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == f"Written: {first / 'report.html'}"
    code, out, err = spantune("report", first, second, "--output", tmp_path / "c")
    assert (code, err) == (0, "")
    assert "more than chance over questions explains." in out
    assert (tmp_path / "c" / "comparison.html").is_file()


# ---- for people at a terminal


def at_terminal(*arguments: object) -> tuple[int, str]:
    """Run the command, as a process of its own, whose output is a terminal; its code and what is
    seen there."""
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "runner", *map(str, arguments)]
    started = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # EIO: all of its ends are closed
        while part := os.read(mine, 4096):
            seen += part
    os.close(mine)
    return started.wait(), seen.decode()


@pytest.mark.slow  # three processes that import torch; the fast tier has one of them
def test_a_question_at_a_terminal_is_answered_in_words(tiny):
    asked = ("predict", tiny("bert"), "--question", "How long?", "--context", CONTEXT)
    code, seen = at_terminal(*asked)
    assert code == 0
    answer, score = re.search(r"^(.*) \((\d\.\d\d)\)\r$", seen, re.MULTILINE).groups()
    assert answer in CONTEXT
    code, seen = at_terminal(*asked, "--json")
    found = json.loads(next(line for line in seen.splitlines() if line.startswith("{")))
    assert (found["answer"], f"{found['score']:.2f}") == (answer, score)


def test_a_question_in_a_pipe_is_answered_in_json(spantune, tiny, tmp_path):
    asked = ("predict", tiny("bert"), "--question", "How long?", "--context", CONTEXT)
    code, out, _ = spantune(*asked)
    assert code == 0
    assert json.loads(out)["answer"] in CONTEXT
    code, out, _ = spantune(*asked, "--output", tmp_path / "a.jsonl")
    assert (code, out) == (0, f"1 answer written to {tmp_path / 'a.jsonl'}\n")
    assert json.loads((tmp_path / "a.jsonl").read_text())["answer"] in CONTEXT


def test_an_answer_in_words():
    found = SimpleNamespace(answer="washable linen", score=0.934)
    assert in_words(found) == "washable linen (0.93)"
    assert in_words(SimpleNamespace(answer="", score=0.5)) == "no answer (0.50)"
    assert "\x1b" not in in_words(SimpleNamespace(answer="a\x1b[2K", score=0.5))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("predict", "no/such/model/x", PRODUCTS), 69, "no folder of a run"),
        (("predict", ROOT / "jobs", "no.json"), 69, "no.json"),
        (("check", ROOT / "jobs/quickstart.toml", "--data", "--ranks", "3"), 64, "do not divide"),
    ],
)
def test_what_is_not_there_is_told_before_torch_is_imported(arguments, code, words):
    """A finder that refuses torch: a command that imports it ends in our own mistake's code."""
    script = (
        "import sys\n"
        "class Refusing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise RuntimeError('torch is imported')\n"
        "sys.meta_path.insert(0, Refusing())\n"
        "from runner.cli import main\n"
        f"sys.exit(main({list(map(str, arguments))!r}))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (ended.returncode, words in ended.stderr) == (code, True), ended.stderr
