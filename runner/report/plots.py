"""Draws a run's curves from its tables as they stand: loss and scores against epoch and step, in
SVG and PNG, while the run goes on and after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from runner.run.folder import RunDir
from runner.utils.files import Fence, storage_errors
from runner.utils.tables import read_rows

# Okabe and Ito's colours differ for every kind of colour blindness; markers and dashes differ in
# black and white.
GREY = "#8A8A8A"
# (colour, marker, dash); pages draw the same marks and dashes (line_chart).
STYLES: dict[str, tuple[str, str, Any]] = {
    "blue": ("#0072B2", "o", "-"),
    "orange": ("#D55E00", "s", (0, (7, 4))),
    "green": ("#009E73", "^", (0, (2, 4))),
    "purple": ("#CC79A7", "D", (0, (9, 3, 2, 3))),
}
PLOT_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.markersize": 4,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 3.2,  # shows the dash on both sides of the marker
    "legend.columnspacing": 1.4,
    "hatch.linewidth": 0.4,
    "svg.hashsalt": "spantune",  # the same tables give the same file
    "svg.fonttype": "none",
}


class Curve(NamedTuple):
    """A column of eval.csv and how it is drawn, in the picture and on the page.

    Attributes:
        name: of the column.
        label: in the legend.
        style: of its line and band.
        hatch: of the band of its interval in the picture; None where it has no interval.
    """

    name: str
    label: str
    style: str
    hatch: str | None = None


# Of each table, the line by step and the lines by epoch.
LOSS_STEPS = ("loss_nats", "training, by step")
LOSS_CURVES = (
    Curve("train_loss_nats", "training, epoch mean", "blue"),
    Curve("validation_loss_nats", "validation", "orange"),
)
SCORE_STEPS = ("span_accuracy_percent", "accuracy, by step")
SCORE_CURVES = (
    Curve("f1_percent", "validation F1", "blue", "////"),
    Curve("exact_match_percent", "validation exact match", "orange", "\\\\\\\\"),
    Curve("span_accuracy_percent", "validation accuracy", "green"),
    Curve("train_span_accuracy_percent", "training accuracy", "purple"),
)
Rows = Sequence[Mapping[str, str]]


def draw_curves(run: RunDir, title: str, fence: Fence = lambda: None) -> None:
    """Draw `curves.svg` and `curves.png` from train.csv and eval.csv; nothing while both are empty.
    `fence`, asked before they get their names, raises if the folder is no longer ours.

    Raises:
        StorageError: if the pictures cannot be written.
    """
    # Read when matplotlib is imported: that of a notebook's cell may not be installed here.
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    steps, evals = read_rows(run.train_table), read_rows(run.eval_table)
    if not steps:
        return
    epochs = _column(evals, "epoch")
    # After a reset: a matplotlibrc of the user's could ask for LaTeX.
    with plt.style.context(PLOT_STYLE, after_reset=True):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.4), layout="constrained")
        places = _column(steps, "epoch")
        drawn = ((left, LOSS_STEPS, LOSS_CURVES), (right, SCORE_STEPS, SCORE_CURVES))
        for axes, (column, label), curves in drawn:
            by_step = _column(steps, column)
            axes.plot(places, by_step, color=GREY, lw=0.8, zorder=0.5, label=label)
            for curve in curves:
                _draw_curve(axes, epochs, evals, curve)
        left.set(ylabel="loss (nats)", ylim=(0, None))
        right.set(ylabel="score (%)", ylim=(0, 100))
        end = places[-1]
        per_epoch = int(steps[-1]["step"]) / end
        for axes in (left, right):
            axes.set(xlabel="epoch", xlim=(0, end * 1.04))
            axes.xaxis.get_major_locator().set_params(integer=end > 1)
            handles, _ = axes.get_legend_handles_labels()
            if axes.collections:
                band = Patch(facecolor=(GREY, 0.2), edgecolor=GREY, lw=0.6, label="95 % interval")
                handles.append(band)
            # Below the axes it hides no curve, wherever that runs.
            axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
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
                fence()
                aside.replace(path)
        plt.close(figure)


def _draw_curve(axes: Any, epochs: Sequence[float], evals: Rows, curve: Curve) -> None:
    """Draw a column of eval.csv and, where it has one, its interval: a band from epoch to epoch, a
    bar where there is one epoch."""
    colour, marker, dash = STYLES[curve.style]
    values = _column(evals, curve.name)
    axes.plot(epochs, values, linestyle=dash, marker=marker, color=colour, label=curve.label)
    ends = [curve.name.replace("_percent", f"_{end}_percent") for end in ("low", "high")]
    # A table of an earlier version has no intervals.
    if curve.hatch is None or not evals or any(end not in evals[0] for end in ends):
        return
    low, high = (_column(evals, end) for end in ends)
    if len(epochs) == 1:
        middle = values[0]
        reach = [[middle - low[0]], [high[0] - middle]]
        axes.errorbar(epochs, [middle], yerr=reach, fmt="none", ecolor=colour, capsize=4)
        return
    axes.fill_between(
        epochs,
        low,
        high,
        facecolor=(colour, 0.13),
        edgecolor=(colour, 0.5),
        hatch=curve.hatch,
        linewidth=0.6,
        linestyle=dash,
    )


def _column(rows: Rows, key: str) -> list[float]:
    return [float(row[key]) if row[key] else float("nan") for row in rows]
