"""What a run shows and writes of itself: table rows, the terminal's lines, report.md and
predictions.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runner.console import duration
from runner.dataset import Example
from runner.job import Job, Probe
from runner.layout import Layout
from runner.prepare import Questions
from runner.progress import Totals
from runner.rundir import RunDir, below_here, write_atomic
from runner.scoring import Evaluation, Readings
from runner.tables import Value, markdown, read_rows


def data_hashes(training: Questions, validation: Questions) -> dict[str, str]:
    """Slice name to content hash, for the model card."""
    return {part.dataset.source: part.dataset.sha256 for part in (training, validation)}


def headline(scores: Evaluation) -> dict[str, float]:
    """The scores of a run, percent and nats."""
    readings = scores.readings
    return {
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "loss": readings.loss,
        "start_accuracy": readings.start_accuracy,
        "end_accuracy": readings.end_accuracy,
        "span_accuracy": readings.span_accuracy,
    }


def eval_row(epoch: int, step: int, totals: Totals, scores: Evaluation) -> dict[str, Value]:
    """One row of eval.csv."""
    readings = scores.readings
    return {
        "epoch": epoch,
        "step": step,
        "train_loss_nats": totals.loss / totals.windows,
        "train_span_accuracy_percent": 100 * totals.right / totals.windows,
        "validation_loss_nats": readings.loss,
        "exact_match_percent": scores.exact_match,
        "f1_percent": scores.f1,
        "start_accuracy_percent": readings.start_accuracy,
        "end_accuracy_percent": readings.end_accuracy,
        "span_accuracy_percent": readings.span_accuracy,
        **{f"{name}_percent": value for name, value in scores.details.items()},
        "train_seconds": totals.seconds,
        "evaluation_seconds": readings.seconds,
        "examples_per_second": totals.windows / totals.seconds,
    }


def probe_table(epoch: int, readings: Readings, probes: Sequence[Probe]) -> list[dict[str, Value]]:
    """Rows of probes.csv: what the model answers after `epoch` epochs, with score and character
    offsets."""
    return [
        {
            "epoch": epoch,
            "probe": number,
            "question": probe.question,
            "answer": answer.text,
            "score": answer.score,
            "start_character": answer.start,
            "end_character": answer.end,
            "expected": probe.answer,
        }
        for number, (probe, answer) in enumerate(zip(probes, readings.answers, strict=True), 1)
    ]


def write_predictions(run: RunDir, readings: Readings, examples: Sequence[Example]) -> None:
    """Write predictions.jsonl: one question a line, with the right answers beside the model's."""
    lines = [
        json.dumps(
            {
                "id": answer.id,
                "question": example.question,
                "answer": answer.text,
                "score": round(answer.score, 6),
                "start": answer.start,
                "end": answer.end,
                "answers": list(example.answers),
            },
            ensure_ascii=False,
        )
        for answer, example in zip(readings.answers, examples, strict=True)
    ]
    write_atomic(run.predictions, "\n".join(lines) + "\n")


def announcement(
    job: Job,
    training: Questions,
    validation: Questions,
    parameters: Mapping[str, Value],
    precision: str,
    layout: Layout,
) -> list[str]:
    """Say what is about to happen, in a few lines."""
    lines = []
    for name, part in (("train", training), ("validation", validation)):
        lines.append(
            f"{name}: {len(part.dataset.examples)} questions in {len(part.windows)} windows of"
            f" {part.windows.lengths_N.mean():.0f} tokens on"
            f" average{' (cached)' if part.cached else ''}"
        )
        if part.dataset.dropped:
            lines.append(
                f"{name}: {len(part.dataset.dropped)} bad rows dropped, first:"
                f" {part.dataset.dropped[0]}"
            )
    lines.append(
        f"model: {job.model.name}, {parameters['parameters']:,} parameters,"
        f" {parameters['trained']:,} trained, {precision}"
    )
    lines.append(
        f"each step: {job.train.batch_size} windows = {layout.world} rank(s) x "
        f"{layout.micro_batch_size} x {layout.micro_batches} micro-batch(es), ZeRO-{job.zero.stage}"
    )
    return lines


def epoch_rows(run: RunDir) -> list[dict[str, Value]]:
    """The columns of eval.csv that fit a terminal of 80 columns."""
    return [
        {
            "epoch": int(row["epoch"]),
            "train loss": float(row["train_loss_nats"]),
            "valid. loss": float(row["validation_loss_nats"]),
            "train acc %": float(row["train_span_accuracy_percent"]),
            "valid. acc %": float(row["span_accuracy_percent"]),
            "EM %": float(row["exact_match_percent"]),
            "F1 %": float(row["f1_percent"]),
            "win/s": float(row["examples_per_second"]),
        }
        for row in read_rows(run.eval_table)
    ]


def report_text(
    job: Job,
    result: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Value]],
    probes: Sequence[Mapping[str, Value]],
) -> str:
    """Write report.md: scores, epochs, probes, time."""
    metrics = [{"metric": name, "value": value} for name, value in result["metrics"].items()]
    seconds = [{"phase": name, "seconds": value} for name, value in result["seconds"].items()]
    parts = [
        f"# {job.name}",
        (
            f"Weights of epoch {result['epoch']} (step {result['step']}), scored on"
            f" `{job.data.validation}`."
        ),
        markdown(metrics),
        "## Epochs",
        markdown(epochs),
        "![curves](curves.svg)",
    ]
    if probes:
        parts += ["## Probes", markdown(probes)]
    parts += ["## Time", markdown(seconds)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def closing_lines(job: Job, run: RunDir, result: Mapping[str, Any]) -> list[str]:
    """The last lines of a run: its scores and where everything is."""
    metric = result["metrics"]
    lines = [
        (
            f"Exact match {metric['exact_match']:.1f} %, F1 {metric['f1']:.1f} % on"
            f" {below_here(job.data.validation)}"
        ),
        (
            f"Done in {duration(result['seconds']['total'])}. Written to"
            f" {below_here(str(run.path))}:"
        ),
    ]
    for name, what in (
        ("model/", "the tuned model, for from_pretrained"),
        ("eval.csv, train.csv", "scores per epoch, loss per step"),
        ("curves.png, curves.svg", "the same as pictures"),
        ("predictions.jsonl", "an answer for each validation question"),
        ("report.md, result.json", "the summary; only a run that succeeded has it"),
    ):
        lines.append(f"  {name:24}{what}")
    return lines


def probe_changes(rows: Sequence[Mapping[str, Value]]) -> list[dict[str, Value]]:
    """Each probe's answer before training and after each evaluation, repeats left out."""
    shown: list[dict[str, Value]] = []
    latest: dict[Value, Value] = {}
    final = max((int(str(row["epoch"])) for row in rows), default=0)
    for row in sorted(rows, key=lambda r: (int(str(r["probe"])), int(str(r["epoch"])))):
        if latest.get(row["probe"]) == row["answer"] and row["epoch"] != final:
            continue
        latest[row["probe"]] = row["answer"]
        shown.append(
            {
                "question": row["question"] if row["epoch"] == 0 else "",
                "after": "no training" if row["epoch"] == 0 else f"epoch {row['epoch']}",
                "answer": row["answer"] or "(no answer)",
                "score": row["score"],
                "characters": f"{row['start_character']}-{row['end_character']}",
            }
        )
    return shown
