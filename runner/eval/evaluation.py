"""Holds a model's answers against the right ones: official scores, intervals, SQuAD v2's null
threshold tuned on questions of its own."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PlainSerializer, PlainValidator

from runner.data.dataset import Dataset, Example
from runner.eval.answers import decide
from runner.eval.inference import Predictions
from runner.job.inference import TunedOn
from runner.job.schema import Score
from runner.metrics.squad import (
    Best,
    ScoresV2,
    squad_scores,
    squad_v2_scores,
    tune_null_threshold,
)
from runner.metrics.statistics import Interval, intervals


def _array_to_json(array: np.ndarray) -> dict[str, Any]:
    content = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "base64": content}


def _array_from_json(value: Any) -> np.ndarray:
    try:
        content = base64.b64decode(value["base64"], validate=True)
        array = np.frombuffer(content, np.dtype(value["dtype"])).reshape(value["shape"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"no array: {error}") from None
    return array.copy()  # of its own: what is read is a view that nobody may write to


# An array that a record holds: its bytes are kept, so that each number comes back to the bit.
JsonArray = Annotated[np.ndarray, PlainValidator(_array_from_json), PlainSerializer(_array_to_json)]


@dataclass(frozen=True)
class Evaluation:
    """Predictions held against the right answers.

    Attributes:
        predictions: loss, token accuracies, and answers as the threshold in use decides them.
        exact_match, f1: percent over questions, by SQuAD's official definition, at that threshold.
        details: further scores in percent, for SQuAD v2: has_answer_ and no_answer_, over questions
            with and without an answer; default_, at the job's own threshold where another one was
            tuned; best_, at the threshold that suits these very questions best (an upper bound).
        intervals: 95 % bootstrap interval over questions of each score but the best_ ones.
        exact_N, f1_N: percent of each question.
        null_threshold: the one in use; None where "" is never an answer.
        tuned: on what it was tuned; None where it is the job's own.
    """

    # Under this key it stands in the checkpoints of runs that are under way.
    predictions: Annotated[Predictions, Field(alias="readings")]
    exact_match: float
    f1: float
    details: dict[str, float]
    intervals: dict[str, Interval]
    exact_N: JsonArray
    f1_N: JsonArray
    null_threshold: float | None
    tuned: TunedOn | None

    def metric(self, name: str) -> float:
        """A score by the name that [stop] and [expect] use."""
        return float(getattr(self if name in ("exact_match", "f1") else self.predictions, name))


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


def tune(predictions: Predictions, dataset: Dataset, score: Score) -> TunedThreshold:
    """Find the null threshold that suits the answers to the tuning questions best."""
    best = tune_null_threshold(
        _best_spans(predictions),
        _right_answers(dataset.examples),
        {a.id: a.null_difference for a in predictions.answers},
        score.tune_for,
        score.language,
    )
    return TunedThreshold(
        best.threshold,
        TunedOn(
            source=dataset.source,
            sha256=dataset.sha256,
            questions=len(dataset.examples),
            metric=score.tune_for,
            percent=best.score,
            default=score.null_threshold,
        ),
    )


def evaluate(
    predictions: Predictions,
    examples: Sequence[Example],
    score: Score,
    *,
    unanswerable: bool,
    seed: int,
    tuned: TunedThreshold | None = None,
) -> Evaluation:
    """Hold answers against the right ones by the official evaluation of SQuAD v1.1, or of v2.0
    where there may be none, in the words of `score.language`.

    Args:
        predictions: answers to the examples, at the threshold of `score`.
        examples: the questions, in the same order.
        score: the job's section.
        unanswerable: SQuAD v2.
        seed: of the bootstrap.
        tuned: a threshold to be used instead of the one of `score`.
    """
    if not unanswerable:
        return _evaluate_v1(predictions, examples, score, seed)
    return _evaluate_v2(predictions, examples, score, seed, tuned)


def _evaluate_v1(
    predictions: Predictions, examples: Sequence[Example], score: Score, seed: int
) -> Evaluation:
    texts = {a.id: a.text for a in predictions.answers}
    scores = squad_scores(texts, _right_answers(examples), score.language)
    return Evaluation(
        predictions=predictions,
        exact_match=scores.exact_match,
        f1=scores.f1,
        details={},
        intervals=intervals(scores, seed),
        exact_N=scores.exact_N,
        f1_N=scores.f1_N,
        null_threshold=None,
        tuned=None,
    )


def _evaluate_v2(
    predictions: Predictions,
    examples: Sequence[Example],
    score: Score,
    seed: int,
    tuned: TunedThreshold | None,
) -> Evaluation:
    references = _right_answers(examples)
    details: dict[str, float] = {}
    scores = by_default = _scores_v2(predictions, references, score)
    threshold, ends = score.null_threshold, intervals(by_default, seed)
    if tuned is not None:
        threshold = tuned.threshold
        decided = tuple(decide(answer, threshold, score.mode) for answer in predictions.answers)
        predictions = replace(predictions, answers=decided)
        scores = _scores_v2(predictions, references, score)
        details |= {"default_exact_match": by_default.exact_match, "default_f1": by_default.f1}
        ends = intervals(scores, seed) | {
            f"default_{key}": ends[key] for key in ("exact_match", "f1")
        }
    if scores.has_answer is not None:
        details["has_answer_exact_match"] = scores.has_answer.exact_match
        details["has_answer_f1"] = scores.has_answer.f1
    if scores.no_answer is not None:
        details["no_answer_exact_match"] = scores.no_answer.exact_match
    best = _best(predictions, references, score)
    details |= {"best_exact_match": best.exact_match, "best_f1": best.f1}
    return Evaluation(
        predictions=predictions,
        exact_match=scores.exact_match,
        f1=scores.f1,
        details=details,
        intervals=ends,
        exact_N=scores.exact_N,
        f1_N=scores.f1_N,
        null_threshold=threshold,
        tuned=None if tuned is None else tuned.tuned,
    )


def _right_answers(examples: Sequence[Example]) -> dict[str, Sequence[str]]:
    return {example.id: example.answers for example in examples}


def _scores_v2(
    predictions: Predictions, references: Mapping[str, Sequence[str]], score: Score
) -> ScoresV2:
    """Scores of the answers as they are: the threshold has decided already."""
    texts = {a.id: a.text for a in predictions.answers}
    return squad_v2_scores(texts, references, language=score.language)


def _best(predictions: Predictions, references: Mapping[str, Sequence[str]], score: Score) -> Best:
    """What the official search for a threshold finds; it is given each question's best span and how
    much better "no answer" scored."""
    scores = squad_v2_scores(
        _best_spans(predictions),
        references,
        {a.id: a.null_difference for a in predictions.answers},
        language=score.language,
    )
    if scores.best is None:
        raise AssertionError("a search that is given no-answer scores finds a threshold")
    return scores.best


def _best_spans(predictions: Predictions) -> dict[str, str]:
    """What each question would be answered with if it had to be answered."""
    return {a.id: a.span.text if a.span else "" for a in predictions.answers}
