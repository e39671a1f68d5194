"""Holds a model's answers against the right ones: official scores, intervals, SQuAD v2's null
threshold tuned on questions of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runner.data.dataset import Dataset, Example
from runner.eval.answers import Answer, Mode, decide
from runner.eval.hf_metrics import Squad, SquadV2
from runner.eval.inference import Predictions
from runner.job.inference import TunedOn
from runner.job.schema import Score
from runner.metrics.squad import Best, ScoresV2, squad_v2_scores, tune_null_threshold
from runner.metrics.statistics import Interval, intervals


@dataclass(frozen=True)
class Evaluation:
    """Readings held against the right answers.

    Attributes:
        readings: loss, token accuracies, and answers as the threshold in use decides them.
        exact_match, f1: percent over questions, by SQuAD's official definition, at that threshold.
        details: further scores in percent, for SQuAD v2: has_answer_ and no_answer_, over questions
            with and without an answer; default_, at the job's own threshold where another one was
            tuned; best_, at the threshold that suits these very questions best (an upper bound).
        intervals: 95 % bootstrap interval over questions of each score but the best_ ones.
        exact_N, f1_N: percent of each question.
        null_threshold: the one in use; None where "" is never an answer.
        tuned: on what it was tuned; None where it is the job's own.
    """

    readings: Predictions
    exact_match: float
    f1: float
    details: dict[str, float]
    intervals: dict[str, Interval]
    exact_N: np.ndarray
    f1_N: np.ndarray
    null_threshold: float | None
    tuned: TunedOn | None

    def metric(self, name: str) -> float:
        """A score by the name that [stop] and [expect] use."""
        return float(getattr(self if name in ("exact_match", "f1") else self.readings, name))


def in_use(score: Score, null_threshold: float | None) -> Score:
    """[score] with another null threshold; None leaves it."""
    if null_threshold is None:
        return score
    return score.model_copy(update={"null_threshold": null_threshold})


@dataclass(frozen=True)
class TunedThreshold:
    """A null threshold and where it comes from."""

    threshold: float
    tuned: TunedOn


def tune(readings: Predictions, dataset: Dataset, score: Score) -> TunedThreshold:
    """Find the null threshold that suits the answers to the tuning questions best."""
    examples = dataset.examples
    found = tune_null_threshold(
        {a.id: a.span.text if a.span else "" for a in readings.answers},
        {e.id: e.answers for e in examples},
        {a.id: a.null_difference for a in readings.answers},
        score.tune_for,
    )
    return TunedThreshold(
        found.threshold,
        TunedOn(
            source=dataset.source,
            sha256=dataset.sha256,
            questions=len(examples),
            metric=score.tune_for,
            percent=found.score,
            default=score.null_threshold,
        ),
    )


def evaluate(
    readings: Predictions,
    examples: Sequence[Example],
    score: Score,
    *,
    unanswerable: bool,
    seed: int,
    tuned: TunedThreshold | None = None,
) -> Evaluation:
    """Hold answers against the right ones by the official evaluation of SQuAD v1.1, or of v2.0
    where there may be none.

    Args:
        readings: answers to the examples, at the threshold of `score`.
        examples: the questions, in the same order.
        score: the job's section.
        unanswerable: SQuAD v2.
        seed: of the bootstrap.
        tuned: a threshold to be used instead of the one of `score`.
    """
    references = [
        {"id": e.id, "answers": {"text": list(e.answers), "answer_start": list(e.answer_starts)}}
        for e in examples
    ]
    if not unanswerable:
        predictions = [{"id": a.id, "prediction_text": a.text} for a in readings.answers]
        metric = Squad()
        _compute(metric, predictions, references)
        found = metric.scores
        return Evaluation(
            readings=readings,
            exact_match=found.exact_match,
            f1=found.f1,
            details={},
            intervals=intervals(found, seed),
            exact_N=found.exact_N,
            f1_N=found.f1_N,
            null_threshold=None,
            tuned=None,
        )
    details: dict[str, float] = {}
    by_default = _scores_v2(readings.answers, references)
    threshold, found, ends = score.null_threshold, by_default, intervals(by_default, seed)
    if tuned is not None:
        threshold = tuned.threshold
        decided = tuple(_decided(readings.answers, threshold, score.mode))
        readings = replace(readings, answers=decided)
        found = _scores_v2(decided, references)
        details |= {"default_exact_match": by_default.exact_match, "default_f1": by_default.f1}
        ends = intervals(found, seed) | {
            f"default_{key}": ends[key] for key in ("exact_match", "f1")
        }
    if found.has_answer is not None:
        details["has_answer_exact_match"] = found.has_answer.exact_match
        details["has_answer_f1"] = found.has_answer.f1
    if found.no_answer is not None:
        details["no_answer_exact_match"] = found.no_answer.exact_match
    best = _best(readings.answers, examples)
    details |= {"best_exact_match": best.exact_match, "best_f1": best.f1}
    return Evaluation(
        readings=readings,
        exact_match=found.exact_match,
        f1=found.f1,
        details=details,
        intervals=ends,
        exact_N=found.exact_N,
        f1_N=found.f1_N,
        null_threshold=threshold,
        tuned=None if tuned is None else tuned.tuned,
    )


def _scores_v2(answers: Sequence[Answer], references: list[dict[str, Any]]) -> ScoresV2:
    metric = SquadV2()
    predictions = [
        {"id": a.id, "prediction_text": a.text, "no_answer_probability": 0.0} for a in answers
    ]
    _compute(metric, predictions, references)
    return metric.scores


def _best(answers: Sequence[Answer], examples: Sequence[Example]) -> Best:
    # The search is given each question's best span and how much better "no answer" scored. Not
    # through SquadV2: its float32 would make ties of differences that are none.
    found = squad_v2_scores(
        {a.id: a.span.text if a.span else "" for a in answers},
        {e.id: e.answers for e in examples},
        {a.id: a.null_difference for a in answers},
    )
    if found.best is None:
        raise AssertionError("a search that is given no-answer scores finds a threshold")
    return found.best


def _decided(answers: Sequence[Answer], threshold: float, mode: Mode) -> list[Answer]:
    return [decide(answer, threshold, mode) for answer in answers]


def _compute(metric: Any, predictions: list[Any], references: list[Any]) -> None:
    if metric.compute(predictions=predictions, references=references) is None:
        raise AssertionError("a metric of one process always has a result")
