"""Run folders made by hand, for tests of reports: small, the same each time, hostile on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner.run.folder import RunDir
from runner.utils.tables import append_row, read_rows

HOSTILE = (
    "<script>alert(1)</script> & \"quotes\" 'single' ]]> <!-- | `code` * _x_ [l](javascript:0) "
    "\u202egnp.exe \x07 \x1b[31m é 😀 \ud800 مرحبا"
)
JOB = """\
name = "{name}"
seed = 1

[data]
train = "/somewhere/train.json[:900]"
validation = "/somewhere/dev.json"
unanswerable = {unanswerable}

[model]
name = "google-bert/bert-base-uncased"

[train]
epochs = 2
batch_size = 16
learning_rate = {rate}
"""
CONTEXT = "The lantern folds flat. Its battery lasts nine hours on the bright setting."


def record(number: int, answer: str, right: list[str], **changes: Any) -> dict[str, Any]:
    """A line of predictions.jsonl about CONTEXT."""
    start = max(0, CONTEXT.find(answer)) if answer else 0
    exact = answer == right[0] if right else not answer
    overlap = set(answer.split()) & set(right[0].split()) if right else set()
    f1 = 1.0 if exact else 0.5 if overlap else 0.0
    words = ("What lasts?", "Who folds?", "How long?", "How many hours?", "Is it flat?")
    row = {
        "id": f"q{number:03}",
        "question": words[number % len(words)],
        "answer": answer,
        "score": round(0.9 - 0.01 * number, 6),
        "start": start,
        "end": start + len(answer),
        "answers": right,
        "answer_starts": [CONTEXT.find(text) for text in right],
        "exact_match": exact,
        "f1": f1,
        "window": 0,
        "windows": 1 + (number % 7 == 0),
        "context_tokens": 60 + 40 * (number % 6),
        "context_characters": len(CONTEXT),
        "n_best": [],
    }
    if not exact:
        row["excerpts"] = [{"start": 0, "text": CONTEXT}]
    return row | changes


def predictions(count: int = 40, better: int = 0, unanswerable: bool = False) -> list[dict]:
    """Records of which every third is wrong, but for the first `better` of those."""
    rows, spared = [], 0
    for number in range(count):
        right = [] if unanswerable and number % 4 == 1 else ["nine hours"]
        good = right[0] if right else ""
        answer = good
        if number % 3 == 0:
            spared += 1
            wrong = "hours on the" if number % 2 else "The lantern"
            answer = good if spared <= better else wrong
        row = record(number, answer, right)
        if unanswerable:
            row["null_difference"] = 0.25 * (number % 5) - 0.5
        rows.append(row)
    return rows


def make_run(
    folder: Path,
    rows: list[dict],
    *,
    name: str = "sample",
    finished: bool = True,
    unanswerable: bool = False,
    rate: str = "2e-5",
    probe: str = "How long does the battery last?",
) -> Path:
    """Write a run folder with these predictions."""
    folder.mkdir(parents=True)
    run = RunDir(folder)
    text = JOB.format(name=name, unanswerable=str(unanswerable).lower(), rate=rate)
    run.job.write_text(text, encoding="utf-8")
    exact = 100 * sum(row["exact_match"] for row in rows) / len(rows)
    f1 = 100 * sum(row["f1"] for row in rows) / len(rows)
    for step in range(1, 21):
        append_row(run.train_table, {"step": step, "epoch": step / 10, "loss_nats": 6 / step**0.5})
    for epoch, share in ((1, 0.7), (2, 1.0)):
        append_row(
            run.eval_table,
            {
                "epoch": epoch,
                "step": 10 * epoch,
                "train_loss_nats": 4.0 - epoch,
                "train_span_accuracy_percent": 55.0 * share,
                "validation_loss_nats": 3.5 - epoch,
                "exact_match_percent": share * exact,
                "exact_match_low_percent": share * exact - 9,
                "exact_match_high_percent": share * exact + 9,
                "f1_percent": share * f1,
                "f1_low_percent": share * f1 - 8,
                "f1_high_percent": share * f1 + 8,
                "span_accuracy_percent": 40.0 * share,
                "examples_per_second": 12.5,
            },
        )
    for epoch, answer in ((0, ""), (1, "forty"), (2, "nine hours")):
        row = {"epoch": epoch, "probe": 1, "question": probe, "answer": answer, "score": 0.25}
        row |= {"start_character": 5 * epoch, "end_character": 5 * epoch + len(answer)}
        append_row(run.probe_table, row | {"expected": "nine hours"})
    run.predictions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    provenance = {
        "git": {"commit": "0123456789abcdef", "diff_sha256": None},
        "machine": {"devices": ["One GPU", "One GPU"]},
        "ranks": 2,
        "seed": 1,
    }
    run.provenance.write_text(json.dumps(provenance))
    if finished:
        run.result.write_text(json.dumps(result(rows, exact, f1, unanswerable)))
    return folder


def result(rows: list[dict], exact: float, f1: float, unanswerable: bool) -> dict[str, Any]:
    """result.json."""
    table: dict[str, Any] = {
        "metrics": {"exact_match": exact, "f1": f1, "loss": 1.5, "span_accuracy": 40.0},
        "intervals": {"exact_match": [exact - 9, exact + 9], "f1": [f1 - 8, f1 + 8]},
        "bootstrap": {"level": 0.95, "resamples": 2000, "seed": 1},
        "questions": len(rows),
        "epoch": 2,
        "step": 20,
        "seconds": {"training": 100.0, "evaluation": 21.5, "total": 125.25},
    }
    if unanswerable:
        table["metrics"] |= {"has_answer_f1": 70.0, "no_answer_exact_match": 55.0}
        table["metrics"] |= {"default_exact_match": exact - 5, "default_f1": f1 - 4}
        table["metrics"] |= {"best_f1": 99.0}
        table["intervals"] |= {"default_exact_match": [exact - 14, exact + 4]}
        table["intervals"] |= {"default_f1": [f1 - 12, f1 + 4], "has_answer_f1": [60.0, 80.0]}
        table["intervals"] |= {"no_answer_exact_match": [40.0, 70.0]}
        tuned = {"source": "/somewhere/tune.json[:200]", "sha256": "0" * 64, "questions": 200}
        tuned |= {"metric": "f1", "percent": 64.5}
        table["null_threshold"] = {"in_use": -1.25, "default": 0.0, "tuned": tuned}
    return table


def add_set(folder: Path, name: str, rows: list[dict]) -> None:
    """Let a run of `make_run` have been scored on a further validation set."""
    run = RunDir(folder)
    dev = '"/somewhere/dev.json"'
    further = f'[{dev}, {{ source = "/somewhere/{name}.json", name = "{name}" }}]'
    run.job.write_text(run.job.read_text(encoding="utf-8").replace(dev, further), encoding="utf-8")
    table = json.loads(run.result.read_text())
    exact = 100 * sum(row["exact_match"] for row in rows) / len(rows)
    f1 = 100 * sum(row["f1"] for row in rows) / len(rows)
    found = result(rows, exact, f1, unanswerable=False)
    found["data"] = {"source": f"/somewhere/{name}.json", "sha256": "0" * 64, "dropped": 0}
    run.result.write_text(json.dumps(table | {"sets": table.get("sets", {}) | {name: found}}))
    for row in read_rows(run.eval_table):
        worse = {key: 0.8 * float(row[key]) for key in row if key.endswith("_percent")}
        append_row(run.eval_table_of(name), {**row, **worse})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    run.predictions_of(name).write_text(lines, encoding="utf-8")


def make_evaluation(folder: Path, rows: list[dict]) -> Path:
    """Write an evaluation's folder with these predictions."""
    folder.mkdir(parents=True)
    run = RunDir(folder)
    exact = 100 * sum(row["exact_match"] for row in rows) / len(rows)
    f1 = 100 * sum(row["f1"] for row in rows) / len(rows)
    table = result(rows, exact, f1, unanswerable=False)
    del table["epoch"], table["step"]
    table["data"] = {"source": "/somewhere/other.json", "sha256": "0" * 64, "dropped": 0}
    table["model"] = {"name": "runs/sample", "weights_sha256": None}
    run.result.write_text(json.dumps(table))
    run.predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
