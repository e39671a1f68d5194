"""A whole SQuAD v2 run: its threshold is tuned on questions of its own, stored, and used by all."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest

from runner.cli.command import main
from runner.run.folder import RunDir
from tests.interruptions import MAY_ANSWER_NOTHING
from tests.plain_transformers import by_hand

CONTEXT = "The lantern folds flat; its battery lasts nine hours on the bright setting. "
JOB = (
    """
name = "tuned"
[data]
train = "{data}[:16]"
tuning = "{data}[16:28]"
validation = "{data}[28:]"
"""
    + MAY_ANSWER_NOTHING
    + """dropout = 0.0
[train]
epochs = 1
batch_size = 8
learning_rate = 1e-3
[[probe]]
question = "How long does the battery last?"
context = "{context}"
"""
)


@pytest.fixture(scope="module")
def run(zygote, tiny, tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("tuned")
    rows = [
        {
            "id": f"q{n}",
            "question": f"How long is it, question {n}?",
            "context": CONTEXT * (1 + n % 3),
            "answer": "" if n % 2 else "nine hours",
            "answer_start": "" if n % 2 else CONTEXT.find("nine hours"),
        }
        for n in range(40)
    ]
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    job = folder / "job.toml"
    text = JOB.format(data=folder / "data.csv", model=tiny("bert"), context=CONTEXT.strip())
    job.write_text(text)
    codes, said = zygote.run(job, "--run-dir", folder / "run")
    assert codes == [0], said
    (folder / "said.txt").write_text(said)
    return RunDir(folder / "run")


def records(run: RunDir) -> list[dict]:
    return [json.loads(line) for line in run.predictions.read_text().splitlines()]


def test_default_and_tuned_scores_stand_side_by_side_everywhere(run):
    result = json.loads(run.result.read_text())
    threshold = result["null_threshold"]
    assert threshold["default"] == 3.0
    assert threshold["tuned"]["questions"] == 12
    assert threshold["tuned"]["metric"] == "f1"
    for name in ("exact_match", "f1", "default_exact_match", "default_f1"):
        low, high = result["intervals"][name]
        assert low <= result["metrics"][name] <= high
    with run.eval_table.open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["f1_percent"]) == result["metrics"]["f1"]
    assert float(last["default_f1_percent"]) == result["metrics"]["default_f1"]
    assert float(last["null_threshold_logits"]) == threshold["in_use"]
    assert float(last["f1_low_percent"]) == result["intervals"]["f1"][0]
    said = (run.path.parent / "said.txt").read_text()
    assert "tuning: 12 questions in" in said
    assert "tuned on 12 questions of" in said
    assert "at the default, 3: Exact match" in said
    assert "| tuned, in use |" in run.report.read_text()
    assert "| default |" in run.report.read_text()


def test_answers_are_those_of_the_tuned_threshold(run):
    threshold = json.loads(run.result.read_text())["null_threshold"]["in_use"]
    found = records(run)
    assert len(found) == 12
    assert all((row["answer"] == "") == (row["null_difference"] > threshold) for row in found)
    exact = 100 * sum(row["exact_match"] for row in found) / 12
    assert exact == pytest.approx(json.loads(run.result.read_text())["metrics"]["exact_match"])
    # Windows: the context of one sentence fits into one, that of three does not.
    assert {row["windows"] == 1 for row in found} == {True, False}
    assert len({row["context_tokens"] for row in found}) == 3


def questions(run: RunDir) -> list:
    """What the run scored, to be asked again."""
    from runner.predict.predictor import Question

    with (run.path.parent / "data.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    return [Question(r["id"], r["question"], rows[r["id"]]["context"]) for r in records(run)]


def evaluated(run: RunDir, part: str) -> dict:
    """The run's model scored on a slice of its data."""
    from runner.predict.evaluate import evaluate_model
    from runner.predict.predictor import Predictor

    load = partial(Predictor.load, str(run.path), device="cpu")
    return evaluate_model(load, data(run, part), v2=False, seed=42, output=None)[0]


