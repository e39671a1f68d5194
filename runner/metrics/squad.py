"""Scores by the official evaluations of SQuAD v1.1 and v2.0, to the last digit, in any language's
words.

The sums run in the questions' order and in the scripts' own ways of adding, because another order
rounds differently. Imports neither torch nor evaluate; `eval.hf_metrics` offers the same scores as
`evaluate.Metric` objects. Shape suffixes: N questions, in the order of the references; M groups of
questions of equal null difference; U different values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from runner.errors import DataError
from runner.job.schema import Language
from runner.metrics.normalise import normaliser

Normalise = Callable[[str], str]
ENGLISH = normaliser("en")


@dataclass(frozen=True, eq=False)
class Scores:
    """SQuAD v1.1 scores.

    exact_match, f1: percent over all questions. total: how many; missing: how many of them have no
    prediction and so score 0. exact_N, f1_N: float64, percent of each question in `ids`.
    """

    exact_match: float
    f1: float
    total: int
    missing: int
    ids: tuple[str, ...]
    exact_N: np.ndarray
    f1_N: np.ndarray

    def official(self) -> dict[str, float]:
        """What the official script prints."""
        return {"exact_match": self.exact_match, "f1": self.f1}


@dataclass(frozen=True)
class Part:
    """Percent and number of the questions that have an answer, or of those that have none."""

    exact_match: float
    f1: float
    total: int


@dataclass(frozen=True)
class Best:
    """Percent at the best threshold that the official search finds on the very questions scored.

    An upper bound, never a result to report.
    """

    exact_match: float
    exact_match_threshold: float
    f1: float
    f1_threshold: float


@dataclass(frozen=True, eq=False)
class ScoresV2:
    """SQuAD v2.0 scores, at the null threshold that was given.

    exact_match, f1: percent over all questions; has_answer, no_answer: over those with and without
    an answer, None where there are none. best: None without no-answer scores. exact_N, f1_N:
    float64, percent of each question in `ids`. has_answer_N: bool.
    """

    exact_match: float
    f1: float
    total: int
    has_answer: Part | None
    no_answer: Part | None
    best: Best | None
    ids: tuple[str, ...]
    exact_N: np.ndarray
    f1_N: np.ndarray
    has_answer_N: np.ndarray

    def official(self) -> dict[str, float]:
        """What the official script prints, under its names and in its order."""
        table: dict[str, float] = {"exact": self.exact_match, "f1": self.f1, "total": self.total}
        for name, part in (("HasAns", self.has_answer), ("NoAns", self.no_answer)):
            if part is not None:
                table |= {f"{name}_exact": part.exact_match, f"{name}_f1": part.f1}
                table[f"{name}_total"] = part.total
        if self.best is not None:
            table["best_exact"] = self.best.exact_match
            table["best_exact_thresh"] = self.best.exact_match_threshold
            table["best_f1"] = self.best.f1
            table["best_f1_thresh"] = self.best.f1_threshold
        return table


def squad_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    language: Language = "en",
) -> Scores:
    """Score by SQuAD v1.1. Predictions of unknown questions do not count, missing ones score 0.

    Raises:
        DataError: there are no questions, or one has no right answer.
    """
    _check_questions(references)
    bare = [id for id, golds in references.items() if not golds]
    if bare:
        raise DataError(
            f"{_some(bare)}: no right answer. SQuAD v1.1 scores need one for every question; data "
            "with unanswerable questions are scored by SQuAD v2.0 (squad_v2_scores)."
        )
    normalise = normaliser(language)
    exact, overlap = [], []
    for id, golds in references.items():
        prediction = predictions.get(id)
        exact.append(False if prediction is None else exact_match(prediction, golds, normalise))
        overlap.append(0 if prediction is None else f1(prediction, golds, normalise))
    total_f1 = 0.0
    for value in overlap:  # one by one, as the script adds; sum() compensates from Python 3.12 on
        total_f1 += value
    return Scores(
        exact_match=100.0 * sum(exact) / len(exact),
        f1=100.0 * total_f1 / len(exact),
        total=len(exact),
        missing=sum(id not in predictions for id in references),
        ids=tuple(references),
        exact_N=100.0 * np.array(exact, dtype=np.float64),
        f1_N=100.0 * np.array(overlap, dtype=np.float64),
    )


def squad_v2_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float] | None = None,
    threshold: float = 1.0,
    language: Language = "en",
) -> ScoresV2:
    """Score by SQuAD v2.0; a question without right answers wants the prediction "".

    Args:
        predictions: text of each question; those of unknown questions do not count.
        references: right answers of each question, none where it has no answer.
        no_answer_scores: probability, or any score that grows with it (null_difference), that the
            question has no answer. Ties in the best-threshold search go by the order given here.
        threshold: "" is taken as the prediction where the no-answer score is greater.
        language: whose words are compared.

    Raises:
        DataError: there are no questions, or one lacks its prediction or no-answer score. (The
            official script stops on these too, with a KeyError.)
    """
    _check_questions(references)
    _check_complete(predictions, references, "prediction")
    if no_answer_scores is not None:
        _check_complete(no_answer_scores, references, "no-answer score")
    normalise = normaliser(language)
    exact: dict[str, float] = {}
    overlap: dict[str, float] = {}
    for id, golds in references.items():
        exact[id], overlap[id] = match_v2(predictions[id], golds, normalise)
    has_answer = {id: bool(golds) for id, golds in references.items()}
    best = None
    if no_answer_scores is not None:
        best = Best(
            *_best_threshold(predictions, exact, no_answer_scores, has_answer),
            *_best_threshold(predictions, overlap, no_answer_scores, has_answer),
        )
        for id in references:
            if no_answer_scores[id] > threshold:
                exact[id] = overlap[id] = float(not has_answer[id])

    def part(wanted: bool) -> Part | None:
        ids = [id for id in references if has_answer[id] == wanted]
        return _part([exact[id] for id in ids], [overlap[id] for id in ids]) if ids else None

    whole = _part(list(exact.values()), list(overlap.values()))
    return ScoresV2(
        exact_match=whole.exact_match,
        f1=whole.f1,
        total=whole.total,
        has_answer=part(True),
        no_answer=part(False),
        best=best,
        ids=tuple(references),
        exact_N=100.0 * np.array(list(exact.values()), dtype=np.float64),
        f1_N=100.0 * np.array(list(overlap.values()), dtype=np.float64),
        has_answer_N=np.array(list(has_answer.values()), dtype=bool),
    )


@dataclass(frozen=True)
class NullThreshold:
    """A threshold for null_difference, and the percent it reaches on the data it was tuned on."""

    threshold: float
    score: float


def tune_null_threshold(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    null_differences: Mapping[str, float],
    metric: Literal["f1", "exact_match"] = "f1",
    language: Language = "en",
) -> NullThreshold:
    """Find the threshold of the best SQuAD v2.0 score, on data that will not be reported.

    Unlike the official search it only takes thresholds that reach the score they promise: questions
    of equal difference fall on the same side. It lies halfway between the neighbouring differences,
    one logit beyond the last of them; of equally good ones the nearest to 0, run_qa's default.

    Args:
        predictions: text to answer each question with if it is answered: its best span's.
        references: right answers of each question, none where it has no answer.
        null_differences: Answer.null_difference of each question.

    Raises:
        DataError: as `squad_v2_scores`.
    """
    _check_questions(references)
    _check_complete(predictions, references, "prediction")
    _check_complete(null_differences, references, "null difference")
    normalise = normaliser(language)
    matches = [match_v2(predictions[id], golds, normalise) for id, golds in references.items()]
    answered_N = np.array(matches, dtype=np.float64)[:, 1 if metric == "f1" else 0]
    empty_N = np.array([not golds for golds in references.values()], dtype=np.float64)
    difference_N = np.array([null_differences[id] for id in references], dtype=np.float64)
    # Questions without a finite difference are on one side of every threshold.
    tuned_N = np.isfinite(difference_N)
    fixed = np.where(difference_N > 0, empty_N, answered_N)[~tuned_N].sum()
    answered_N, empty_N, difference_N = answered_N[tuned_N], empty_N[tuned_N], difference_N[tuned_N]
    if not len(difference_N):
        return NullThreshold(0.0, float(100.0 * fixed / len(references)))
    # bound_M1[m] separates m groups of equal differences that are answered from those that are not.
    group_M, group_N = np.unique(difference_N, return_inverse=True)
    gain_M = np.bincount(group_N, weights=answered_N - empty_N)
    total_M1 = fixed + empty_N.sum() + np.concatenate([[0.0], np.cumsum(gain_M)])
    edge = np.concatenate([[group_M[0] - 2], group_M, [group_M[-1] + 2]])
    below_M1, above_M1 = edge[:-1], edge[1:]
    bound_M1 = below_M1 + (above_M1 - below_M1) / 2
    # Between two neighbouring floats there is no middle: the lower one answers its own group.
    bound_M1 = np.where(bound_M1 < above_M1, bound_M1, below_M1)
    best_M1 = np.flatnonzero(total_M1 > total_M1.max() - 1e-9)  # equal but for rounding
    chosen = best_M1[np.abs(bound_M1[best_M1]).argmin()]
    return NullThreshold(float(bound_M1[chosen]), float(100.0 * total_M1[chosen] / len(references)))


def _part(exact: Sequence[float], overlap: Sequence[float]) -> Part:
    return Part(100.0 * sum(exact) / len(exact), 100.0 * sum(overlap) / len(exact), len(exact))


def _best_threshold(
    predictions: Mapping[str, str],
    scores: Mapping[str, float],
    no_answer_scores: Mapping[str, float],
    has_answer: Mapping[str, bool],
) -> tuple[float, float]:
    """Best percent and its threshold, as the official script: answer ever more questions.

    The script tries a threshold after every question, also between questions of equal score, and
    remembers the first best one.
    """
    ids = sorted((id for id in no_answer_scores if id in scores), key=no_answer_scores.__getitem__)
    gain_N = [scores[id] if has_answer[id] else -bool(predictions[id]) for id in ids]
    start = sum(not answerable for answerable in has_answer.values())
    total_N = np.cumsum([start, *gain_N], dtype=np.float64)  # one by one
    best = int(total_N.argmax())
    return 100.0 * float(total_N[best]) / len(scores), no_answer_scores[
        ids[best - 1]
    ] if best else 0.0


def _check_questions(references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise DataError("There are no questions to score.")


def _check_complete(
    table: Mapping[str, object], references: Mapping[str, Sequence[str]], what: str
) -> None:
    missing = [id for id in references if id not in table]
    if missing:
        raise DataError(
            f"{_some(missing)}: no {what}. SQuAD v2.0 scores need one for each of the "
            f"{len(references)} questions."
        )


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:3])
    return f"question {shown}" if len(ids) <= 3 else f"questions {shown} and {len(ids) - 3} more"


def exact_match(prediction: str, golds: Sequence[str], normalise: Normalise = ENGLISH) -> bool:
    """Whether the prediction equals one of the right answers (at least one) once normalised."""
    prediction = normalise(prediction)
    return any(prediction == normalise(gold) for gold in golds)


def f1(prediction: str, golds: Sequence[str], normalise: Normalise = ENGLISH) -> float:
    """The best word overlap F1, 0 to 1, with one of the right answers (at least one), as in v1.1.

    Where neither has a word left after normalising it is 0; version 2.0 says 1.
    """
    words = normalise(prediction).split()
    return max(_overlap(words, normalise(gold).split()) for gold in golds)


def match_v2(
    prediction: str, golds: Sequence[str], normalise: Normalise = ENGLISH
) -> tuple[int, float]:
    """Exact match and F1, 0 to 1, as in v2.0: without right answers, only "" is right.

    Right answers of which normalising leaves nothing do not count. Whole numbers are int, as in the
    script: from Python 3.12 on sum() adds int and float differently.
    """
    prediction = normalise(prediction)
    gold_texts = [text for gold in golds if (text := normalise(gold))] or [""]
    exact = int(prediction in gold_texts)
    if not prediction:
        return exact, exact
    words = prediction.split()
    return exact, max(_overlap(words, text.split()) for text in gold_texts)


def _overlap(words: list[str], gold_words: list[str]) -> float:
    common = sum((Counter(words) & Counter(gold_words)).values())
    if common == 0:
        return 0
    precision, recall = common / len(words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)
