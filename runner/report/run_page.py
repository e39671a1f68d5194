"""Makes the page of one run, or of an evaluation: scores, curves, epochs, where it is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.job.sources import describe_sample, public_name
from runner.report.error_analysis import FEWEST, decision_table, error_tables, worst
from runner.report.page import (
    Block,
    Cell,
    Chart,
    Charts,
    Code,
    Headline,
    Misses,
    Page,
    PageSection,
    Paragraph,
    PercentCell,
    Series,
    Table,
)
from runner.report.read import Rows, RunRecord
from runner.utils.text import duration

MISSES = 15
POINTS = 300  # of the loss per step
SEED = 0  # of the bootstrap where a run names none

_ACCURACY = "Accuracy: windows whose start and end are both right."

NAMES = {
    "exact_match": "exact match",
    "f1": "F1",
    "has_answer_exact_match": "exact match, questions with an answer",
    "has_answer_f1": "F1, questions with an answer",
    "no_answer_exact_match": "left unanswered, questions without an answer",
    "default_exact_match": "exact match at the default threshold",
    "default_f1": "F1 at the default threshold",
    "best_exact_match": "exact match at these questions' best threshold (no result)",
    "best_f1": "F1 at these questions' best threshold (no result)",
    "span_accuracy": "windows with start and end right",
    "start_accuracy": "windows with the start right",
    "end_accuracy": "windows with the end right",
    "loss": "loss (nats)",
}


def run_page(scored: RunRecord) -> Page:
    """The page of a run or of an evaluation, from what its folder holds."""
    return Page(
        title=scored.name,
        lead=_lead(scored),
        facts=_facts(scored),
        sections=list(_sections(scored)),
    )


def scores_of(result: Mapping[str, Any]) -> dict[str, PercentCell]:
    """Exact match and F1 of result.json, with their intervals."""
    return {NAMES[key]: percent_of(result, key) for key in ("exact_match", "f1")}


def percent_of(result: Mapping[str, Any], key: str) -> PercentCell:
    """A score of result.json; one without an interval has none."""
    intervals = result["intervals"]
    ends = intervals.get(key, (None, None))
    return PercentCell(result["metrics"][key], *ends)


def scored_on(scored: RunRecord) -> str:
    """The questions that were scored; a sample of a slice says that it is one."""
    source = public_name(scored.source)
    return source if scored.job is None else f"{source}{_drawn(scored.job, 'validation_sample')}"


def _drawn(job: Mapping[str, Any], key: str) -> str:
    # The job is a table as it stands in the run folder: nobody has checked it.
    sample = job["data"].get(key)
    return describe_sample(sample if isinstance(sample, int) else None)


def _lead(scored: RunRecord) -> str:
    if scored.job is None:
        model = "" if scored.result is None else scored.result["model"]["name"]
        return f"{public_name(model)}, scored on {scored_on(scored)}."
    model, train = scored.job["model"]["name"], scored.job["data"]["train"]
    questions = f"{public_name(train)}{_drawn(scored.job, 'sample')}"
    trained = f"{public_name(model)}, fine-tuned on {questions}"
    if scored.result is None:
        return f"{trained}; not finished, so there is no score yet."
    return f"{trained}, scored on {scored_on(scored)}."


def _facts(scored: RunRecord) -> dict[str, str]:
    facts: dict[str, str] = {}
    if scored.predictions:
        facts["questions"] = f"{len(scored.predictions):,}"
    result = scored.result
    if result is not None and "epoch" in result:
        facts["weights of"] = f"epoch {result['epoch']}, step {result['step']:,}"
    record = scored.provenance
    if record is not None:
        machine = record["machine"]
        facts["machine"] = f"{record['ranks']} x {machine['devices'][0]}"
        facts["seed"] = str(record["seed"])
        commit = record["git"]["commit"]
        if commit:
            changed = " with changes" if record["git"]["diff_sha256"] else ""
            facts["commit"] = f"{commit[:12]}{changed}"
    if result is not None and "seconds" in result:
        facts["time"] = duration(result["seconds"]["total"])
    return facts


def _sections(scored: RunRecord) -> Iterator[PageSection]:
    if scored.result is not None:
        own = scored.job is not None
        yield PageSection("Scores", list(_scores(scored.result, own)))
    if scored.epochs:
        table = Table("Epochs", _epochs(scored.epochs))
        yield PageSection("Training", [*_curves(scored), table, Paragraph(_ACCURACY)])
    if scored.probes:
        yield PageSection("Probes", list(_probes(scored.probes)))
    if scored.predictions:
        seed = SEED if scored.result is None else int(scored.result["bootstrap"]["seed"])
        few = (
            f"Groups of fewer than {FEWEST} questions, or all right or all wrong, have no interval."
        )
        tables: list[Block] = [*error_tables(scored.predictions, seed), Paragraph(few)]
        if any(not record["answers"] for record in scored.predictions):
            tables.insert(0, decision_table(scored.predictions))
        yield PageSection("Where it is wrong", tables)
        misses = worst(scored.predictions, MISSES)
        if misses:
            missed = sum(not record["exact_match"] for record in scored.predictions)
            about = (
                f"{missed:,} of {len(scored.predictions):,} questions have no exact match. These"
                " share least with a right answer; of equal ones the model was surest of the"
                " first."
            )
            yield PageSection("Worst misses", [Paragraph(about), Misses(misses)])
    if scored.elsewhere:
        yield PageSection("Other data", [Table("Scored elsewhere", _elsewhere(scored.elsewhere))])
    if scored.result is not None and "seconds" in scored.result:
        rows = [
            {"phase": name.replace("_", " "), "seconds": seconds}
            for name, seconds in scored.result["seconds"].items()
        ]
        yield PageSection("Time", [Table("Seconds by phase", rows)])
    if scored.job_text:
        yield PageSection("Job", [Code("The job as it ran", "toml", scored.job_text)])


def _scores(result: Mapping[str, Any], own: bool) -> Iterator[Block]:
    yield Headline(scores_of(result))
    level, resamples = result["bootstrap"]["level"], result["bootstrap"]["resamples"]
    yield Paragraph(
        f"Intervals: {100 * level:.0f} % bootstrap over questions, {resamples:,} resamples. They"
        " say how much other questions of this kind would move a score, not what another seed"
        " would."
    )
    if "null_threshold" in result:
        yield from _thresholds(result, own)
    rest = [
        {
            "score": NAMES[key] if key in NAMES else key.replace("_", " "),
            "value": value if key == "loss" else percent_of(result, key),
        }
        for key, value in result["metrics"].items()
        if key not in ("exact_match", "f1", "default_exact_match", "default_f1")
    ]
    if rest:
        yield Table("Further scores", rest)


def _thresholds(result: Mapping[str, Any], own: bool) -> Iterator[Block]:
    """The null threshold in use, beside the default one where it was tuned.

    Args:
        result: result.json.
        own: whether it is a run's own, not an evaluation's on other data: only a run has held its
            tuning questions apart from those it scores.
    """
    threshold, tuned = result["null_threshold"], result["null_threshold"]["tuned"]
    rows: list[dict[str, Cell]] = []
    if tuned is None and threshold["in_use"] != threshold["default"]:
        rows.append(_threshold_row("given, in use", threshold["in_use"], result, ""))
        about = f"It was given for this evaluation; the default is {threshold['default']:.4g}."
    elif tuned is None:
        rows.append(_threshold_row("default, in use", threshold["in_use"], result, ""))
        about = (
            "Nothing was tuned: data.tuning names no questions for it."
            if own
            else "No tuned threshold is in use."
        )
    else:
        rows.append(_threshold_row("tuned, in use", threshold["in_use"], result, ""))
        rows.append(_threshold_row("default", threshold["default"], result, "default_"))
        metric = NAMES[tuned["metric"]]
        apart = "; none of them is scored here" if own else ""
        about = (
            f"The threshold was tuned for {metric} on {tuned['questions']:,} questions of"
            f" {public_name(tuned['source'])}, where it reaches {tuned['percent']:.1f} %{apart}. It"
            " is stored with the model."
        )
    yield Table("Null threshold: above it the model answers nothing", rows)
    yield Paragraph(about)


def _threshold_row(
    name: str, value: float, result: Mapping[str, Any], prefix: str
) -> dict[str, Cell]:
    return {
        "threshold": name,
        "logits": value,
        "exact match %": percent_of(result, f"{prefix}exact_match"),
        "F1 %": percent_of(result, f"{prefix}f1"),
    }


def _curves(scored: RunRecord) -> Iterator[Block]:
    epochs, steps = scored.epochs, scored.steps
    loss = Chart(
        title="Loss",
        x_label="epoch",
        y_label="loss (nats)",
        series=[
            Series("training, per step", "grey", thinned(_points(steps, "loss_nats"))),
            Series("training, epoch mean", "blue", _points(epochs, "train_loss_nats")),
            Series("validation", "orange", _points(epochs, "validation_loss_nats")),
        ],
    )
    scores = Chart(
        title="Scores",
        x_label="epoch",
        y_label="score (%)",
        series=[
            Series("validation F1", "blue", _points(epochs, "f1_percent"), _band(epochs, "f1")),
            Series(
                "validation exact match",
                "orange",
                _points(epochs, "exact_match_percent"),
                _band(epochs, "exact_match"),
            ),
            Series("validation accuracy", "green", _points(epochs, "span_accuracy_percent")),
            Series("training accuracy", "purple", _points(epochs, "train_span_accuracy_percent")),
        ],
        top=100.0,
    )
    yield Charts([loss, scores], "curves.svg")


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(float(row["epoch"]), float(row[key])) for row in rows if row[key]]


def _band(rows: Rows, name: str) -> list[tuple[float, float, float]]:
    low, high = f"{name}_low_percent", f"{name}_high_percent"
    return [
        (float(row["epoch"]), float(row[low]), float(row[high])) for row in rows if row.get(low)
    ]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points: means of neighbours, each at its last x."""
    size = -(-len(points) // POINTS)
    groups = [points[place : place + size] for place in range(0, len(points), max(1, size))]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _epochs(rows: Rows) -> list[dict[str, Cell]]:
    return [
        {
            "epoch": int(row["epoch"]),
            "train loss": float(row["train_loss_nats"]),
            "valid. loss": float(row["validation_loss_nats"]),
            "exact match %": _between(row, "exact_match"),
            "F1 %": _between(row, "f1"),
            "train acc %": float(row["train_span_accuracy_percent"]),
            "valid. acc %": float(row["span_accuracy_percent"]),
            "windows/s": float(row["examples_per_second"]),
        }
        for row in rows
    ]


def _between(row: Mapping[str, str], name: str) -> PercentCell:
    ends = (f"{name}_low_percent", f"{name}_high_percent")
    return PercentCell(
        float(row[f"{name}_percent"]), *(float(row[end]) for end in ends if end in row)
    )


def _probes(rows: Rows) -> Iterator[Block]:
    asked: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        asked.setdefault(row["probe"], []).append(row)
    for answers in asked.values():
        lines: list[dict[str, Cell]] = [
            {
                "after": "no training" if row["epoch"] == "0" else f"epoch {row['epoch']}",
                "answer": row["answer"] or "(no answer)",
                "score": float(row["score"]),
                "characters": f"{row['start_character']}-{row['end_character']}",
            }
            for row in answers
        ]
        expected = answers[0]["expected"]
        wanted = f" (expected: {expected})" if expected else ""
        yield Table(f"{answers[0]['question']}{wanted}", lines)


def _elsewhere(evaluations: Sequence[RunRecord]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for evaluation in evaluations:
        result = evaluation.result
        if result is None:
            continue
        rows.append(
            {
                "data": public_name(evaluation.source),
                "questions": result["questions"],
                "exact match %": percent_of(result, "exact_match"),
                "F1 %": percent_of(result, "f1"),
                "folder": f"evaluations/{evaluation.name}",
            }
        )
    return rows
