"""Questions from files and from streams: every form, bad rows told, lines answered as they come."""

from __future__ import annotations

import csv
import json
import os
import threading
import time
from pathlib import Path

import pytest

from runner.errors import AssetError, DataError
from runner.job.schema import Columns
from runner.predict import questions as question_source
from runner.predict.questions import file_questions, live_questions, refused, survey

PLAIN = Columns()
ROWS = [
    {"id": "a", "question": "Who?", "context": "Ann saw it."},
    {"id": "b", "question": "Where?", "context": "It was in Rome.", "answer": "Rome"},
]


def asked(groups):
    return [(row.id, row.question, row.context) for group in groups for row in group]


def write(path: Path, rows) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "question", "context"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_flat_files_need_no_answers(tmp_path, suffix):
    name = write(tmp_path / f"q.{suffix}", ROWS)
    assert asked(file_questions(name, PLAIN)) == [
        (row["id"], row["question"], row["context"]) for row in ROWS
    ]
    assert asked(file_questions(f"{name}[1:]", PLAIN))[0][0] == "b"


def test_squad_files_with_and_without_answers(tmp_path):
    qas = [
        {"id": "x", "question": "Who?"},
        {"id": "y", "question": "Who?", "answers": "whatever stands here"},
        {"question": "Who?", "answers": []},
    ]
    articles = {"data": [{"paragraphs": [{"context": "Ann.", "qas": qas}]}]}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(articles))
    assert asked(file_questions(str(path), PLAIN)) == [
        ("x", "Who?", "Ann."),
        ("y", "Who?", "Ann."),
        ("3", "Who?", "Ann."),  # a question without an id gets its number
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_columns_by_other_names_and_rows_without_ids(tmp_path, suffix):
    rows = [{"q": "Who?", "text": "Ann."}, {"q": "Why?", "text": "So."}]
    name = write(tmp_path / f"q.{suffix}", rows)
    columns = Columns(question="q", context="text")
    assert asked(file_questions(name, columns)) == [("1", "Who?", "Ann."), ("2", "Why?", "So.")]


def test_bad_rows_say_where_and_why(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [
        b'{"question": "Who?", "context": "Ann."}',
        b"",
        b"not json",
        b'{"question": " ", "context": "Ann."}',
        b'{"question": "Who?"}',
        b'["Who?"]',
        b'{"question": "\xff", "context": "Ann."}',
        b'{"question": "Who?", "context": 5}',
        b'{"id": "\\ud800", "question": "Who?", "context": "Ann."}',
    ]
    path.write_bytes(b"\n".join(lines))
    good, bad = survey(str(path), PLAIN)
    assert good == 1
    assert bad == [
        ("q.jsonl:3", "not valid JSON: Expecting value (column 1)"),
        ("q.jsonl:4", "question is empty"),
        (
            "q.jsonl:5",
            "no column 'context'; the columns are 'question'; a row has a question and a context",
        ),
        ("q.jsonl:6", "expected rows with named columns, found a list"),
        ("q.jsonl:7", "byte 0xff is not UTF-8"),
        ("q.jsonl:8", "context is a number, not text"),
        ("q.jsonl:9", "id holds a lone surrogate (broken encoding)"),
    ]
    told = refused("q.jsonl", bad)
    assert told.startswith("q.jsonl: 7 questions cannot be asked; --on-bad-row drop")
    assert told.splitlines()[1:] == [*(f"  {p}: {why}" for p, why in bad[:5]), "  and 2 more"]
    assert "1 question cannot" in refused("q.jsonl", bad[:1])


def test_files_that_cannot_be_read_at_all(tmp_path):
    with pytest.raises(AssetError, match="no such file"):
        list(file_questions(str(tmp_path / "x.jsonl"), PLAIN))
    with pytest.raises(AssetError, match="no such file"):
        list(file_questions(str(tmp_path / "x.json"), PLAIN))
    with pytest.raises(DataError, match="neither a file"):
        list(file_questions("x.txt", PLAIN))
    with pytest.raises(DataError, match="from a file or from stdin"):
        list(file_questions("rajpurkar/squad:validation", PLAIN))
    (tmp_path / "f.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        list(file_questions(str(tmp_path / "f.jsonl"), PLAIN))
    name = write(tmp_path / "q.json", [{"frage": "Wer?", "context": "Ann."}])
    with pytest.raises(DataError, match=r"no column 'question'.*--column KEY=NAME"):
        list(file_questions(name, PLAIN))


def test_lines_come_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(question_source, "GROUP", 3)
    rows = [{"id": str(n), "question": "Who?", "context": "Ann."} for n in range(8)]
    groups = list(file_questions(write(tmp_path / "q.jsonl", rows), PLAIN))
    assert [len(group) for group in groups] == [3, 3, 2]
    assert [row[0] for row in asked(groups)] == list("01234567")


# ---- streams


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    for end in (reading, writing):
        try:
            os.close(end)
        except OSError:
            continue


def line(identity: str, size: int = 10) -> bytes:
    row = {"id": identity, "question": "Who?", "context": "x" * size}
    return json.dumps(row).encode() + b"\n"


def test_a_line_is_handed_on_before_the_next_one_comes(pipe):
    reading, writing = pipe
    groups = live_questions(reading, "stdin", PLAIN)
    for number in range(3):
        os.write(writing, line(str(number)))
        assert [row.id for row in next(groups)] == [str(number)]
    os.write(writing, b"\n \nno json")
    os.close(writing)
    (last,) = next(groups)
    assert (last.place, last.problem) == (
        "stdin:6",
        "not valid JSON: Expecting value (column 1)",
    )
    assert next(groups, None) is None


def test_lines_that_wait_are_answered_together_and_not_too_many(pipe, monkeypatch):
    """Each answer takes so long that all wait that may."""

    class Slow(question_source._Waiting):
        def take(self):
            with self._changed:
                self._changed.wait_for(lambda: len(self._lines) == 4 or self._ended)
                return super().take()

    monkeypatch.setattr(question_source, "GROUP", 4)
    monkeypatch.setattr(question_source, "_Waiting", Slow)
    reading, writing = pipe
    groups = live_questions(reading, "stdin", PLAIN)
    os.write(writing, b"".join(line(str(n)) for n in range(10)))
    os.close(writing)
    assert [len(group) for group in groups] == [4, 4, 2]


def test_reading_waits_when_nobody_takes(pipe, monkeypatch):
    monkeypatch.setattr(question_source, "_TEXT", 100_000)
    reading, writing = pipe
    groups = live_questions(reading, "stdin", PLAIN)
    written = []

    def write_many():
        for number in range(100):
            written.append(os.write(writing, line(str(number), size=30_000)))
        os.close(writing)

    writer = threading.Thread(target=write_many, daemon=True)
    writer.start()
    first = next(groups)
    time.sleep(0.3)
    # What waits is bounded: the limit, the line above it, the pipe, and the line being read.
    assert sum(written) < 600_000
    rest = [row for group in groups for row in group]
    writer.join()
    assert [row.id for row in [*first, *rest]] == [str(n) for n in range(100)]


def test_a_line_longer_than_one_read_is_one_line(pipe):
    reading, writing = pipe
    long = line("long", size=300_000)
    threading.Thread(
        target=lambda: (os.write(writing, long), os.close(writing)), daemon=True
    ).start()
    (group,) = live_questions(reading, "stdin", PLAIN)
    assert (group[0].id, len(group[0].context)) == ("long", 300_000)
