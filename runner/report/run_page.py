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
from runner.report.plots import LOSS_CURVES, LOSS_STEPS, SCORE_CURVES, SCORE_STEPS, Curve
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


def run_page(run: RunRecord) -> Page:
    """The page of a run or of an evaluation, from what its folder holds."""
    return Page(
        title=run.name,
        lead=_lead(run),
        facts=_facts(run),
        sections=list(_sections(run)),
    )


def scores_of(result: Mapping[str, Any]) -> dict[str, PercentCell]:
    """Exact match and F1 of result.json, with their intervals."""
    return {NAMES[key]: percent_of(result, key) for key in ("exact_match", "f1")}


def percent_of(result: Mapping[str, Any], key: str) -> PercentCell:
    """A score of result.json; one without an interval has none."""
    intervals = result["intervals"]
    ends = intervals.get(key, (None, None))
    return PercentCell(result["metrics"][key], *ends)


def scored_on(run: RunRecord) -> str:
    """The questions that were scored; a sample of a slice says that it is one."""
    source = public_name(run.source)
    return source if run.job is None else f"{source}{_drawn(run.job, 'validation_sample')}"


def _drawn(job: Mapping[str, Any], key: str) -> str:
    # The job is a table as it stands in the run folder: nobody has checked it.
    sample = job["data"].get(key)
    return describe_sample(sample if isinstance(sample, int) else None)


def _lead(run: RunRecord) -> str:
    if run.job is None:
        model = "" if run.result is None else run.result["model"]["name"]
        return f"{public_name(model)}, scored on {scored_on(run)}."
    model, train = run.job["model"]["name"], run.job["data"]["train"]
    questions = f"{public_name(train)}{_drawn(run.job, 'sample')}"
    trained = f"{public_name(model)}, fine-tuned on {questions}"
    if run.result is None:
        return f"{trained}; not finished, so there is no score yet."
    return f"{trained}, scored on {scored_on(run)}."


def _facts(run: RunRecord) -> dict[str, str]:
    facts: dict[str, str] = {}
    if run.predictions:
        facts["questions"] = f"{len(run.predictions):,}"
    language = (run.job or {}).get("score", {}).get("language", "en")
    if language != "en":
        facts["answers compared"] = f"in the words of {language}"
    result = run.result
    if result is not None and "epoch" in result:
        facts["weights of"] = f"epoch {result['epoch']}, step {result['step']:,}"
    provenance = run.provenance
    if provenance is not None:
        machine = provenance["machine"]
        facts["machine"] = f"{provenance['ranks']} x {machine['devices'][0]}"
        facts["seed"] = str(provenance["seed"])
        commit = provenance["git"]["commit"]
        if commit:
            changed = " with changes" if provenance["git"]["diff_sha256"] else ""
            facts["commit"] = f"{commit[:12]}{changed}"
    if result is not None and "seconds" in result:
        facts["time"] = duration(result["seconds"]["total"])
    return facts


def _sections(run: RunRecord) -> Iterator[PageSection]:
    if run.result is not None:
        is_run = run.job is not None
        yield PageSection("Scores", list(_scores(run.result, is_run)))
    if run.epochs:
        table = Table("Epochs", _epochs(run.epochs))
        yield PageSection("Training", [*_curves(run), table, Paragraph(_ACCURACY)])
    if run.probes:
        yield PageSection("Probes", list(_probes(run.probes)))
    if run.predictions:
        seed = SEED if run.result is None else int(run.result["bootstrap"]["seed"])
        few = (
            f"Groups of fewer than {FEWEST} questions, or all right or all wrong, have no interval."
        )
        tables: list[Block] = [*error_tables(run.predictions, seed), Paragraph(few)]
        if any(not record["answers"] for record in run.predictions):
            tables.insert(0, decision_table(run.predictions))
        yield PageSection("Where it is wrong", tables)
        misses = worst(run.predictions, MISSES)
        if misses:
            missed = sum(not record["exact_match"] for record in run.predictions)
            about = (
                f"{missed:,} of {len(run.predictions):,} questions have no exact match. These"
                " share least with a right answer; of equal ones the model was surest of the"
                " first."
            )
            yield PageSection("Worst misses", [Paragraph(about), Misses(misses)])
    if run.elsewhere:
        yield PageSection("Other data", [Table("Scored elsewhere", _elsewhere(run.elsewhere))])
    if run.result is not None and "seconds" in run.result:
        rows = [
            {"phase": name.replace("_", " "), "seconds": seconds}
            for name, seconds in run.result["seconds"].items()
        ]
        yield PageSection("Time", [Table("Seconds by phase", rows)])
    if run.job_text:
        yield PageSection("Job", [Code("The job as it ran", "toml", run.job_text)])


