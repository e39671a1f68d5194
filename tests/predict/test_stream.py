"""`predict` as a command and as a function: lines out, bad rows, output files, streams."""

from __future__ import annotations

import json
import signal
from functools import partial

import pytest
import torch

from runner.errors import DataError, MachineError, StorageError
from runner.job.schema import Columns
from runner.predict.predictor import Predictor, open_model
from runner.predict.questions import QuestionRow, Questions
from runner.predict.stream import lines_to, predict_lines, predict_questions
from tests.forked import talking

CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting."


def predict_all(load, source, columns, *, on_bad_row, **options):
    """As the command does: the questions are looked for before the model is opened."""
    questions = Questions.find(source, columns, on_bad_row)
    return predict_questions(load, questions, on_bad_row=on_bad_row, **options)


@pytest.fixture(scope="module")
def predictor(tiny):
    return Predictor.load(str(tiny("bert")), device="cpu", listed=1)


@pytest.fixture
def opening(tiny):
    given = dict.fromkeys(("threads", "null_threshold", "max_answer_length", "batch_size"))
    return partial(open_model, str(tiny("bert")), device="cpu", listed=1, **given)


def rows(*questions: str) -> str:
    return "".join(json.dumps({"question": q, "context": CONTEXT}) + "\n" for q in questions)


def asked(place: str, question: str = "Who?", problem: str | None = None) -> QuestionRow:
    return QuestionRow(place, place, question, CONTEXT, problem)


def test_every_good_row_is_a_line_and_every_bad_one_is_told(predictor, capsys):
    groups = [
        [asked("1"), asked("2", problem="context is empty")],
        [asked("3", "Who? " * 200), asked("4"), asked("5", "Where? " * 200)],
    ]
    lines, done = [], []
    counts = predict_lines(
        predictor, groups, lines.append, name="f", on_bad_row="drop", step=done.append
    )
    assert [json.loads(line)["id"] for line in lines] == ["1", "4"]
    assert (counts.answered, done) == (2, [2, 5])
    assert [place for place, _ in counts.bad] == ["2", "3", "5"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "left out: 2: context is empty"
    assert told[1].startswith("left out: 3: question is too long for its window (its 800 tokens")


def test_the_first_bad_row_ends_it_after_the_answers_before_it(predictor):
    lines = []
    group = [asked("1"), asked("2", problem="context is empty"), asked("3")]
    with pytest.raises(DataError, match="f: 1 question cannot be asked"):
        predict_lines(
            predictor, [group], lines.append, name="f", on_bad_row="fail", step=lambda *_: None
        )
    assert len(lines) == 1


def test_only_a_question_without_room_is_called_too_long(predictor, monkeypatch):
    def no_tokenizer(*_, **__):
        raise DataError("no fast tokenizer")

    monkeypatch.setattr("runner.predict.predictor.build_windows", no_tokenizer)
    with pytest.raises(DataError, match=r"^no fast tokenizer$"):
        predict_lines(
            predictor, [[asked("1")]], print, name="f", on_bad_row="drop", step=lambda *_: None
        )


def test_full_memory_is_a_sentence(opening, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("runner.predict.predictor.predict_windows", full)
    with pytest.raises(MachineError, match=r"out of memory: CUDA .*; lower --batch-size"):
        predict_all(
            opening, ("Who?", CONTEXT), Columns(), on_bad_row="fail", output=None,
            say=print,
        )  # fmt: skip


def test_a_file_is_looked_through_before_the_model_is_opened(tmp_path):
    opening = None
    path = tmp_path / "q.jsonl"
    path.write_text(rows("Who?", "", "Where?", " "))
    with pytest.raises(DataError, match=r"2 questions cannot be asked(.|\n)*q\.jsonl:2"):
        predict_all(opening, str(path), Columns(), on_bad_row="fail", output=None, say=print)


def test_an_output_file_is_whole_or_not_there(tmp_path, opening):
    path, output = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    path.write_text(rows("Who?", "", "Where?"))
    output.write_text("before")
    with pytest.raises(DataError):
        predict_all(opening, str(path), Columns(), on_bad_row="fail", output=output, say=print)
    assert output.read_text() == "before"
    said = []
    counts = predict_all(
        opening, str(path), Columns(), on_bad_row="drop", output=output, say=said.append
    )
    assert (counts.answered, len(counts.bad), said) == (2, 1, [])
    assert [json.loads(line)["question"] for line in output.read_text().splitlines()] == [
        *("Who?", "Where?")
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "q.jsonl"]


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("before")

    def fail():
        with lines_to(path) as write:
            write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="nowhere"), lines_to(tmp_path / "nowhere" / "x"):
        pass


def test_one_question(opening):
    said = []
    predict_all(
        partial(opening, listed=2), ("How long?", CONTEXT), Columns(), on_bad_row="fail",
        output=None, say=said.append,
    )  # fmt: skip
    (line,) = said
    found = json.loads(line)
    assert CONTEXT[found["start"] : found["end"]] == found["answer"]
    assert len(found["n_best"]) == 2


# ---- the command


def test_answers_come_out_while_questions_still_arrive(zygote, tiny):
    with talking(zygote, "predict", tiny("bert"), "--device", "cpu", "--threads", 1) as process:
        for number in range(3):  # each answer is there before the next question is asked
            row = {"id": number, "question": "How long?", "context": CONTEXT}
            process.stdin.write(json.dumps(row).encode() + b"\n")
            assert json.loads(process.stdout.readline())["id"] == str(number)
        process.stdin.write(b"{}\n")
        code, said = process.end()
    assert code == 65
    assert "stdin:4: " in said


def test_a_reader_who_has_seen_enough_ends_the_command(zygote, tiny, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(rows(*["How long?"] * 300))
    with talking(zygote, "predict", tiny("bert"), path, "--device", "cpu") as process:
        assert json.loads(process.stdout.readline())["id"] == "1"
        process.stdout.close()
        code, said = process.end()
    assert code == 128 + signal.SIGPIPE
    assert "Traceback" not in said
