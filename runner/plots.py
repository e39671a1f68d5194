"""Draws a run's curves from its tables: loss and scores against epochs, in SVG and PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from runner.rundir import RunDir, storage_errors
from runner.tables import read_rows

# Okabe and Ito's colours differ for every kind of colour blindness; markers and dashes differ in
# black and white.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
Rows = Sequence[Mapping[str, str]]


def draw_curves(run: RunDir, title: str) -> None:
    """Draw `curves.svg` and `curves.png` from train.csv and eval.csv as they stand now.

    Raises:
        StorageError: if the pictures cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, evals = read_rows(run.train_table), read_rows(run.eval_table)
    if not evals:
        return
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.hashsalt": "spantune",  # the same tables give the same file
        "svg.fonttype": "none",
    }
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
        epochs = _column(evals, "epoch")
        left.plot(
            _column(steps, "epoch"),
            _column(steps, "loss_nats"),
            color=GREY,
            lw=0.8,
            label="training, per step",
        )
        left.plot(
            epochs,
            _column(evals, "train_loss_nats"),
            "o--",
            color=BLUE,
            ms=4,
            label="training, epoch mean",
        )
        left.plot(
            epochs,
            _column(evals, "validation_loss_nats"),
            "s-",
            color=ORANGE,
            ms=4,
            label="validation",
        )
        left.set(xlabel="epoch", ylabel="loss (nats)", ylim=(0, None))
        for key, name, mark, colour in (
            ("f1_percent", "F1", "o-", BLUE),
            ("exact_match_percent", "exact match", "s--", ORANGE),
            ("span_accuracy_percent", "span accuracy (tokens)", "^:", GREEN),
        ):
            right.plot(epochs, _column(evals, key), mark, color=colour, ms=4, label=name)
        right.set(xlabel="epoch", ylabel="validation score (%)", ylim=(0, 100))
        for axes in (left, right):
            axes.legend(frameon=False, fontsize=8)
            axes.set_xlim(0, max(epochs) * 1.05)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(title, fontsize=10)
        with storage_errors(run.curves_png):
            for path, metadata in ((run.curves_svg, {"Date": None}), (run.curves_png, {})):
                aside = path.with_name(f".{os.getpid()}.{path.name}")
                figure.savefig(aside, dpi=150, metadata=metadata)
                aside.replace(path)
        plt.close(figure)


def _column(rows: Rows, key: str) -> list[float]:
    return [float(row[key]) if row[key] else float("nan") for row in rows]
