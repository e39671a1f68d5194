"""`spantune init`: what it sees in somebody's file, and the job that it writes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from runner.cli import command as cli
from runner.cli import init
from runner.job.load import load_job
from runner.job.schema import Data

ROOT = Path(__file__).parents[2]
TEXTS = [
    f"Die Leuchte {n} hat einen Schirm aus Leinen und der Fuß ist aus Buche." for n in range(12)
]
HEAVY = {"torch", "transformers", "tokenizers", "datasets", "deepspeed", "huggingface_hub"}


def cuts_a_share_out_of_train() -> bool:
    try:
        Data(train="x.csv", validation="10%")
    except ValueError:
        return False
    return True


with_split = pytest.mark.skipif(
    not cuts_a_share_out_of_train(), reason='data.validation = "10%" is not there yet'
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def called(capsys, *arguments):
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def german(answer="Leinen"):
    lines = ["nr;Frage;Text;Antwort"]
    lines += [f'{n};Woraus ist der Schirm?;"{text}";{answer}' for n, text in enumerate(TEXTS)]
    return "\n".join(lines) + "\n"


def rows(count=12):
    return [
        {
            "question": "What is it made of?",
            "context": f"The shade {n} is linen.",
            "answer": "linen",
        }
        for n in range(count)
    ]


def jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_job_is_written_with_all_that_was_seen(capsys):
    """Separator, columns, a text for "no answer", a row to mend, the language; and what is next."""
    lines = german().splitlines()
    lines[3] = (
        lines[3].replace("Leinen", "ANSWERNOTFOUND").replace("aus ANSWERNOTFOUND", "aus Leinen")
    )
    lines[4] = re.sub(r"Leinen$", "leinen", lines[4])
    Path("fragen.csv").write_text("\n".join(lines) + "\n")
    code, out, err = called(capsys, "init", "fragen.csv")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "fragen.csv: read as rows of Frage, Text, Antwort, 11 questions about 11 texts, 1 without"
        " an answer",
        "1 row would be refused; repair mends 1 of them, such as fragen.csv:5: case differs: answer"
        ' is not in the context ("leinen")',
        "written: fragen.toml (google-bert/bert-base-multilingual-cased; about 1 minute on two CPU"
        " cores)",
        "next: spantune check fragen.toml --data, then spantune run fragen.toml",
    ]
    text = Path("fragen.toml").read_text()
    job = tomllib.loads(text)
    assert job["name"] == "fragen"
    assert job["data"] == {
        "train": "fragen.csv",
        "validation": "10%",
        "max_length": 384,
        "stride": 128,
        "unanswerable": True,
        "no_answer": "ANSWERNOTFOUND",
        "columns": {"id": "nr", "question": "Frage", "context": "Text", "answer": "Antwort"},
    }
    assert job["score"] == {"language": "de"}
    assert '# on_bad_row = "repair"   # 1 row would be refused; repair mends 1 of them\n' in text
    assert re.search(
        r"^# Time: about 1 minute on two CPU cores, roughly: [\d,]+ tokens", text, re.M
    )
    assert "# Disk: 8.2 GB while it trains, 712 MB stay." in text


@with_split
def test_the_job_passes_check_and_names_columns_only_where_it_must(capsys):
    jsonl("my questions.v1.jsonl", rows())
    assert called(capsys, "init", "my questions.v1.jsonl", "--output", "jobs/mine.toml")[0] == 0
    job = load_job("jobs/mine.toml")
    assert job.data.columns.model_fields_set == set()
    assert job.name == "my-questions.v1"
    code, out, _ = called(capsys, "check", "jobs/mine.toml")
    assert (code, out.partition(":")[0]) == (0, "jobs/mine.toml")


def test_a_validation_file_is_found_from_the_jobs_folder(capsys):
    jsonl("train.jsonl", rows())
    jsonl("dev.jsonl", rows(3))
    arguments = ("train.jsonl", "--validation", "dev.jsonl", "--output", "a/b/mine.toml")
    assert called(capsys, "init", *arguments)[0] == 0
    assert tomllib.loads(Path("a/b/mine.toml").read_text())["data"]["train"] == "../../train.jsonl"
    job = load_job("a/b/mine.toml")
    assert (job.data.train, job.data.validation) == tuple(
        str(Path(name).absolute()) for name in ("train.jsonl", "dev.jsonl")
    )


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ((), {"question": "q1", "context": "body", "answer": "span"}),
        (("--question", "q2"), {"question": "q2", "context": "body", "answer": "span"}),
        (("--context", "other"), {"question": "q1", "context": "other", "answer": "span"}),
        (("--answer", "span", "--id", "n"), {"id": "n", "question": "q1", "context": "body"}),
    ],
)
def test_columns_may_be_named(capsys, options, columns):
    jsonl(
        "x.jsonl",
        [
            {
                **{"n": f"a{n}", "q1": "What is it?", "q2": "Which one", "span": "linen"},
                **{
                    "body": f"The shade {n} is linen.",
                    "other": f"All of linen, the whole shade {n}.",
                },
            }
            for n in range(3)
        ],
    )
    assert called(capsys, "init", "x.jsonl", "--validation", "x.jsonl", *options)[0] == 0
    found = load_job("x.toml").data.columns.model_dump(exclude_unset=True)
    assert found == {**found, **columns}


@pytest.mark.parametrize(
    ("write", "options", "code", "told"),
    [
        ({}, ("gone.csv",), 69, "gone.csv: no such file"),
        ({}, ("rajpurkar/squad",), 2, "init reads a file of questions"),
        ({"x.csv": german()}, ("x.csv", "--output", "x"), 2, "has a name that ends in .toml"),
        ({"x.csv": german()}, ("x.csv", "--question", "Fraeg"), 65, "no column 'Fraeg'"),
        ({"x.csv": "a;b\n1;2\n"}, ("x.csv",), 65, "the columns are 'a', 'b'"),
        (
            {"x.csv": german("Wolle")},
            ("x.csv",),
            65,
            "no question that can be trained on; the first",
        ),
        ({"x.csv": "\n".join(german().splitlines()[:2])}, ("x.csv",), 65, "about one text"),
        ({"x.csv": ""}, ("x.csv",), 65, "x.csv: holds no question"),
    ],
)
def test_what_makes_no_job_is_one_line_and_writes_nothing(capsys, write, options, code, told):
    for name, text in write.items():
        Path(name).write_text(text)
    found, out, err = called(capsys, "init", *options)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert told in err
    assert {path.name for path in Path().iterdir()} == set(write)


@pytest.mark.parametrize("there", ["file", "link", "folder"])
def test_nothing_is_overwritten(capsys, there):
    jsonl("x.jsonl", rows())
    path = Path("x.toml")
    {
        "file": lambda: path.write_text("mine"),
        "link": lambda: path.symlink_to("elsewhere.toml"),
        "folder": path.mkdir,
    }[there]()
    before = os.lstat(path)
    code, _, err = called(capsys, "init", "x.jsonl")
    assert (code, "is there already and stays as it is" in err) == (2, True)
    assert os.lstat(path).st_mtime_ns == before.st_mtime_ns
    assert not Path("elsewhere.toml").exists()


@pytest.mark.parametrize(
    "name", ['a"b.jsonl', "a\nname = 5.jsonl", "\u202eé\x7f.jsonl", "-x-.jsonl"]
)
def test_no_name_breaks_out_of_the_job_file(capsys, name):
    column = 'con"\ntext = 1 #'
    jsonl(name, [{**row, column: row["context"]} for row in rows()])
    arguments = (
        f"./{name}",
        "--validation",
        f"./{name}",
        "--context",
        column,
        "--output",
        "x.toml",
    )
    assert called(capsys, "init", *arguments)[0] == 0
    job = load_job("x.toml")
    assert job.data.train == str(Path(name).absolute())
    assert job.data.columns.context == column


def test_other_formats_need_no_columns(capsys):
    tasks = []
    for n in (8, 9, 10):
        text = f"The shade {n} is linen."
        start = text.index("linen")
        value = {"start": start, "end": start + 5, "text": "linen", "labels": ["Answer"]}
        fields = {"passage": text, "ask": "What is it?"}
        tasks.append({"id": n, "data": fields, "annotations": [{"result": [{"value": value}]}]})
    Path("tasks.json").write_text(json.dumps(tasks))
    code, out, _ = called(capsys, "init", "tasks.json")
    assert code == 0
    assert "read as Label Studio's JSON, question in 'ask', text in 'passage', 3 questions" in out
    assert "columns" not in tomllib.loads(Path("tasks.toml").read_text())["data"]


def test_it_stays_light():
    """What a login node waits for: no library of models or data sets is imported."""
    Path("x.csv").write_text(german())
    script = (
        "import sys; from runner.cli.command import main; code = main(['init', 'x.csv']);"
        " print(code, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert not HEAVY & set(modules)


def test_the_time_grows_with_the_model_and_the_texts():
    sizes = [(40, 2000)] * 1000
    assert init._tokens([(40, 100)], "en") == round(140 / 4.3 + 3)
    one, long = init._tokens(sizes, "en"), init._tokens([(40, 20_000)] * 1000, "en")
    assert long > 10 * one
    assert init._tokens(sizes, "zh") > 4 * one


@with_split
def test_the_job_trains(capsys, zygote, tiny):
    """As it is written, but for the model, which is a tiny one, and the epochs."""
    jsonl("x.jsonl", rows(40))
    assert called(capsys, "init", "x.jsonl")[0] == 0
    small = ("--set", f"model.name={tiny('bert')}", "--set", "train.epochs=1")
    codes, said = zygote.run(Path("x.toml").absolute(), "--run-dir", Path("run").absolute(), *small)
    assert codes == [0], said
    result = json.loads(Path("run/result.json").read_text())
    assert result["metrics"]["f1"] >= 0
    assert (
        "read as rows of question, context, answer, 40 questions" in Path("run/log.txt").read_text()
    )
