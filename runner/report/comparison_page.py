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
TESTS_TITLE = "Is the gap noise?"
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
    tests = [paired_tests(pair, SEED) for pair in pairs]
    scores = Table("Scores on the questions that all share", _score_rows(runs, names))
    sections = [
        PageSection("Side by side", [scores]),
        PageSection(TESTS_TITLE, list(_test_blocks(names, pairs, tests))),
    ]
    differing = _differing_settings(runs, names)
    if differing:
        sections.append(PageSection("What differs", [Table("Keys of the job files", differing)]))
    curves = _curves(runs, names)
    if curves is not None:
        sections.append(PageSection("Training", [curves]))
    for name, other, test in zip(names[1:], others, tests, strict=True):
        sections += _flips(base, names[0], other, name, test)
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
    job_names = [run.name for run in runs]
    names = [
        name if job_names.count(name) == 1 else f"{name} {run.path.name}"
        for name, run in zip(job_names, runs, strict=True)
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


def _common_records(runs: Sequence[RunRecord]) -> list[list[Mapping[str, Any]]]:
    """Each run's predictions for the questions that all runs have, in the first one's order."""
    tables = [{record["id"]: record for record in run.predictions} for run in runs]
    ids = [id for id in tables[0] if all(id in table for table in tables)]
    if not ids:
        raise DataError("no question was scored by all of these runs")
    return [[table[id] for id in ids] for table in tables]


def _score_rows(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for name, run, records in zip(names, runs, _common_records(runs), strict=True):
        seconds = run.result["seconds"] if run.result and "seconds" in run.result else None
        rows.append(
            {
                "run": name,
                "questions": len(records),
                "exact match %": percent(_percentages(records, "exact_match"), SEED),
                "F1 %": percent(_percentages(records, "f1"), SEED),
                "seconds": None if seconds is None else float(seconds["total"]),
            }
        )
    return rows


def _test_blocks(
    names: Sequence[str], pairs: Sequence[Pairs], tests: Sequence[PairedTest]
) -> Iterator[Paragraph | Table]:
    p_exact = holm_adjusted([test.exact_match.p for test in tests])
    p_f1 = holm_adjusted([test.f1.p for test in tests])
    rows: list[dict[str, Cell]] = []
    for name, pair, test, exact, f1 in zip(names[1:], pairs, tests, p_exact, p_f1, strict=True):
        yield Paragraph(describe_gap(name, names[0], test.f1, "F1", f1))
        yield Paragraph(describe_gap(name, names[0], test.exact_match, "exact match", exact))
        for metric, gap, p in (("exact match", test.exact_match, exact), ("F1", test.f1, f1)):
            rows.append(
                {
                    "run": name,
                    "score": metric,
                    "points": f"{gap.points:+.2f}",
                    "95 % interval": f"{gap.low:+.2f} to {gap.high:+.2f}",
                    "p": spell_p(p).removeprefix("= "),
                    "gained": len(test.gained),
                    "lost": len(test.lost),
                    "questions": len(pair.ids),
                }
            )
    yield Table(f"Against {names[0]}", rows)
    holm = " p is adjusted for the number of comparisons (Holm)." if len(tests) > 1 else ""
    yield Paragraph(ABOUT + holm)


def _differing_settings(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Cell]]:
    if any(run.job is None for run in runs):
        return []
    tables = [dict(_leaves(run.job or {}, "")) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows: list[dict[str, Cell]] = []
    for key in keys:
        values = [table.get(key, "-") for table in tables]
        if len(set(values)) > 1:
            rows.append({"key": key, **dict(zip(names, values, strict=True))})
    return rows


def _leaves(table: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if above == "data." and isinstance(value, list):  # several sets, counted from 1
            yield from _leaves({str(n): one for n, one in enumerate(value, 1)}, f"{above}{key}.")
        elif isinstance(value, Mapping):
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
    base: RunRecord, base_name: str, other: RunRecord, name: str, test: PairedTest
) -> Iterator[PageSection]:
    of_base = {record["id"]: record for record in base.predictions}
    of_other = {record["id"]: record for record in other.predictions}
    for title, ids, missed in (
        (f"Only {base_name} answers exactly", test.lost, of_other),
        (f"Only {name} answers exactly", test.gained, of_base),
    ):
        if not ids:
            continue
        furthest = sorted(ids, key=lambda id: (missed[id]["f1"], id))[:FLIPPED]
        misses = [
            miss(missed[id], {base_name: of_base[id]["answer"], name: of_other[id]["answer"]})
            for id in furthest
        ]
        count = f"{len(ids)} question{'' if len(ids) == 1 else 's'}"
        first = f"; the {len(misses)} furthest off" if len(misses) < len(ids) else ""
        yield PageSection(title, [Paragraph(f"{count}{first}."), Misses(misses)])


def _percentages(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [100.0 * record[key] for record in records]
