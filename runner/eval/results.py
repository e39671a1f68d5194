"""Scores as they stand in result.json, and as lines for the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from runner.eval.evaluation import Evaluation, in_use
from runner.job.inference import InferenceSettings, settings_of_job
from runner.job.schema import Job
from runner.job.sources import public_name
from runner.metrics.statistics import LEVEL, RESAMPLES
from runner.utils.files import below_here


def headline(scores: Evaluation) -> dict[str, float]:
    """The scores of a run, percent and nats."""
    predictions = scores.predictions
    return {
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "loss": predictions.loss,
        "start_accuracy": predictions.start_accuracy,
        "end_accuracy": predictions.end_accuracy,
        "span_accuracy": predictions.span_accuracy,
    }


def reported(scores: Evaluation) -> dict[str, float]:
    """What may be published: all scores but those at a threshold that was chosen on the very
    questions scored."""
    details = {k: v for k, v in scores.details.items() if not k.startswith("best_")}
    return headline(scores) | details


def result_scores(scores: Evaluation, default_threshold: float, seed: int) -> dict[str, Any]:
    """The scores in result.json: metrics, their intervals and, for SQuAD v2, the null threshold.

    Args:
        scores: the evaluation.
        default_threshold: null threshold where none is tuned.
        seed: of the bootstrap.
    """
    table: dict[str, Any] = {
        "metrics": headline(scores) | scores.details,
        "intervals": {name: list(ends) for name, ends in scores.intervals.items()},
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": seed},
        "questions": len(scores.exact_N),
    }
    if scores.null_threshold is not None:
        table["null_threshold"] = {
            "in_use": scores.null_threshold,
            "default": default_threshold,
            "tuned": None if scores.tuned is None else asdict(scores.tuned),
        }
    return table


def settings_of_run(job: Job, scores: Evaluation) -> InferenceSettings:
    """The settings of the exported model; folders of this machine are left out."""
    tuned = scores.tuned
    if tuned is not None:
        tuned = replace(tuned, source=public_name(tuned.source))
    score = in_use(job.score, scores.null_threshold)
    return settings_of_job(job.data, score).model_copy(update={"tuned": tuned})


def score_line(result: Mapping[str, Any], prefix: str) -> str:
    """Exact match and F1 with their intervals: those in use, or with the prefix "default_"."""
    parts = []
    for key, name in (("exact_match", "exact match"), ("f1", "F1")):
        low, high = result["intervals"][f"{prefix}{key}"]
        value = result["metrics"][f"{prefix}{key}"]
        parts.append(f"{name} {value:.1f} % [{low:.1f} to {high:.1f}]")
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]


def threshold_lines(result: Mapping[str, Any]) -> list[str]:
    """SQuAD v2: the null threshold in use and its origin, and what the default one gives."""
    if "null_threshold" not in result:
        return []
    threshold, tuned = result["null_threshold"], result["null_threshold"]["tuned"]
    if tuned is None:
        return [f"at the null threshold {threshold['in_use']:.4g}, which was not tuned"]
    return [
        (
            f"at the null threshold {threshold['in_use']:.4g}, tuned on {tuned['questions']:,}"
            f" questions of {below_here(tuned['source'])};"
        ),
        f"at the default, {threshold['default']:.4g}: {score_line(result, 'default_')}",
    ]
