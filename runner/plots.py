"""Draws a run's curves from its tables as they stand: loss and scores against epoch and step, in
SVG and PNG, while the run goes on and after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from runner.rundir import RunDir, storage_errors
from runner.tables import read_rows

# Okabe and Ito's colours differ for every kind of colour blindness; markers and dashes differ in
# black and white.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A8A8A"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.markersize": 4,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "spantune",  # the same tables give the same file
    "svg.fonttype": "none",
}
# Column of eval.csv, label, line, colour.
LOSSES = (
    ("train_loss_nats", "training, mean of the epoch", "o--", BLUE),
    ("validation_loss_nats", "validation", "s-", ORANGE),
)
SCORES = (
    ("f1_percent", "F1", "o-", BLUE),
    ("exact_match_percent", "exact match", "s--", ORANGE),
    ("span_accuracy_percent", "span accuracy", "^-.", GREEN),
    ("train_span_accuracy_percent", "span accuracy on training data", "D:", PURPLE),
)
Rows = Sequence[Mapping[str, str]]


def draw_curves(run: RunDir, title: str) -> None:
    """Draw `curves.svg` and `curves.png` from train.csv and eval.csv; nothing while both are empty.

    Raises:
        StorageError: if the pictures cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, evals = read_rows(run.train_table), read_rows(run.eval_table)
    if not steps:
        return
    epochs = _column(evals, "epoch")
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.7), layout="constrained")
        places = _column(steps, "epoch")
        left.plot(
            places, _column(steps, "loss_nats"), color=GREY, lw=0.8, label="training, by step"
        )
        right.plot(places, _column(steps, "span_accuracy_percent"), color=PURPLE, lw=0.8, alpha=0.4)
        for axes, lines in ((left, LOSSES), (right, SCORES)):
            for key, label, line, colour in lines:
                axes.plot(epochs, _column(evals, key), line, color=colour, label=label)
        left.set(ylabel="loss (nats)", ylim=(0, None))
        right.set(ylabel="score on validation data (%)", ylim=(0, 100))
        end = places[-1]
        per_epoch = int(steps[-1]["step"]) / end
        for axes in (left, right):
            axes.set(xlabel="epoch", xlim=(0, end * 1.04))
            axes.xaxis.get_major_locator().set_params(integer=end > 1)
            axes.legend()
            above = axes.secondary_xaxis(
                "top", functions=(lambda x: x * per_epoch, lambda x: x / per_epoch)
            )
            above.set_xlabel("optimiser step")
            above.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        figure.suptitle(title, fontsize=10)
        with storage_errors(run.curves_png):
            for path, metadata in ((run.curves_svg, {"Date": None}), (run.curves_png, {})):
                aside = path.with_name(f".{os.getpid()}.{path.name}")
                figure.savefig(aside, dpi=150, metadata=metadata)
                aside.replace(path)
        plt.close(figure)


def _column(rows: Rows, key: str) -> list[float]:
    return [float(row[key]) if row[key] else float("nan") for row in rows]
