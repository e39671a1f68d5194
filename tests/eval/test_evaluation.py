"""Scores of given answers, where a question may have none; intervals; tuned thresholds."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import numpy as np
import pytest

from runner.data.dataset import Dataset, Example
from runner.eval.answers import Answer, Candidate
from runner.eval.evaluation import Evaluation, TunedThreshold, evaluate, in_use, tune
from runner.eval.inference import Predictions
from runner.job.schema import Score
from runner.metrics.statistics import bootstrap_interval
from runner.utils.files import parse_json, to_jsonable

SCORE = Score()


def answer(identity: str, text: str, best: str, difference: float) -> Answer:
    listed = (Candidate(best, 0.6, 1.0, 0, len(best), 0), Candidate("", 0.4, 0.5, 0, 0, 0))
    return Answer(identity, text, 0.6, 0, len(text), 0, 0.5, 0.4, difference, 0, listed)


def readings(*answers: Answer) -> Predictions:
    return Predictions(1.0, 0, 0, 0, answers, 0.1)


EXAMPLES = [
    Example("a", "q?", "red house", ("red",), (0,)),
    Example("b", "q?", "red house", (), ()),
    Example("c", "q?", "red house", ("house",), (4,)),
]
# "c" wrongly answers nothing, though its best span is right: only the threshold is to blame.
FOUND = readings(
    answer("a", "red", "red", -2.0), answer("b", "", "house", 3.0), answer("c", "", "house", 1.0)
)
TUNING = Dataset(
    "tuning.json",
    (
        Example("x", "q?", "red house", ("red",), (0,)),
        Example("y", "q?", "red house", (), ()),
    ),
    "f" * 64,
    (),
)


def test_answers_and_their_absence_are_scored_apart():
    scores = evaluate(FOUND, EXAMPLES, SCORE, unanswerable=True, seed=1)
    assert scores.exact_match == pytest.approx(200 / 3)
    assert scores.details["has_answer_exact_match"] == 50
    assert scores.details["has_answer_f1"] == 50
    assert scores.details["no_answer_exact_match"] == 100
    assert scores.details["best_exact_match"] == scores.details["best_f1"] == 100
    assert (scores.null_threshold, scores.tuned) == (0.0, None)
    assert not any(name.startswith("default_") for name in scores.details)


def test_a_tuned_threshold_decides_and_the_default_stands_beside_it():
    elsewhere = readings(answer("x", "", "red", 1.5), answer("y", "", "house", 2.5))
    tuned = tune(elsewhere, TUNING, SCORE)
    assert 1.5 < tuned.threshold < 2.5
    assert asdict(tuned.tuned) == {
        "source": "tuning.json",
        "sha256": "f" * 64,
        "questions": 2,
        "metric": "f1",
        "percent": 100.0,
        "default": 0.0,
    }
    elsewhere_default = tune(elsewhere, TUNING, Score(null_threshold=3.0))
    assert (elsewhere_default.tuned.default, elsewhere_default.threshold) == (3.0, tuned.threshold)
    scores = evaluate(FOUND, EXAMPLES, SCORE, unanswerable=True, seed=1, tuned=tuned)
    assert (scores.exact_match, scores.f1) == (100.0, 100.0)
    assert scores.details["default_exact_match"] == pytest.approx(200 / 3)
    assert scores.details["default_f1"] == pytest.approx(200 / 3)
    assert [a.text for a in scores.predictions.answers] == ["red", "", "house"]
    assert scores.null_threshold == tuned.threshold
    assert scores.tuned == tuned.tuned
    assert scores.exact_N.tolist() == [100.0] * 3
    assert in_use(SCORE, scores.null_threshold).null_threshold == tuned.threshold
    assert in_use(SCORE, None) is SCORE


def test_the_best_threshold_is_searched_among_the_differences_as_they_are():
    # In float32 the two are one: the search would answer the question without an answer first.
    found = readings(
        answer("b", "", "house", 1.0 + 1e-9), answer("a", "", "red", 1.0), answer("c", "", "x", 2.0)
    )
    examples = [EXAMPLES[1], EXAMPLES[0], EXAMPLES[2]]
    scores = evaluate(found, examples, SCORE, unanswerable=True, seed=1)
    assert np.float32(1.0 + 1e-9) == np.float32(1.0)
    assert scores.details["best_f1"] == pytest.approx(200 / 3)


def test_the_threshold_is_tuned_for_the_metric_that_the_job_names():
    # To answer everything pays in F1 (two right of three), in exact match to answer nothing is as
    # good and lies nearer to 0.
    examples = (
        Example("none", "q?", "red house", (), ()),
        Example("swapped", "q?", "red house", ("house red",), (0,)),
        Example("right", "q?", "red house", ("red house",), (0,)),
    )
    found = readings(
        answer("none", "", "house", 0.2),
        answer("swapped", "", "red house", 0.5),
        answer("right", "", "red house", 0.6),
    )
    dataset = Dataset("t", examples, "f" * 64, ())
    by_f1 = tune(found, dataset, SCORE)
    by_exact = tune(found, dataset, Score(tune_for="exact_match"))
    assert by_f1.threshold > 0.6
    assert by_exact.threshold < 0.2
    assert (by_f1.tuned.metric, by_f1.tuned.percent) == ("f1", pytest.approx(200 / 3))
    assert (by_exact.tuned.metric, by_exact.tuned.percent) == (
        "exact_match",
        pytest.approx(100 / 3),
    )


def test_every_score_has_its_interval():
    tuned = TunedThreshold(2.0, tune(readings(*FOUND.answers[:2]), TUNING_AB, SCORE).tuned)
    scores = evaluate(FOUND, EXAMPLES, SCORE, unanswerable=True, seed=1, tuned=tuned)
    wanted = {"exact_match", "f1"} | {k for k in scores.details if not k.startswith("best_")}
    assert set(scores.intervals) == wanted
    default = np.array([100.0, 100.0, 0.0])
    assert scores.intervals["default_exact_match"] == bootstrap_interval(default, 1)
    assert scores.intervals["exact_match"] == (100.0, 100.0)
    again = evaluate(FOUND, EXAMPLES, SCORE, unanswerable=True, seed=1, tuned=tuned)
    assert again.intervals == scores.intervals


TUNING_AB = Dataset("t", tuple(EXAMPLES[:2]), "f" * 64, ())


def test_without_unanswerable_questions_there_is_no_threshold():
    examples = [EXAMPLES[0], EXAMPLES[2]]
    found = readings(answer("a", "red", "red", 9.0), answer("c", "red house", "red house", 9.0))
    scores = evaluate(found, examples, SCORE, unanswerable=False, seed=1)
    assert (scores.exact_match, scores.f1) == (50.0, pytest.approx(250 / 3))
    assert (scores.details, scores.null_threshold, scores.tuned) == ({}, None, None)
    assert scores.f1_N.tolist() == pytest.approx([100.0, 200 / 3])
    assert set(scores.intervals) == {"exact_match", "f1"}
    assert scores.metric("f1") == scores.f1
    assert scores.metric("loss") == 1.0


def test_an_evaluation_outlives_its_process():
    """A resumed run goes on with what it kept: to the bit, thresholds and intervals too."""
    tuned = TunedThreshold(2.0, tune(readings(*FOUND.answers[:2]), TUNING_AB, SCORE).tuned)
    for wanted in (
        evaluate(FOUND, EXAMPLES, SCORE, unanswerable=True, seed=1, tuned=tuned),
        evaluate(readings(FOUND.answers[0]), EXAMPLES[:1], SCORE, unanswerable=False, seed=1),
    ):
        found = parse_json(json.dumps(to_jsonable(wanted)), Evaluation)
        for field in fields(Evaluation):
            one, other = getattr(found, field.name), getattr(wanted, field.name)
            same = np.array_equal(one, other) if isinstance(other, np.ndarray) else one == other
            assert same, field.name
