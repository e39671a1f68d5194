"""The measuring scripts run: tiny inputs, one round, and a table with every row."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from runner.job.schema import Model
from runner.model.load import ModelFiles, load_pretrained
from tests.forked import forked

BENCH = Path(__file__).parent
DATA = BENCH.parents[1] / "jobs" / "data" / "product_qa_validation.json"
# What a script measures is of no matter here, and its collections of garbage take most of its time.
UNCOLLECTED = "import gc; gc.collect = lambda: 0"


def tables(lines: list[str], machine: str = "cores") -> list[dict[str, str]]:
    """Rows of the tables that a script prints; `machine` is a word of what it says of where."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or set(line) <= set("|-: "):
            header = header if line.startswith("|") else []
        elif header:
            rows.append(dict(zip(header, cells, strict=True)))
        else:
            header = cells
    text = "\n".join(lines)
    assert machine in text
    assert str(Path.home()) not in text
    return rows


def run(script: str, *options: object) -> list[str]:
    """What a script prints that starts processes by itself."""
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_readme_lists_every_file():
    text = (BENCH / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    listed = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert {path.name for path in BENCH.iterdir() if path.is_file()} - {"README.md"} == listed


HOW = ("padded", "packed")


def test_features_and_batches(zygote, tiny):
    small = ("--data", DATA, "--model", tiny("bert"), "--sample", 40, "--rounds", 1)
    rows = tables(forked(zygote, BENCH / "features.py", *small, code=UNCOLLECTED))
    assert [row["features"] for row in rows if "features" in row] == [
        "recipe, map",
        "ours, cold",
        "ours, warm",
        "recipe, its cache",
    ]
    batches = [row["batches"] for row in rows if "batches" in row]
    assert batches[:4] == [
        "recipe: rows, default collator",
        "ours, padded",
        "ours, packed",
        "ours, collate alone",
    ]
    assert batches[5:] == [f"ours, {how}, {n} in a row" for n in (1, 32) for how in HOW]


@pytest.mark.slow
def test_growth(tiny):
    inputs = ("--data", DATA, "--model", tiny("bert"), "--parts", "features", "evaluation")
    (row,) = tables(run("growth.py", *inputs, "--sizes", 300))
    assert row["questions"] == "300"
    assert float(row["features, us a question"]) > 0
    assert float(row["evaluation, us a question"]) > 0


def test_span_search(zygote):
    small = ("--windows", 6, "--length", 48, "--rounds", 1, "--recipe", 2)
    lines = forked(zygote, BENCH / "span_search.py", *small, code=UNCOLLECTED)
    rows = tables(lines, machine="1 thread")
    assert [row["logits"] for row in rows] == ["random"] * 10 + ["peaked"] * 10
    assert len({row["method"] for row in rows}) == 10
    assert all(float(row["seconds"]) >= 0 for row in rows)


@pytest.mark.slow
def test_rounding(tiny):
    small = ("--model", tiny("bert"), "--data", DATA, "--windows", 8, "--max-length", 64)
    rows = tables(run("rounding.py", *small))
    assert len(rows) == 4
    assert all(0 < float(row["median"]) < 10 for row in rows)


@pytest.mark.slow
def test_search_memory():
    rows = tables(run("search_memory.py", "--windows", 8, "--length", 48), machine="1 thread")
    assert [row["windows"] for row in rows] == ["8"] * 3
    assert len({row[""] for row in rows}) == 3
    assert all(float(row["CPU seconds"]) >= 0 for row in rows)


@pytest.mark.slow
def test_step_memory(tiny):
    rows = tables(run("step_memory.py", "--model", tiny("bert"), "--lengths", 64, "--steps", 1))
    assert [row["activations"] for row in rows] == ["all kept", "gradient checkpointing"]
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_both_sides_train_in_float32_whatever_the_file_holds(tiny, tmp_path):
    """Weights travel as float16; the bf16 of both sides is a copy of float32 weights."""
    half = tmp_path / "half"
    theirs = runpy.run_path(str(BENCH / "peer_trainer.py"))["load_model"]
    model = theirs(tiny("bert"))
    model.half().save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(half)
    assert {t.dtype for t in load_file(half / "model.safetensors").values()} == {torch.float16}
    section = Model(name=str(half))
    for loaded in (theirs(half), load_pretrained(ModelFiles.locate(section), 1)):
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_covered_time_counts_what_lies_above_each_other_once():
    spans = [(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0), (5.5, 5.5)]
    assert runpy.run_path(str(BENCH / "training.py"))["covered"](spans) == 4.0


@pytest.mark.slow
def test_training(zygote):
    small = ("--shape", "tiny", "--windows", 8, "--batch-size", 4, "--max-length", 64)
    once = ("--steps", 1, "--warmup", 1, "--rounds", 1)
    lines = forked(zygote, BENCH / "training.py", *small, *once, code=UNCOLLECTED)
    rows = tables(lines)
    modes = [row["mode"] for row in rows]
    assert len(modes) == 3 + 4 + 4 + 3
    for name in ("ms a step", "device busy, %", "host ms"):
        assert all(float(row[name]) > 0 for row in rows)
