"""Curves: drawn from the tables as they stand, the same for the same tables."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from runner.errors import StorageError
from runner.report.line_chart import DASHES
from runner.report.plots import GREY, LOSS_CURVES, SCORE_CURVES, STYLES, draw_curves
from runner.run.folder import RunDir
from runner.utils.tables import append_row

PNG = b"\x89PNG\r\n"


def fill(folder: Path, epochs: int, evaluated: int, *, intervals: bool = True) -> RunDir:
    """A run of 4 steps an epoch, the first epochs evaluated."""
    folder.mkdir(exist_ok=True)
    run = RunDir(folder)
    for step in range(1, 4 * epochs + 1):
        row = {"step": step, "epoch": step / 4, "loss_nats": 4 / step}
        append_row(run.train_table, row | {"span_accuracy_percent": step})
    for epoch in range(1, evaluated + 1):
        losses = {"train_loss_nats": 3 / epoch, "validation_loss_nats": 4 / epoch}
        scores = {f"{name}_percent": 10.0 * epoch for name in ("exact_match", "f1")}
        if intervals:
            scores |= {f"{name[:-8]}_low_percent": value - 5 for name, value in scores.items()} | {
                f"{name[:-8]}_high_percent": value + 5 for name, value in scores.items()
            }
        scores |= {"span_accuracy_percent": 9.0, "train_span_accuracy_percent": 8.0}
        append_row(run.eval_table, {"epoch": epoch, "step": 4 * epoch} | losses | scores)
    return run


def words(run: RunDir) -> list[str]:
    """The text of the picture; svg keeps it as text."""
    tree = ElementTree.fromstring(run.curves_svg.read_text(encoding="utf-8"))
    return [node.text or "" for node in tree.iter() if node.tag.endswith("}text")]


def test_the_curves_name_their_axes_with_units_over_epochs_and_steps(tmp_path):
    run = fill(tmp_path / "run", 3, 3)
    draw_curves(run, "a_job")
    assert run.curves_png.read_bytes().startswith(PNG)
    text = words(run)
    for label in ("a_job", "loss (nats)", "score (%)", "validation F1", "validation exact match"):
        assert label in text
    assert text.count("epoch") == text.count("optimiser step") == 2
    assert "training accuracy" in text
    assert "95 % interval" in text
    assert {"0", "1", "2", "3", "10"} <= set(text)  # 12 steps are 3 epochs
    assert not [*run.path.glob(".*")]


def test_the_curves_can_be_watched_while_the_run_goes_on(tmp_path):
    run = fill(tmp_path / "run", 0, 0)
    draw_curves(run, "a_job")
    assert not run.curves_svg.exists()
    for epochs, evaluated, steps in ((1, 0, "4"), (2, 2, "8"), (3, 2, "10")):
        run = fill(tmp_path / f"run{epochs}", epochs, evaluated)
        draw_curves(run, "a_job")
        assert words(run).count(steps) >= 2  # on both upper axes, as far as the run has come
        assert "validation" in words(run)


def test_the_same_tables_give_the_same_picture(tmp_path):
    one, two = (fill(tmp_path / name, 2, 2) for name in ("one", "two"))
    for run in (one, two):
        draw_curves(run, "a_job")
    assert one.curves_svg.read_bytes() == two.curves_svg.read_bytes()


def test_a_folder_that_takes_no_picture(tmp_path):
    run = fill(tmp_path / "run", 1, 1)
    run.curves_png.mkdir()
    with pytest.raises(StorageError, match=r"curves\.png"):
        draw_curves(run, "a_job")


def test_intervals_are_bands_and_of_one_epoch_a_bar(tmp_path):
    """An earlier version's table has none."""
    drawn = {}
    for evaluated, intervals in ((1, True), (3, True), (3, False)):
        run = fill(tmp_path / f"{evaluated}{intervals}", 3, evaluated, intervals=intervals)
        draw_curves(run, "a_job")
        text = run.curves_svg.read_text(encoding="utf-8")
        kinds = ("LineCollection", "FillBetweenPolyCollection")
        drawn[evaluated, intervals] = [text.count(f'id="{kind}_') for kind in kinds]
        assert ("95 % interval" in words(run)) is intervals
    assert drawn == {(1, True): [2, 0], (3, True): [0, 2], (3, False): [0, 0]}


@pytest.mark.parametrize("curves", [LOSS_CURVES, SCORE_CURVES])
def test_curves_differ_without_any_colour(curves):
    styles = [STYLES[curve.style] for curve in curves]
    assert len({marker for _, marker, _ in styles}) == len(curves)
    assert len({dash for _, _, dash in styles}) == len(curves)
    bands = [curve.hatch for curve in curves if curve.hatch]
    assert len(set(bands)) == len(bands)


@pytest.mark.parametrize("style", STYLES)
def test_pages_draw_the_same_dashes(style):
    """Solid, or lengths of dashes and gaps."""
    dash = STYLES[style][2]
    assert DASHES[style] == ("" if dash == "-" else " ".join(map(str, dash[1])))


@pytest.mark.parametrize("colour", [GREY, *(colour for colour, _, _ in STYLES.values())])
def test_every_curve_stands_out_from_white_paper(colour):
    """By WCAG's ratio for what is drawn, 3 to 1; a printer without colours keeps the luminance."""
    red, green, blue = linear(colour)
    assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 3


# Machado, Oliveira and Fernandes 2009, table 1, severity 1: what is seen of linear RGB.
BLIND = {
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


@pytest.mark.parametrize("kind", BLIND)
def test_colours_differ_for_the_colour_blind(kind):
    """In CIE Lab, where a distance of 2.3 is just seen."""
    for curves in (LOSS_CURVES, SCORE_CURVES):
        seen = [lab(BLIND[kind] @ linear(STYLES[curve.style][0])) for curve in curves]
        for one, other in itertools.combinations(seen, 2):
            assert np.linalg.norm(one - other) > 10


def linear(colour: str) -> np.ndarray:
    """Linear RGB of #rrggbb in sRGB."""
    part = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab, white D65, of linear RGB, as far as a screen shows it."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1)
    x, y, z = np.cbrt(xyz / (0.9505, 1.0, 1.089))  # the root's straight end is for near black
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_what_the_user_set_for_matplotlib_changes_nothing(tmp_path):
    """A notebook's cell names a backend that is not installed here, a matplotlibrc asks for
    LaTeX."""
    one, other = (fill(tmp_path / name, 2, 2) for name in ("one", "other"))
    draw_curves(one, "a_job")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 9\n")
    script = (
        "import sys; from runner.report.plots import draw_curves; from runner.run.folder import"
        " RunDir; draw_curves(RunDir(sys.argv[1]), 'a_job')"
    )
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.nowhere",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    command = [sys.executable, "-c", script, str(other.path)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert other.curves_svg.read_bytes() == one.curves_svg.read_bytes()
