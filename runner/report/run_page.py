"""Makes the page of one run, or of an evaluation: scores, curves, epochs, where it is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.job.sources import describe_sample, parse_share, public_name
from runner.report.error_analysis import FEWEST, decision_table, error_tables, worst
from runner.report.page import (
    Block,
    Cell,
    Code,
    Headline,
    Misses,
    Page,
    PageSection,
    Paragraph,
    PercentCell,
    Table,
)
from runner.report.read import Rows, RunRecord, declared
from runner.report.training_section import epoch_rows, named_sets, training
from runner.utils.text import duration

MISSES = 15
SEED = 0  # of the bootstrap where a run names none

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
    if run.job is None:
        return public_name(run.source)
    shown = _declared(run.job, "validation")[0]
    return shown if parse_share(run.source) is None else f"{shown} of {_trained_on(run.job)}"


def _declared(job: Mapping[str, Any], key: str) -> list[str]:
    return [
        f"{public_name(name)}{describe_sample(sample if isinstance(sample, int) else None)}"
        for name, sample in declared(job["data"], key)
    ]


def _trained_on(job: Mapping[str, Any]) -> str:
    return " + ".join(_declared(job, "train"))


def _lead(run: RunRecord) -> str:
    if run.job is None:
        model = "" if run.result is None else run.result["model"]["name"]
        return f"{public_name(model)}, scored on {scored_on(run)}."
    trained = f"{public_name(run.job['model']['name'])}, fine-tuned on {_trained_on(run.job)}"
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
        if run.sets:
            yield PageSection("Validation sets", [Table("Scores by set", _by_set(run))])
    if run.epochs:
        yield PageSection("Training", list(training(run)))
    if run.probes:
        yield PageSection("Probes", list(_probes(run.probes)))
    yield from _mistakes(run, "")
    for one in run.sets:
        if one.result is not None:
            epochs = [Table("Epochs", epoch_rows(one.epochs))] if one.epochs else []
            yield PageSection(f"Set {one.name}", [*_scores(one.result, True), *epochs])
        yield from _mistakes(one, f" in {one.name}")
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


def _mistakes(run: RunRecord, where: str) -> Iterator[PageSection]:
    """Where the model is wrong on a set, if its answers are there; `where` ends the headings."""
    if not run.predictions:
        return
    seed = SEED if run.result is None else int(run.result["bootstrap"]["seed"])
    few = f"Groups of fewer than {FEWEST} questions, or all right or all wrong, have no interval."
    tables: list[Block] = [*error_tables(run.predictions, seed), Paragraph(few)]
    if any(not record["answers"] for record in run.predictions):
        tables.insert(0, decision_table(run.predictions))
    yield PageSection(f"Where it is wrong{where}", tables)
    misses = worst(run.predictions, MISSES)
    if misses:
        missed = sum(not record["exact_match"] for record in run.predictions)
        about = (
            f"{missed:,} of {len(run.predictions):,} questions have no exact match. These share"
            " least with a right answer; of equal ones the model was surest of the first."
        )
        yield PageSection(f"Worst misses{where}", [Paragraph(about), Misses(misses)])


def _by_set(run: RunRecord) -> list[dict[str, Cell]]:
    """The first validation set and the further ones, a row each."""
    return [
        {
            "set": name,
            "data": scored_on(one),
            "questions": one.result["questions"],
            "exact match %": percent_of(one.result, "exact_match"),
            "F1 %": percent_of(one.result, "f1"),
            "loss": one.result["metrics"]["loss"],
        }
        for name, one in named_sets(run)
        if one.result is not None
    ]


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
