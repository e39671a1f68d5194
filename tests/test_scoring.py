"""Scores of given answers, where a question may have none."""

from __future__ import annotations

import pytest

from runner.dataset import Example
from runner.scoring import Readings, evaluate
from runner.spans import Answer, Candidate


def answer(identity: str, text: str, best: str, difference: float) -> Answer:
    listed = (Candidate(best, 0.6, 1.0, 0, len(best), 0), Candidate("", 0.4, 0.5, 0, 0, 0))
    return Answer(identity, text, 0.6, 0, len(text), 0, 0.5, 0.4, difference, 0, listed)


def test_answers_and_their_absence_are_scored_apart():
    examples = [
        Example("a", "q?", "red house", ("red",), (0,)),
        Example("b", "q?", "red house", (), ()),
        Example("c", "q?", "red house", ("house",), (4,)),
    ]
    # "c" wrongly answers nothing, though its best span is right: only the threshold is to blame.
    found = (answer("a", "red", "red", -2.0), answer("b", "", "house", 3.0))
    readings = Readings(1.0, 0, 0, 0, (*found, answer("c", "", "house", 1.0)), 0.1)
    scores = evaluate(readings, examples, unanswerable=True)
    assert scores.exact_match == pytest.approx(200 / 3)
    assert scores.details["has_answer_exact_match"] == 50
    assert scores.details["no_answer_exact_match"] == 100
    assert scores.details["best_exact_match"] == scores.details["best_f1"] == 100
