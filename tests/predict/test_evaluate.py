"""`evaluate`: a finished model on other data; official scores, intervals, a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from runner.data.dataset import load_dataset
from runner.errors import DataError, MachineError, StorageError, UsageError
from runner.job.inference import KEY, TunedOn, settings_of_job
from runner.job.schema import Columns, Data, Score
from runner.metrics.squad import squad_scores, squad_v2_scores
from runner.predict.evaluate import assess, evaluate_model, evaluation_lines, folder_name
from runner.predict.predictor import Predictor, open_model

PRODUCTS = Path(__file__).parents[2] / "jobs" / "data" / "product_qa_validation.json"
CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting."


@pytest.fixture(scope="module")
def products():
    return load_dataset(f"{PRODUCTS}[:12]", columns=Columns(), unanswerable=True, on_bad_row="fail")


@pytest.fixture
def mixed(tmp_path):
    """Two questions with an answer, two without."""
    rows = [
        {"question": "How long?", "context": CONTEXT, "answer": "nine hours"},
        {"question": "What folds?", "context": CONTEXT, "answer": "The lantern"},
        {"question": "Who made it?", "context": CONTEXT, "answer": ""},
        {"question": "What is the price?", "context": CONTEXT, "answer": ""},
    ]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(rows))
    return load_dataset(str(path), columns=Columns(), unanswerable=True, on_bad_row="fail")


@pytest.fixture
def run(tiny, tmp_path):
    """`run(**score)`: a run folder with a tiny model that may answer nothing, or always answers."""

    def make(unanswerable: bool = True, tuned_on: str = "0" * 64, default=0.0, **score) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(tiny("bert"), folder / "model")
        (folder / "job.toml").write_text("")
        data = Data(
            train="o/n", validation="o/n", max_length=64, stride=16, unanswerable=unanswerable
        )
        tuned = TunedOn("t.json", tuned_on, 3, "f1", 50.0, default)
        answering = settings_of_job(data, Score(**score)).model_copy(update={"tuned": tuned})
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: answering.model_dump()}))
        return folder

    return make


def opening(path, **changes) -> Callable[[], Predictor]:
    given = {"device": "cpu", "threads": None, "null_threshold": None, "listed": None}
    given |= {"max_answer_length": None, "batch_size": None}
    return partial(open_model, str(path), **(given | changes))


def test_scores_are_those_of_the_predictors_own_answers(tiny, products):
    predictor = Predictor.load(str(tiny("bert")), device="cpu")
    scores, windows = assess(predictor, products, v2=False, seed=1)
    texts = {a.id: a.text for a in scores.predictions.answers}
    official = squad_scores(texts, {e.id: e.answers for e in products.examples})
    assert (scores.exact_match, scores.f1) == (official.exact_match, official.f1)
    assert scores.predictions.loss > 0
    assert len(windows) >= 12


def test_a_model_that_always_answers_is_scored_as_it_is_on_v2_data(run, mixed):
    # A threshold that stands in its settings has no say: it was trained to answer.
    folder = run(unanswerable=False, null_threshold=-1e6)
    predictor = Predictor.load(str(folder), device="cpu")
    scores, _ = assess(predictor, mixed, v2=True, seed=1)
    assert all(a.text for a in scores.predictions.answers)
    assert scores.details["no_answer_exact_match"] == 0
    assert scores.null_threshold is None
    texts = {a.id: a.text for a in scores.predictions.answers}
    official = squad_v2_scores(texts, {e.id: e.answers for e in mixed.examples})
    assert (scores.exact_match, scores.f1) == (official.exact_match, official.f1)


def test_the_stored_threshold_is_used_and_the_default_shown_beside_it(run, mixed):
    folder = run(null_threshold=-1e6)  # as if tuned where nothing has an answer
    result, where = evaluate_model(opening(folder), mixed, v2=False, seed=1, output=None)
    assert where == folder / "evaluations" / "mixed.json"
    assert result["metrics"]["no_answer_exact_match"] == 100
    assert result["metrics"]["exact_match"] == 50
    assert result["null_threshold"]["in_use"] == -1e6
    assert result["null_threshold"]["default"] == 0.0
    assert result["null_threshold"]["tuned"]["source"] == "t.json"
    assert result["metrics"]["default_f1"] != result["metrics"]["f1"]
    assert {"exact_match", "f1", "default_f1", "has_answer_f1"} <= set(result["intervals"])
    stored = json.loads((where / "result.json").read_text())
    assert stored == result
    assert stored["questions"] == 4
    predictions = [json.loads(x) for x in (where / "predictions.jsonl").read_text().splitlines()]
    assert [p["answer"] for p in predictions] == [""] * 4
    assert all("null_difference" in p for p in predictions)
    report = (where / "report.md").read_text()
    assert "Scored elsewhere" not in report
    assert "| tuned, in use |" in report
    # That is known of a run's own questions alone.
    assert "none of them is scored here" not in report
    assert (where / "report.html").is_file()
    two = result | {"data": {"dropped": 2, "repaired": 0}}
    lines = evaluation_lines("x/mixed.json", two)
    assert lines[0] == "x/mixed.json: 4 questions, SQuAD v2.0, 2 bad rows left out"
    assert lines[1].startswith("Exact match 50.0 % [")
    assert "tuned on 3 questions of t.json" in lines[2]
    assert lines[3].startswith("at the default, 0: Exact match")
    assert lines[4].startswith("with an answer: F1 0.0 % [")
    assert lines[5].startswith("without an answer: left unanswered 100.0 % [")


def test_a_threshold_given_by_hand_is_not_called_tuned(run, mixed):
    folder = run(null_threshold=-1e6)
    result, where = evaluate_model(
        opening(folder, null_threshold=1e6), mixed, v2=False, seed=1, output=None
    )
    assert result["null_threshold"] == {"in_use": 1e6, "default": 0.0, "tuned": None}
    assert result["metrics"]["no_answer_exact_match"] == 0
    report = (where / "report.md").read_text()
    assert "| given, in use |" in report
    assert "default, in use" not in report
    assert "data.tuning" not in report


def test_the_default_is_the_one_of_the_models_own_run(run, mixed):
    folder = run(null_threshold=-1e6, default=1e6)
    result, _ = evaluate_model(opening(folder), mixed, v2=False, seed=1, output=None)
    assert result["null_threshold"]["default"] == 1e6
    given = opening(folder, null_threshold=1e6)
    by_hand, _ = evaluate_model(given, mixed, v2=False, seed=1, output=None)
    assert by_hand["null_threshold"]["default"] == 1e6
    assert by_hand["metrics"]["f1"] != result["metrics"]["f1"]
    assert by_hand["metrics"]["f1"] == result["metrics"]["default_f1"]
    assert by_hand["intervals"]["f1"] == result["intervals"]["default_f1"]


def test_questions_that_the_threshold_was_tuned_on_are_not_scored(run, mixed):
    folder = run(tuned_on=mixed.sha256)
    with pytest.raises(DataError, match=r"mixed\.json: .* tuned on these 3 questions"):
        evaluate_model(opening(folder), mixed, v2=False, seed=1, output=None)
    assert not (folder / "evaluations").exists()
    given = opening(folder, null_threshold=1.0)
    assert evaluate_model(given, mixed, v2=False, seed=1, output=None)[0]["questions"] == 4


# ---- the folder


def test_no_evaluation_takes_the_folder_of_another(run, mixed, tmp_path):
    folder, again = run(), tmp_path / "again" / "mixed.json"
    again.parent.mkdir()
    again.write_text(json.dumps(json.loads((tmp_path / "mixed.json").read_text())[:3]))
    other = load_dataset(str(again), columns=Columns(), unanswerable=True, on_bad_row="fail")

    def where(dataset, **changes) -> Path:
        return evaluate_model(opening(folder, **changes), dataset, v2=False, seed=1, output=None)[1]

    first, second = where(mixed), where(other)
    third = where(mixed, null_threshold=1.0)
    assert first == folder / "evaluations" / "mixed.json"
    assert [path.name[:-8] for path in (second, third)] == ["mixed.json-"] * 2
    counts = [json.loads((p / "result.json").read_text())["questions"] for p in (first, second)]
    assert counts == [4, 3]
    # What is evaluated again goes where it was.
    assert (where(mixed, batch_size=3), where(other)) == (first, second)
    assert where(mixed, null_threshold=1.0) == third
    assert len({first, second, third}) == len(list((folder / "evaluations").iterdir()))


def test_a_result_that_cannot_be_read_keeps_its_folder(run, mixed):
    folder = run()
    there = folder / "evaluations" / "mixed.json" / "result.json"
    there.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"answering": {"score": 5}}'):
        there.write_text(text)
        _, where = evaluate_model(opening(folder), mixed, v2=False, seed=1, output=None)
        assert where != there.parent
        assert there.read_text() == text


def test_an_old_result_does_not_outlive_its_predictions(run, mixed, monkeypatch):
    folder = run()
    _, where = evaluate_model(opening(folder), mixed, v2=False, seed=1, output=None)
    assert (where / "result.json").is_file()

    def full(*_):
        raise StorageError("disk full")

    monkeypatch.setattr("runner.predict.evaluate.write_report", full)
    with pytest.raises(StorageError):
        evaluate_model(opening(folder), mixed, v2=False, seed=1, output=None)
    assert not (where / "result.json").exists()


def test_a_runs_own_folder_is_no_output(run, mixed):
    folder = run()
    with pytest.raises(UsageError, match="holds a run"):
        evaluate_model(opening(folder), mixed, v2=False, seed=1, output=folder)


def test_a_folder_that_we_did_not_make_is_no_output(run, mixed, tmp_path):
    """Whatever its files are called."""
    folder, theirs, ours = run(), tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    for name in ("predictions.jsonl", "result.json"):
        (theirs / name).write_text('{"mine": 1}')
    with pytest.raises(DataError, match=r"predictions\.jsonl, result\.json and is not an evaluat"):
        evaluate_model(opening(folder), mixed, v2=False, seed=1, output=theirs)
    assert {path.read_text() for path in theirs.iterdir()} == {'{"mine": 1}'}
    # One of ours may be written again, also where it was cut short.
    for _ in range(2):
        evaluate_model(opening(folder), mixed, v2=False, seed=1, output=ours)
        (ours / "result.json").unlink()


def test_questions_too_long_for_the_windows_are_refused_or_left_out(run, mixed):
    folder = run()
    long = replace(mixed.examples[0], id="long", question="How long? " * 60)
    dataset = replace(mixed, examples=(long, *mixed.examples))
    asked = {"v2": False, "seed": 1, "output": None}
    with pytest.raises(DataError, match=r"question long: question is too long for its window"):
        evaluate_model(opening(folder), dataset, **asked)
    result, _ = evaluate_model(opening(folder), dataset, on_bad_row="drop", **asked)
    assert (result["questions"], result["data"]["dropped"]) == (4, 1)
    assert result["data"]["sha256"] == mixed.sha256


# ---- while it goes on


def test_the_bar_knows_how_many_batches_there_are(tiny, products, monkeypatch):
    totals, done = [], []

    @contextmanager
    def bar(title, total):
        totals.append(total)
        yield lambda number, note="": done.append(number)

    monkeypatch.setattr("runner.predict.evaluate.progress", bar)
    predictor = Predictor.load(str(tiny("bert")), device="cpu", batch_size=5)
    assess(predictor, products, v2=False, seed=1)
    assert totals == [done[-1]]
    assert done[-1] >= 3


def test_full_memory_is_a_sentence(run, mixed, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("runner.predict.evaluate.predict_windows", full)
    with pytest.raises(MachineError, match=r"out of memory: CUDA .*; lower --batch-size"):
        evaluate_model(opening(run()), mixed, v2=False, seed=1, output=None)


def test_a_bare_model_writes_only_where_it_is_told(tiny, products, tmp_path):
    folder = tmp_path / "found" / "here"
    kept, nowhere = evaluate_model(opening(tiny("bert")), products, v2=False, seed=1, output=None)
    assert nowhere is None
    result, where = evaluate_model(opening(tiny("bert")), products, v2=False, seed=1, output=folder)
    assert where == folder
    assert (result["metrics"], result["intervals"]) == (kept["metrics"], kept["intervals"])
    assert len(result["model"]["weights_sha256"]) == 64
    assert result["data"]["sha256"] == products.sha256
    again = json.loads((folder / "provenance.json").read_text())
    assert again["ranks"] == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/a/b/dev.json", "dev.json"),
        ("dev.json[:100]", "dev.json-0-100"),
        ("dev.json[100:]", "dev.json-100-end"),
        ("dev.json[10%:20%]", "dev.json-10p-20p"),
        ("owner/set@v1#c:validation[:5]", "owner-set-v1-c-validation-0-5"),
        ("é/ü ö.json", "json"),
    ],
)
def test_folder_names_keep_slices_apart(source, name):
    assert folder_name(source) == name
