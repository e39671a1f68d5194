"""Curves: drawn from the tables as they stand, the same for the same tables."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from runner.errors import StorageError
from runner.plots import draw_curves
from runner.rundir import RunDir
from runner.tables import append_row

PNG = b"\x89PNG\r\n"


def fill(folder: Path, epochs: int, evaluated: int) -> RunDir:
    """A run of 4 steps an epoch, the first epochs evaluated."""
    folder.mkdir(exist_ok=True)
    run = RunDir(folder)
    for step in range(1, 4 * epochs + 1):
        row = {"step": step, "epoch": step / 4, "loss_nats": 4 / step}
        append_row(run.train_table, row | {"span_accuracy_percent": step})
    for epoch in range(1, evaluated + 1):
        losses = {"train_loss_nats": 3 / epoch, "validation_loss_nats": 4 / epoch}
        scores = {f"{name}_percent": 10.0 * epoch for name in ("exact_match", "f1")}
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
    for label in ("a_job", "loss (nats)", "score on validation data (%)", "F1", "exact match"):
        assert label in text
    assert text.count("epoch") == text.count("optimiser step") == 2
    assert "span accuracy on training data" in text
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