def _scores(result: Mapping[str, Any], is_run: bool) -> Iterator[Block]:
    yield Headline(scores_of(result))
    level, resamples = result["bootstrap"]["level"], result["bootstrap"]["resamples"]
    yield Paragraph(
        f"Intervals: {100 * level:.0f} % bootstrap over questions, {resamples:,} resamples. They"
        " say how much other questions of this kind would move a score, not what another seed"
        " would."
    )
    # Folders of an earlier version have none.
    yield from (Paragraph(line) for line in result.get("caveats", ()))
    if "null_threshold" in result:
        yield from _thresholds(result, is_run)
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


def _thresholds(result: Mapping[str, Any], is_run: bool) -> Iterator[Block]:
    """The null threshold in use, beside the default one where it was tuned.

    Args:
        result: result.json.
        is_run: whether it is a run's, not that of an evaluation on other data: only a run has held
            its tuning questions apart from those it scores.
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
            if is_run
            else "No tuned threshold is in use."
        )
    else:
        rows.append(_threshold_row("tuned, in use", threshold["in_use"], result, ""))
        rows.append(_threshold_row("default", threshold["default"], result, "default_"))
        metric = NAMES[tuned["metric"]]
        apart = "; none of them is scored here" if is_run else ""
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


def _curves(run: RunRecord) -> Iterator[Block]:
    charts = [
        Chart(
            title=title,
            x_label="epoch",
            y_label=label,
            series=[
                Series(by_step[1], "grey", thinned(_points(run.steps, by_step[0]))),
                *(_series(run.epochs, curve) for curve in curves),
            ],
            top=top,
        )
        for title, label, by_step, curves, top in (
            ("Loss", "loss (nats)", LOSS_STEPS, LOSS_CURVES, None),
            ("Scores", "score (%)", SCORE_STEPS, SCORE_CURVES, 100.0),
        )
    ]
    yield Charts(charts, "curves.svg")
    if len(run.epochs) > 1:
        yield Paragraph(_best_epochs(run.epochs))


def _series(epochs: Rows, curve: Curve) -> Series:
    band = [] if curve.hatch is None else _band(epochs, curve.name.removesuffix("_percent"))
    return Series(curve.label, curve.style, _points(epochs, curve.name), band)


def _best_epochs(epochs: Rows) -> str:
    """After which epoch the loss was lowest and the scores were highest: often not the same."""
    lowest = min(epochs, key=lambda row: float(row["validation_loss_nats"]))["epoch"]
    f1, exact = (
        max(epochs, key=lambda row, key=key: float(row[key]))["epoch"]
        for key in ("f1_percent", "exact_match_percent")
    )
    scores = (
        f"F1 and exact match were highest after epoch {f1}"
        if f1 == exact
        else f"F1 was highest after epoch {f1}, exact match after epoch {exact}"
    )
    return f"Validation loss was lowest after epoch {lowest}; {scores}."


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(float(row["epoch"]), float(row[key])) for row in rows if row.get(key)]


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
    by_probe: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        by_probe.setdefault(row["probe"], []).append(row)
    for answers in by_probe.values():
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
        suffix = f" (expected: {expected})" if expected else ""
        yield Table(f"{answers[0]['question']}{suffix}", lines)


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
