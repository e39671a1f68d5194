"""Compares the trials of a sweep: one row for each combination of values, with an interval."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.errors import DataError
from runner.job.sweep import read_manifest
from runner.metrics.text_match import match_v2
from runner.run.folder import RunDir
from runner.utils.tables import Value

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z = statistics.NormalDist().inv_cdf(0.975)
METRICS = {"f1": "F1 %", "exact_match": "EM %"}
NOTE = (
    "± is half a 95 % interval: over seeds, of the mean (Student's t); with one seed, over the"
    " validation questions (normal approximation), which says nothing of other seeds"
)


def compare(folder: Path) -> list[dict[str, Value]]:
    """Rows of the comparison, best F1 first, combinations without any finished trial last.

    Args:
        folder: of the sweep; everything is read from the trials' run folders.

    Returns:
        for each combination: its values, `runs` (finished/all), and for each metric the mean in
        percent and half of its 95 % interval, None where nothing is known.

    Raises:
        DataError: if the manifest or a trial's result cannot be read.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in read_manifest(folder)["trials"]:
        combination = {key: value for key, value in trial["values"].items() if key != "seed"}
        groups.setdefault(json.dumps(combination), []).append(trial)
    rows = []
    for combination, trials in groups.items():
        runs = [RunDir(folder / trial["name"]) for trial in trials]
        results = {run: _metrics(run) for run in runs if run.finished()}
        row: dict[str, Value] = {
            key: value if isinstance(value, str | int | float) else json.dumps(value)
            for key, value in _short(json.loads(combination)).items()
        }
        row["runs"] = f"{len(results)}/{len(runs)}"
        for metric, label in METRICS.items():
            values = [result[metric] for result in results.values()]
            half = _over_seeds(values)
            if len(values) == 1:
                half = _over_questions(next(iter(results)), metric)
            row[label] = statistics.fmean(values) if values else None
            row[f"± {label.split()[0]}"] = half
        losses = [result["loss"] for result in results.values()]
        row["loss"] = statistics.fmean(losses) if losses else None
        rows.append(row)
    return sorted(rows, key=lambda row: _rank(row[METRICS["f1"]]))


def _rank(score: Value) -> float:
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
        metrics = json.loads(run.result.read_text(encoding="utf-8"))["metrics"]
        return {name: float(metrics[name]) for name in (*METRICS, "loss")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{run.result}: cannot be read: {error}") from None


def _over_seeds(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of independent runs."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    # Beyond the table, the first term of the expansion around the normal quantile.
    t = _T[freedom - 1] if freedom <= len(_T) else _Z + (_Z**3 + _Z) / (4 * freedom)
    return t * statistics.stdev(values) / math.sqrt(len(values))


def _over_questions(run: RunDir, metric: str) -> float | None:
    """Half the 95 % interval of one run's score, its questions taken as a sample of many."""
    try:
        lines = run.predictions.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        pairs = [match_v2(row["answer"], row["answers"]) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    scores = [100 * pair[metric == "f1"] for pair in pairs]
    if len(scores) < 2:
        return None
    return _Z * statistics.stdev(scores) / math.sqrt(len(scores))
