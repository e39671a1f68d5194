"""Makes the page that puts several runs side by side: scores, what differs between their jobs, and
whether each gap is more than noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.errors import DataError
from runner.job.sources import public_name
from runner.metrics.statistics import (
    PairedTest,
    Pairs,
    describe_gap,
    holm_adjusted,
    paired,
    paired_tests,
    spell_p,
)
from runner.report.error_analysis import miss, percent
from runner.report.page import (
    Cell,
    Chart,
    Charts,
    Miss,
    Misses,
    Page,
    PageSection,
    Paragraph,
    Series,
    Table,
)
from runner.report.read import RunRecord
from runner.report.run_page import SEED, scored_on

FLIPPED = 8  # questions shown of each kind
STYLES = ("blue", "orange", "green")
NOISE = "Is the gap noise?"
ABOUT = (
    "Tests are paired by question: for exact match McNemar's exact test on the questions that"
    " flipped, for F1 a permutation of signs; intervals are 95 % paired bootstrap. They ask whether"
    " other questions of this kind could turn the gap round. Whether another seed could, only runs"
    " with other seeds can tell."
)


def comparison_page(runs: Sequence[RunRecord]) -> Page:
    """Compare runs, or evaluations, with the first of them.

    Args:
        runs: at least two, each with a prediction for each question.

    Raises:
        DataError: if one has no predictions, or they were scored on different questions.
    """
    names = short_names(runs)
    for run in runs:
        if not run.predictions:
            raise DataError(f"{run.path}: has no predictions.jsonl to compare")
    base, *others = runs
    pairs = [_paired(base, other) for other in others]
    verdicts = [paired_tests(pair, SEED) for pair in pairs]
    sections = [
        PageSection(
            "Side by side", [Table("Scores on the questions that all share", _side(runs, names))]
        ),
        PageSection(NOISE, list(_verdicts(names, pairs, verdicts))),
    ]
    differing = _settings(runs, names)
    if differing:
        sections.append(PageSection("What differs", [Table("Keys of the job files", differing)]))
    curves = _curves(runs, names)
    if curves is not None:
        sections.append(PageSection("Training", [curves]))
    for name, other, verdict in zip(names[1:], others, verdicts, strict=True):
        sections += _flips(base, names[0], other, name, verdict)
    return Page(
        title=" against ".join(names) if len(names) == 2 else "Comparison of runs",
        lead=f"Scored on {scored_on(base)}; each run is compared with {names[0]}.",
        facts={
            name: f"{run.path.parent.name}/{run.path.name}"
            for name, run in zip(names, runs, strict=True)
        },
        sections=sections,
    )


def short_names(runs: Sequence[RunRecord]) -> list[str]:
    """Names that tell the runs apart: the job's, with the folder's where jobs are alike."""
    plain = [run.name for run in runs]
    names = [
        name if plain.count(name) == 1 else f"{name} {run.path.name}"
        for name, run in zip(plain, runs, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({place})"
        for place, name in enumerate(names, 1)
    ]


def _paired(base: RunRecord, other: RunRecord) -> Pairs:
    try:
        return paired(base.predictions, other.predictions)
    except DataError as error:
        raise DataError(f"{base.path} and {other.path}: {error}") from None


def _shared(runs: Sequence[RunRecord]) -> list[list[Mapping[str, Any]]]:
    """Each run's records of the questions that all runs have, in the first one's order."""
    tables = [{record["id"]: record for record in run.predictions} for run in runs]
    ids = [id for id in tables[0] if all(id in table for table in tables)]
    if not ids:
        raise DataError("no question was scored by all of these runs")
    return [[table[id] for id in ids] for table in tables]


def _side(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Cell]]:
    rows = []
    for name, run, records in zip(names, runs, _shared(runs), strict=True):
        exact = percent(_column(records, "exact_match"), SEED)
        row: dict[str, Cell] = {
            "run": name,
            "questions": len(records),
            "exact match %": exact,
            "F1 %": percent(_column(records, "f1"), SEED),
        }
        timed = run.result is not None and "seconds" in run.result
        row["seconds"] = float(run.result["seconds"]["total"]) if timed and run.result else None
        rows.append(row)
    return rows


def _verdicts(
    names: Sequence[str], pairs: Sequence[Pairs], verdicts: Sequence[PairedTest]
) -> Iterator[Paragraph | Table]:
    p_exact = holm_adjusted([verdict.exact_match.p for verdict in verdicts])
    p_f1 = holm_adjusted([verdict.f1.p for verdict in verdicts])
    rows: list[dict[str, Cell]] = []
    for name, pair, verdict, exact, f1 in zip(
        names[1:], pairs, verdicts, p_exact, p_f1, strict=True
    ):
        yield Paragraph(describe_gap(name, names[0], verdict.f1, "F1", f1))
        yield Paragraph(describe_gap(name, names[0], verdict.exact_match, "exact match", exact))
        for metric, gap, p in (("exact match", verdict.exact_match, exact), ("F1", verdict.f1, f1)):
            rows.append(
                {
                    "run": name,
                    "score": metric,
                    "points": f"{gap.points:+.2f}",
                    "95 % interval": f"{gap.low:+.2f} to {gap.high:+.2f}",
                    "p": spell_p(p).removeprefix("= "),
                    "gained": len(verdict.gained),
                    "lost": len(verdict.lost),
                    "questions": len(pair.ids),
                }
            )
    yield Table(f"Against {names[0]}", rows)
    holm = " p is adjusted for the number of comparisons (Holm)." if len(verdicts) > 1 else ""
    yield Paragraph(ABOUT + holm)


def _settings(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Cell]]:
    if any(run.job is None for run in runs):
        return []
    tables = [dict(_leaves(run.job or {}, "")) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows: list[dict[str, Cell]] = []
    for key in keys:
        spelled = [table.get(key, "-") for table in tables]
        if len(set(spelled)) > 1:
            rows.append({"key": key, **dict(zip(names, spelled, strict=True))})
    return rows


def _leaves(table: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", public_name(str(value))


def _curves(runs: Sequence[RunRecord], names: Sequence[str]) -> Charts | None:
    shown = [(n, r) for n, r in zip(names, runs, strict=True) if r.epochs][: len(STYLES)]
    if len(shown) < 2:
        return None
    charts = [
        Chart(
            title=title,
            x_label="epoch",
            y_label=label,
            series=[
                Series(name, style, [(float(e["epoch"]), float(e[key])) for e in run.epochs])
                for (name, run), style in zip(shown, STYLES, strict=False)
            ],
            top=top,
        )
        for title, label, key, top in (
            ("Validation loss", "loss (nats)", "validation_loss_nats", None),
            ("Validation F1", "F1 (%)", "f1_percent", 100.0),
        )
    ]
    return Charts(charts, None)


def _flips(
    base: RunRecord, base_name: str, other: RunRecord, name: str, verdict: PairedTest
) -> Iterator[PageSection]:
    mine = {record["id"]: record for record in base.predictions}
    theirs = {record["id"]: record for record in other.predictions}
    for title, ids, shown in (
        (f"Only {base_name} answers exactly", verdict.lost, theirs),
        (f"Only {name} answers exactly", verdict.gained, mine),
    ):
        if not ids:
            continue
        worst = sorted(ids, key=lambda id: (shown[id]["f1"], id))[:FLIPPED]
        misses: list[Miss] = [
            miss(shown[id], {base_name: mine[id]["answer"], name: theirs[id]["answer"]})
            for id in worst
        ]
        count = f"{len(ids)} question{'' if len(ids) == 1 else 's'}"
        first = f"; the {len(misses)} furthest off" if len(misses) < len(ids) else ""
        yield PageSection(title, [Paragraph(f"{count}{first}."), Misses(misses)])


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Any:
    return [100.0 * record[key] for record in records]
