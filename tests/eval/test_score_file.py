"""Files of predictions scored without a model: every form, the official table, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.data.dataset import Dataset, Example
from runner.errors import AssetError, DataError, UsageError
from runner.eval.score_file import file_lines, read_no_answer, read_predictions, score_file
from runner.metrics.squad import squad_v2_scores

EXAMPLES = (
    Example("a", "q?", "the red house", ("red",), (4,)),
    Example("b", "q?", "the red house", (), ()),
    Example("c", "q?", "the red house", ("house", "red house"), (8, 4)),
)
V2 = Dataset("dev.json", EXAMPLES, "0" * 64, ())
V1 = Dataset("dev.json", (EXAMPLES[0], EXAMPLES[2]), "0" * 64, ())
TEXTS = {"a": "red", "b": "house", "c": "a house"}


def score(path, dataset, **options):
    given = {"v2": False, "no_answer": None, "threshold": None, "seed": 3}
    return score_file(path, dataset, **(given | options))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", json.dumps(TEXTS)),
        ("p.json", json.dumps([{"id": i, "prediction_text": t} for i, t in TEXTS.items()])),
        ("p.jsonl", "".join(json.dumps({"id": i, "answer": t}) + "\n" for i, t in TEXTS.items())),
        ("p.json", "".join(json.dumps({"id": i, "answer": t}) + "\n" for i, t in TEXTS.items())),
        ("p.jsonl", json.dumps(TEXTS, indent=1)),
        ("p.jsonl", "".join(json.dumps({"id": i, "text": t}) + "\n\n" for i, t in TEXTS.items())),
    ],
)
def test_every_form_gives_the_same_table(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    result = score(path, V1)
    assert result["metrics"] == {"exact_match": 100.0, "f1": 100.0}
    assert (result["questions"], result["of_other_questions"]) == (2, 1)
    assert result["intervals"]["f1"] == [100.0, 100.0]


@pytest.mark.parametrize("texts", [{"1": "red", "2": "house"}, {}])
@pytest.mark.parametrize("v2", [False, True])
def test_predictions_of_other_questions_are_no_score_of_zero(tmp_path, texts, v2):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(texts))
    given = '"1"' if texts else "none"
    with pytest.raises(DataError) as caught:
        score(path, V2 if v2 else V1, v2=v2)
    assert caught.value.exit_code == 65
    assert str(caught.value) == (
        f"dev.json: none of its {3 if v2 else 2} questions is among the {len(texts)} predictions"
        f' (ids such as "a" here, {given} there); are they of other data, or was one of the two'
        " numbered anew?"
    )


def test_a_single_line_is_a_prediction_and_numbers_are_ids(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"id": "a", "answer": "red"}\n')
    assert read_predictions(path).texts == {"a": "red"}
    path.write_text('\n{"id": 1.0, "text": "x"}\n\n{"id": 2, "text": "y"}\n')
    assert read_predictions(path).texts == {"1": "x", "2": "y"}
    path.write_text('{"id": "a", "text": "x"}\n\n{"id": "a", "text": "y"}\n')
    with pytest.raises(DataError, match=r"p\.json:3: question a has a prediction already"):
        read_predictions(path)


def test_missing_predictions_count_as_wrong_in_v1_and_are_an_error_in_v2(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"a": "red"}')
    result = score(path, V1)
    assert result["metrics"]["exact_match"] == 50.0
    assert result["without_prediction"] == 1
    assert "1 questions have no prediction and count as wrong" in file_lines(result)
    with pytest.raises(DataError, match="question b, c: no prediction"):
        score(path, V2, v2=True)


def test_no_answer_probabilities_beside_the_file_give_the_official_v2_table(tmp_path):
    path, beside = tmp_path / "p.json", tmp_path / "na.json"
    path.write_text(json.dumps(TEXTS))
    beside.write_text('{"a": 0.1, "b": 0.9, "c": 0.2}')
    result = score(path, V2, no_answer=beside, threshold=0.5)
    references = {e.id: e.answers for e in EXAMPLES}
    official = squad_v2_scores(TEXTS, references, read_no_answer(beside), 0.5).official()
    assert result["metrics"] == official
    assert official["exact"] == 100.0
    lines = file_lines(result)
    assert lines[0].startswith("exact")
    assert lines[0].endswith("[100.0 to 100.0]")
    assert any(line.startswith("NoAns_f1") and line.endswith("]") for line in lines)
    assert any(line.split() == ["total", "3"] for line in lines)


def test_probabilities_inside_the_file_are_taken_from_all_lines_or_none(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"id": i, "answer": t, "no_answer_probability": 0.5} for i, t in TEXTS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_predictions(path).no_answer == dict.fromkeys("abc", 0.5)
    del rows[1]["no_answer_probability"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="only 2 of 3"):
        read_predictions(path)


def own_rows() -> list[dict]:
    """As spantune writes them: "a" is wrongly left unanswered, "b" rightly."""
    empty, red = {"answer": "", "score": 0.6}, {"answer": "red", "score": 0.4}
    return [
        {"id": "a", "answer": "", "null_difference": 1.0, "n_best": [empty, red]},
        {"id": "b", "answer": "", "null_difference": 3.0, "n_best": [empty, red]},
        {"id": "c", "answer": "a house", "null_difference": -2.0, "n_best": []},
    ]


def lines_of(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_our_own_files_give_the_best_threshold_by_their_null_differences(tmp_path):
    path = lines_of(tmp_path / "p.jsonl", own_rows())
    found = score(path, V2, v2=True)["metrics"]
    # The model has decided: no threshold changes its answers.
    assert found["exact"] == pytest.approx(200 / 3)
    assert (found["best_exact"], found["best_exact_thresh"]) == (100.0, 1.0)
    assert (found["best_f1"], found["best_f1_thresh"]) == (100.0, 1.0)
    assert score(path, V1)["metrics"]["exact_match"] == 50.0
    # Where the n-best list is cut before the best span, there is nothing to search.
    rows = own_rows()
    del rows[0]["n_best"][1]
    cut = score(lines_of(tmp_path / "cut.jsonl", rows), V2, v2=True)["metrics"]
    assert cut["exact"] == found["exact"]
    assert "best_f1" not in cut


def test_a_threshold_needs_probabilities(tmp_path):
    path = lines_of(tmp_path / "p.jsonl", own_rows())
    with pytest.raises(UsageError, match="--no-answer-threshold is for no-answer probabilities"):
        score(path, V2, v2=True, threshold=0.5)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.json", "5", "no object of question ids"),
        ("p.json", '{"a": 5}', "no object of question ids"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", '[{"id": "a"}]', "row 1: has no id, or no text"),
        ("p.jsonl", '{"id": "a", "answer": null}', r"p\.jsonl:1: has no id, or no text"),
        ("p.jsonl", '{"answer": "x"}\n', r"p\.jsonl:1"),
        ("p.jsonl", '{"id": "a", "answer": "x"}\n' * 2, r"p\.jsonl:2: question a has a prediction"),
        ("p.json", '[{"id": 1, "text": "x"}, {"id": "1", "text": "y"}]', "row 2: question 1 has"),
        *(
            ("p.jsonl", f'{{"id": "a", "answer": "x", "{key}": {value}}}', f":1: {key} is no num")
            for key in ("no_answer_probability", "null_difference")
            for value in ("null", '"high"', "[0.5]", "true", "NaN")
        ),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_predictions(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(AssetError, match="no such file"):
        read_predictions(tmp_path / "x.json")
    path = tmp_path / "na.json"
    for text in ('{"a": true}', '["a"]', '{"a": "x"}'):
        path.write_text(text)
        with pytest.raises(DataError, match="numbers"):
            read_no_answer(path)


def test_no_model_is_needed():
    script = "import sys, runner.eval.score_file; print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "datasets", "evaluate"} & set(done.stdout.split())


def test_answers_in_another_script_are_told_and_compared_by_it(tmp_path):
    examples = [Example("a", "?", "东京塔在东京", ("东京塔",), (0,))]
    dataset = Dataset("d.json", examples, "0", ())
    path = tmp_path / "p.json"
    path.write_text('{"a": "东京"}', "utf-8")
    options = {"v2": False, "no_answer": None, "threshold": None, "seed": 1}
    english, chinese = (score_file(path, dataset, language=c, **options) for c in ("en", "zh"))
    assert (english["metrics"]["f1"], chinese["metrics"]["f1"]) == (0.0, 80.0)
    told = (
        "1 of 1 right answers hold no Latin letter, and are scored by the rules for English; set"
        " --language, perhaps to zh"
    )
    assert told in file_lines(english)
    assert told not in file_lines(chinese)