def data(run: RunDir, part: str):
    """A slice of the run's data."""
    from runner.data.dataset import load_dataset
    from runner.job.schema import Columns

    return load_dataset(
        f"{run.path.parent / 'data.csv'}{part}",
        columns=Columns(), unanswerable=True, on_bad_row="fail",
    )  # fmt: skip


def test_plain_transformers_on_the_exported_model_answer_as_predict_does(run, monkeypatch):
    from runner.predict.predictor import Predictor

    # As by_hand computes: on processors that multiply in bf16, batches would round otherwise.
    monkeypatch.setattr("runner.model.load.cpu_features", frozenset)
    predictor = Predictor.load(str(run.path), device="cpu")
    threshold = predictor.answering.score.null_threshold
    asked = questions(run)
    for question, found in zip(asked, predictor.answers(asked), strict=True):
        spans, null, windows = by_hand(run.model, question, max_length=100, stride=16, longest=6)
        best = min(spans, key=lambda place: (-spans[place][0], *place))
        span = next(candidate for candidate in found.n_best if candidate.text)
        assert (span.start, span.end, found.windows) == (*best, windows)
        difference = null - spans[best][0]
        assert found.null_difference == pytest.approx(difference, abs=1e-4)
        assert abs(difference - threshold) > 1e-3
        text = question.context[best[0] : best[1]]
        assert found.answer == ("" if difference > threshold else text)


def test_the_runs_own_predictions_scored_as_a_file_give_its_scores(run):
    from runner.eval.score_file import score_file

    scored = score_file(
        run.predictions, data(run, "[28:]"), v2=True, no_answer=None, threshold=None, seed=42
    )["metrics"]
    own = json.loads(run.result.read_text())["metrics"]
    for mine, official in (
        ("exact_match", "exact"),
        ("f1", "f1"),
        ("best_exact_match", "best_exact"),
        ("best_f1", "best_f1"),
    ):
        assert scored[official] == pytest.approx(own[mine])


def test_its_tuning_questions_are_not_scored(run):
    from runner.errors import DataError

    with pytest.raises(DataError, match="tuned on these 12 questions"):
        evaluated(run, "[16:28]")


def test_predict_asks_the_model_as_the_run_did(run):
    from runner.predict.predictor import Predictor

    config = json.loads((run.model / "config.json").read_text())["spantune"]
    threshold = json.loads(run.result.read_text())["null_threshold"]
    assert config["score"]["null_threshold"] == threshold["in_use"]
    assert (config["max_length"], config["stride"], config["unanswerable"]) == (100, 16, True)
    assert config["tuned"]["source"] == "data.csv[16:28]"  # no folder of this machine
    assert config["tuned"]["default"] == 3.0
    found = records(run)
    answers = Predictor.load(str(run.path), device="cpu").answers(questions(run))
    assert [a.answer for a in answers] == [row["answer"] for row in found]
    assert [(a.start, a.end, a.windows) for a in answers] == [
        (row["start"], row["end"], row["windows"]) for row in found
    ]
    # Scored on its own validation data the model has its own scores again.
    result, own = evaluated(run, "[28:]"), json.loads(run.result.read_text())
    assert result["null_threshold"]["default"] == own["null_threshold"]["default"]
    for name in ("f1", "exact_match", "default_f1", "default_exact_match"):
        assert result["metrics"][name] == pytest.approx(own["metrics"][name])
        assert result["intervals"][name] == pytest.approx(own["intervals"][name])


def test_a_tuning_set_that_overlaps_is_refused_before_a_run(run, capsys):
    overlapping = f"data.tuning={run.path.parent / 'data.csv'}[26:30]"
    assert main(["check", str(run.job), "--data", "--set", overlapping]) == 65
    said = capsys.readouterr().err
    assert said.startswith("data.tuning: 2 of its 4 questions are also in data.validation")


def test_tuning_without_unanswerable_questions_is_a_mistake_in_the_job(run, capsys):
    assert main(["check", str(run.job), "--set", "data.unanswerable=false"]) == 64
    said = capsys.readouterr().err
    assert "tuning is for SQuAD v2; set unanswerable = true" in said
