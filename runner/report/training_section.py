"""What a run's page tells of its training: curves over steps and epochs, and a row each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from runner.report.page import Block, Cell, Chart, Charts, Paragraph, PercentCell, Series, Table
from runner.report.plots import (
    LOSS_CURVES,
    LOSS_STEPS,
    SCORE_CURVES,
    SCORE_STEPS,
    STYLES,
    Curve,
)
from runner.report.read import Rows, RunRecord

POINTS = 300  # of the loss per step

_ACCURACY = "Accuracy: windows whose start and end are both right."


def training(run: RunRecord) -> Iterator[Block]:
    """Curves, with several validation sets those of each too, and the table of epochs."""
    yield from _curves(run)
    yield from _curves_by_set(run)
    yield Table("Epochs", epoch_rows(run.epochs))
    yield Paragraph(_ACCURACY)


def named_sets(run: RunRecord) -> list[tuple[str, RunRecord]]:
    """All validation sets of a run, the first one first."""
    return [(run.first_set, run), *((one.name, one) for one in run.sets)]


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


def epoch_rows(rows: Rows) -> list[dict[str, Cell]]:
    """Rows of an eval.csv for a page."""
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


def _curves_by_set(run: RunRecord) -> Iterator[Charts]:
    """Loss and F1 of several validation sets, as many as there are styles."""
    shown = list(zip(named_sets(run), STYLES, strict=False))
    if run.sets:
        charts = [
            Chart(
                title=title,
                x_label="epoch",
                y_label=label,
                series=[
                    Series(name, style, _points(one.epochs, key), _band(one.epochs, interval))
                    for (name, one), style in shown
                ],
                top=top,
            )
            for title, label, key, interval, top in (
                ("Validation loss by set", "loss (nats)", "validation_loss_nats", "", None),
                ("Validation F1 by set", "F1 (%)", "f1_percent", "f1", 100.0),
            )
        ]
        yield Charts(charts, None)
