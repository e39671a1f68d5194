"""Compares the trials of a sweep: one row for each combination of values, with an interval."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.errors import DataError
from runner.metrics.statistics import half_interval, half_interval_of_many
from runner.run.folder import RunDir
from runner.run.sweep import TrialEntry, read_manifest
from runner.utils.files import read_json
from runner.utils.tables import CellValue

SWEEP_METRICS = {"f1": "F1 %", "exact_match": "EM %"}

NOTE = (
    "± is half a 95 % interval: over seeds, of the mean (Student's t); with one seed, over the"
    " validation questions (normal approximation), which says nothing of other seeds"
)


def compare_trials(folder: Path) -> list[dict[str, CellValue]]:
    """Rows of the comparison, best F1 first, combinations without any finished trial last.

    Args:
        folder: of the sweep; everything is read from the trials' run folders.

    Returns:
        for each combination: its values, `runs` (finished/all), and for each metric the mean in
        percent and half of its 95 % interval, None where nothing is known.

    Raises:
        DataError: if the manifest or a trial's result cannot be read.
    """
    rows = []
    for combination, trials in _combinations(folder).items():
        runs = [RunDir(folder / trial.name) for trial in trials]
        results = {run: _metrics(run) for run in runs if run.finished()}
        row: dict[str, CellValue] = {
            key: value if isinstance(value, str | int | float) else json.dumps(value)
            for key, value in _short(json.loads(combination)).items()
        }
        row["runs"] = f"{len(results)}/{len(runs)}"
        for metric, label in SWEEP_METRICS.items():
            values = [result[metric] for result in results.values()]
            half = half_interval(values)
            if len(values) == 1:
                half = _half_interval_over_questions(next(iter(results)), metric)
            row[label] = statistics.fmean(values) if values else None
            row[f"± {label.split()[0]}"] = half
        losses = [result["loss"] for result in results.values()]
        row["loss"] = statistics.fmean(losses) if losses else None
        rows.append(row)
    return sorted(rows, key=lambda row: _best_first(row[SWEEP_METRICS["f1"]]))


def ranked_trials(folder: Path) -> list[RunDir]:
    """The finished trials: those of the best combination first, of each the best first.

    Raises:
        DataError: if the manifest or a trial's result cannot be read.
    """
    found: list[tuple[float, float, RunDir]] = []
    for trials in _combinations(folder).values():
        runs = [run for trial in trials if (run := RunDir(folder / trial.name)).finished()]
        scores = [_metrics(run)["f1"] for run in runs]
        mean = statistics.fmean(scores) if scores else 0.0
        found += [(mean, score, run) for score, run in zip(scores, runs, strict=True)]
    return [run for _, _, run in sorted(found, key=lambda one: (-one[0], -one[1]))]


def _combinations(folder: Path) -> dict[str, list[TrialEntry]]:
    """The trials of each combination of values, which differ in their seeds."""
    groups: dict[str, list[TrialEntry]] = {}
    for trial in read_manifest(folder).trials:
        combination = {key: value for key, value in trial.values.items() if key != "seed"}
        groups.setdefault(json.dumps(combination), []).append(trial)
    return groups


def _best_first(score: CellValue) -> float:
    return -score if isinstance(score, int | float) else math.inf


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Call each key by its last part, where that is enough to tell it from the others."""
    last = [key.rpartition(".")[2] for key in values]
    return {
        (name if last.count(name) == 1 else key): value
        for (key, value), name in zip(values.items(), last, strict=True)
    }


def _metrics(run: RunDir) -> dict[str, float]:
    try:
        metrics = read_json(run.result, dict[str, Any])["metrics"]
        return {name: float(metrics[name]) for name in (*SWEEP_METRICS, "loss")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{run.result}: cannot be read: {error}") from None


def _half_interval_over_questions(run: RunDir, metric: str) -> float | None:
    """Half the 95 % interval of one run's score, its questions taken as a sample of many."""
    try:
        lines = run.predictions.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        values = [100 * float(row[metric]) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return half_interval_of_many(values)
