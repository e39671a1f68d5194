"""Scores a file of predictions, whoever made them, by the official evaluations: needs no model and
no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.data.dataset import Dataset
from runner.data.formats.files import read_file
from runner.data.formats.files.json_text import read_json
from runner.data.formats.rows import RawTable, row_id, short_value
from runner.errors import DataError, UsageError
from runner.job.schema import Language
from runner.metrics.normalise import foreign_answers
from runner.metrics.squad import Scores, ScoresV2, squad_scores, squad_v2_scores
from runner.metrics.statistics import LEVEL, RESAMPLES, intervals

# Our names of scores in the official table of v2.0; v1.1's exact_match is exact there.
_OFFICIAL = {
    "exact_match": "exact",
    "has_answer_exact_match": "HasAns_exact",
    "has_answer_f1": "HasAns_f1",
    "no_answer_exact_match": "NoAns_exact",
}
_ALIKE = (("exact", "exact_match"), ("NoAns_exact", "NoAns_f1"))
_TEXT_KEYS = ("answer", "prediction_text", "text")
_PROBABILITY, _DIFFERENCE = "no_answer_probability", "null_difference"


@dataclass(frozen=True)
class SubmittedSpans:
    """Where a file comes from spantune: the best span's text of each question id, also where the
    model answered nothing, and by how much "no answer" scored better (null_difference, logits)."""

    texts: Mapping[str, str]
    differences: Mapping[str, float]


@dataclass(frozen=True)
class SubmittedAnswers:
    """Predicted text of each question id, and no-answer probabilities or spans where the file has
    them."""

    texts: Mapping[str, str]
    no_answer: Mapping[str, float] | None
    spans: SubmittedSpans | None = None


def score_file(
    path: Path,
    dataset: Dataset,
    *,
    v2: bool,
    no_answer: Path | None,
    threshold: float | None,
    language: Language = "en",
    seed: int,
) -> dict[str, Any]:
    """Score a file of predictions; no-answer probabilities in a file of their own mean SQuAD v2.0.

    Raises:
        UsageError: if there is a threshold for probabilities that are not there.
        AssetError, DataError: as `read_predictions` and `score_predictions`.
    """
    predictions = read_predictions(path)
    if no_answer is not None:
        predictions, v2 = SubmittedAnswers(predictions.texts, read_no_answer(no_answer)), True
    if threshold is not None and predictions.no_answer is None:
        raise UsageError(
            f"--no-answer-threshold is for no-answer probabilities; {path} has none, and there is"
            " no --no-answer"
        )
    threshold = 1.0 if threshold is None else threshold
    return score_predictions(
        predictions, dataset, v2=v2, threshold=threshold, language=language, seed=seed
    )


def file_lines(result: Mapping[str, Any]) -> list[str]:
    """The official table for a terminal, an interval beside each score that has one."""
    lines = []
    ends = {_OFFICIAL.get(name, name): pair for name, pair in result["intervals"].items()}
    ends |= {alike: ends[name] for name, alike in _ALIKE if name in ends}
    for name, value in result["metrics"].items():
        spelled = str(value) if isinstance(value, int) else f"{value:.6f}"
        between = f"  [{ends[name][0]:.1f} to {ends[name][1]:.1f}]" if name in ends else ""
        lines.append(f"{name:20} {spelled:>12}{between}")
    for count, what in (
        (result["without_prediction"], "questions have no prediction and count as wrong"),
        (result["of_other_questions"], "predictions are of questions that are not in the data"),
    ):
        if count:
            lines.append(f"{count:,} {what}")
    lines += result["caveats"]
    resamples = result["bootstrap"]["resamples"]
    lines.append(f"In brackets: 95 % bootstrap intervals over questions ({resamples:,} resamples)")
    return lines


def read_predictions(path: Path) -> SubmittedAnswers:
    """Read the official form, one JSON object of id and text; or lines (or a list) of objects with
    an id and a text called answer, prediction_text or text, perhaps with no_answer_probability;
    or what spantune itself writes, with null_difference and n_best.

    Raises:
        AssetError: if there is no such file.
        DataError: naming the line that is not such an object, or repeats an id.
    """
    table, lines = read_json(path, read_file(path))
    named_lines = path.suffix.lower() == ".jsonl"
    if isinstance(table, dict) and (
        _text_key(table) or (named_lines and table.keys() & {"id", *_TEXT_KEYS})
    ):
        table, lines = [table], [1]  # JSON Lines with a single prediction
    if isinstance(table, list):
        places = RawTable(table, lines=lines).places(str(path))
        return _from_rows(path, list(zip(places, table, strict=True)))
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise DataError(f"{path}: is no object of question ids and predicted texts")
    return SubmittedAnswers(table, None)


def _text_key(row: Any) -> str | None:
    """What a row calls its text; None where it is no prediction."""
    if not isinstance(row, dict) or "id" not in row:
        return None
    return next((key for key in _TEXT_KEYS if isinstance(row.get(key), str)), None)


def read_no_answer(path: Path) -> dict[str, float]:
    """Read the official form of no-answer probabilities: one JSON object of id and number.

    Raises:
        AssetError, DataError: as `read_predictions`.
    """
    table, _ = read_json(path, read_file(path))
    if not isinstance(table, dict) or not all(map(_is_number, table.values())):
        raise DataError(f"{path}: is no object of question ids and numbers")
    return {id: float(value) for id, value in table.items()}


def score_predictions(
    predictions: SubmittedAnswers,
    dataset: Dataset,
    *,
    v2: bool,
    threshold: float,
    language: Language = "en",
    seed: int,
) -> dict[str, Any]:
    """The official table, intervals beside it.

    Args:
        predictions: texts, and for SQuAD v2 no-answer probabilities, or spans; those are only
            searched for the best threshold, since their model has decided already.
        dataset: the right answers.
        v2: score by SQuAD v2.0, else by v1.1.
        threshold: "" is the prediction where the no-answer probability is above it.
        language: whose words are compared.
        seed: of the bootstrap.

    Raises:
        DataError: if no prediction is of these questions, or SQuAD v2.0 lacks one (v1.1 counts it
            as wrong).
    """
    references = {example.id: example.answers for example in dataset.examples}
    if not references.keys() & predictions.texts.keys():
        given, asked = (
            next(map(short_value, ids), "none") for ids in (predictions.texts, references)
        )
        raise DataError(
            f"{dataset.source}: none of its {len(references):,} questions is among the"
            f" {len(predictions.texts):,} predictions (ids such as {asked} here, {given} there);"
            " are they of other data, or was one of the two numbered anew?"
        )
    scores = _scores(predictions, references, v2=v2, threshold=threshold, language=language)
    answers = (text for golds in references.values() for text in golds)
    doubt = foreign_answers(answers, language, "--language")
    return {
        "metrics": scores.official(),
        "intervals": {name: list(ends) for name, ends in intervals(scores, seed).items()},
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": seed},
        "questions": scores.total,
        "without_prediction": 0 if isinstance(scores, ScoresV2) else scores.missing,
        "of_other_questions": sum(id not in references for id in predictions.texts),
        "data": {"source": dataset.source, "sha256": dataset.sha256},
        "caveats": [] if doubt is None else [doubt],
    }


def _scores(
    predictions: SubmittedAnswers,
    references: Mapping[str, Sequence[str]],
    *,
    v2: bool,
    threshold: float,
    language: Language,
) -> Scores | ScoresV2:
    texts = predictions.texts
    if not v2:
        return squad_scores(texts, references, language)
    scores = squad_v2_scores(texts, references, predictions.no_answer, threshold, language)
    spans = predictions.spans
    if predictions.no_answer is None and spans is not None:
        found = squad_v2_scores(spans.texts, references, spans.differences, language=language)
        scores = replace(scores, best=found.best)
    return scores


def _from_rows(path: Path, rows: list[tuple[str, Any]]) -> SubmittedAnswers:
    texts: dict[str, str] = {}
    best: dict[str, str | None] = {}
    numbers: dict[str, dict[str, float]] = {_PROBABILITY: {}, _DIFFERENCE: {}}
    for number, (place, row) in enumerate(rows, 1):
        key = _text_key(row)
        if key is None:
            raise DataError(f"{place}: has no id, or no text called {', '.join(_TEXT_KEYS)}")
        id = str(row_id(row["id"], number))
        if id in texts:
            raise DataError(f"{place}: question {id} has a prediction already")
        texts[id] = row[key]
        for name, found in numbers.items():
            if name in row:
                if not _is_number(row[name]):
                    raise DataError(f"{place}: {name} is no number")
                found[id] = float(row[name])
        if _DIFFERENCE in row:
            best[id] = row[key] or _best_span(row)
    for name, found in numbers.items():
        if found and len(found) != len(texts):
            raise DataError(f"{path}: only {len(found)} of {len(texts)} have {name}")
    spans = {id: text for id, text in best.items() if text is not None}
    searched = (
        SubmittedSpans(spans, numbers[_DIFFERENCE]) if spans and len(spans) == len(texts) else None
    )
    return SubmittedAnswers(texts, numbers[_PROBABILITY] or None, searched)


def _best_span(row: Mapping[str, Any]) -> str | None:
    # What would have been answered; None where the n-best list is cut before it.
    listed = row.get("n_best")
    entries = listed if isinstance(listed, list) else []
    texts = [entry.get("answer") for entry in entries if isinstance(entry, dict)]
    return next((text for text in texts if isinstance(text, str) and text), None)


def _is_number(value: Any) -> bool:
    # NaN has no place in an order, and the search for the best threshold sorts.
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
