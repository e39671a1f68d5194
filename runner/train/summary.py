"""What a run tells of itself, as rows of its tables and lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.data.splits import LoadedSets, Split, read_as_lines
from runner.eval.evaluation import Evaluation
from runner.eval.inference import Predictions
from runner.eval.predictions import as_lines, prediction_records
from runner.eval.results import score_line, threshold_lines
from runner.job.schema import Job, Probe
from runner.metrics.normalise import rules
from runner.model.load import emulation_warning
from runner.run.folder import RunDir
from runner.train.setup import Session
from runner.train.state import Totals, TrainState
from runner.utils.files import Fence, below_here, write_atomic
from runner.utils.tables import CellValue, read_rows
from runner.utils.text import duration, shorten

THRESHOLD = "null_threshold_logits"  # column of eval.csv

SET_WIDTH = 12  # characters of a validation set's name in the table of epochs

INTERVAL_COLUMNS = ("EM %\n±95 % CI", "F1 %\n±95 % CI")  # of the table of epochs


def data_hashes(sets: LoadedSets) -> dict[str, str]:
    """What questions are for to the hash of their content, for the model card: two samples may be
    of one slice."""
    trained = {name: name.replace("train", "training", 1) for name in sets.trained()}
    return {trained.get(name, name): s.dataset.sha256 for name, s in sets.named().items()}


def train_row(state: TrainState, totals: Totals, engine: Any) -> dict[str, CellValue]:
    """One row of train.csv: what all ranks did since the one before."""
    norm = engine.get_global_grad_norm()
    return {
        "step": state.step,
        "epoch": round(state.epoch - 1 + state.done / state.steps_per_epoch, 6),
        "loss_nats": totals.loss / totals.windows,
        "span_accuracy_percent": 100 * totals.right / totals.windows,
        "learning_rate": float(engine.get_lr()[0]),
        "grad_norm": None if norm is None else float(norm),
        "examples_per_second": totals.windows / totals.seconds,
        "tokens_per_second": totals.tokens / totals.seconds,
        "padding_percent": 100 * (1 - totals.tokens / totals.slots),
        "elapsed_seconds": state.timer.elapsed(),
    }


def eval_row(epoch: int, step: int, totals: Totals, scores: Evaluation) -> dict[str, CellValue]:
    """One row of eval.csv."""
    found = scores.predictions
    return {
        "epoch": epoch,
        "step": step,
        "train_loss_nats": totals.loss / totals.windows,
        "train_span_accuracy_percent": 100 * totals.right / totals.windows,
        "validation_loss_nats": found.loss,
        "exact_match_percent": scores.exact_match,
        **_ends("exact_match", scores),
        "f1_percent": scores.f1,
        **_ends("f1", scores),
        "start_accuracy_percent": found.start_accuracy,
        "end_accuracy_percent": found.end_accuracy,
        "span_accuracy_percent": found.span_accuracy,
        **{f"{name}_percent": value for name, value in scores.details.items()},
        **_threshold(scores),
        "train_seconds": totals.seconds,
        "evaluation_seconds": found.seconds,
        "examples_per_second": totals.windows / totals.seconds,
    }


def _ends(name: str, scores: Evaluation) -> dict[str, CellValue]:
    low, high = scores.intervals[name]
    return {f"{name}_low_percent": low, f"{name}_high_percent": high}


def latest_threshold(run: RunDir) -> float | None:
    """The null threshold of eval.csv's last row, to the bit; None before the first evaluation, and
    where "" is never an answer. A resumed run finds it too: its tables are those of the
    checkpoint."""
    rows = read_rows(run.eval_table)
    return float(rows[-1][THRESHOLD]) if rows and THRESHOLD in rows[-1] else None


def _threshold(scores: Evaluation) -> dict[str, CellValue]:
    threshold = scores.null_threshold
    return {} if threshold is None else {THRESHOLD: threshold}


def probe_table(
    epoch: int, found: Predictions, probes: Sequence[Probe]
) -> list[dict[str, CellValue]]:
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
        for number, (probe, answer) in enumerate(zip(probes, found.answers, strict=True), 1)
    ]


def write_repairs(run: RunDir, sets: LoadedSets, fence: Fence) -> None:
    """Write repairs.jsonl, an answer that was mended a line; nothing where none was."""
    records = [
        {"set": name, **asdict(repair)}
        for name, split in sets.named().items()
        for repair in split.dataset.repairs
    ]
    if records:
        write_atomic(run.repairs, as_lines(records), fence)


def write_predictions(
    path: Path, scores: Evaluation, validation: Split, fence: Fence, *, unanswerable: bool
) -> None:
    """Write a predictions.jsonl: one question a line, with the right answers beside the model's;
    `fence` is asked before it gets its name."""
    records = prediction_records(
        scores.predictions.answers,
        validation.dataset.examples,
        validation.windows,
        scores.exact_N,
        scores.f1_N,
        unanswerable=unanswerable,
    )
    write_atomic(path, as_lines(records), fence)


def opening_lines(session: Session) -> list[str]:
    """What is about to happen, in a few lines."""
    job, layout, lines = session.job, session.sampler.layout, []
    sets = session.splits.sets
    counts = (f", {one.count} seen an epoch" for one in session.sampler.sets)
    seen = dict(zip(sets.trained(), counts, strict=False))  # empty without weights
    for name, split in sets.named().items():
        lines.append(
            f"{name}: {len(split.dataset.examples)} questions in {len(split.windows)} windows of"
            f" {split.windows.lengths_N.mean():.0f} tokens on"
            f" average{seen.get(name, '')}{' (cached)' if split.cached else ''}"
        )
        lines += [f"{name}: {sentence}" for sentence in split.dataset.contradictions]
        if split.dataset.dropped:
            lines.append(
                f"{name}: {len(split.dataset.dropped)} bad rows dropped, first:"
                f" {split.dataset.dropped[0]}"
            )
        if repairs := split.dataset.repairs:
            lines.append(
                f"{name}: answers mended (repairs.jsonl): {len(repairs)}, first: {repairs[0]}"
            )
    lines += session.caveats
    everything = session.parameters[-1]
    lines.append(
        f"model: {job.model.name}, {everything['parameters']:,} parameters,"
        f" {everything['trained']:,} trained, {session.precision}"
    )
    lines += emulation_warning(session.precision, session.device)
    lines.append(
        f"each step: {job.train.batch_size} windows = {layout.world} rank(s) x "
        f"{layout.micro_batch_size} x {layout.micro_batches} micro-batch(es), ZeRO-{job.zero.stage}"
    )
    return [*lines, *session.notes]


def detail_lines(session: Session) -> list[str]:
    """How the run computes, for who wants to know."""
    lines = [
        *read_as_lines(session.splits.sets.named()),
        session.span_loss.described(),
        *session.plan.lines(),
    ]
    if session.exchanges_by_memory:
        lines.append("exchange: shared memory (all ranks are on CPUs of one machine)")
    return lines


def epoch_rows(run: RunDir) -> list[dict[str, CellValue]]:
    """What eval.csv tells of each epoch, to fit a terminal of 80 columns: losses in nats, accuracy
    of whole spans over windows, scores with half the width of their 95 % intervals, the epoch's
    wall seconds, windows trained a second; with several validation sets a row for each."""
    if run.further_sets:
        return _rows_by_set(run)
    return [
        {
            "epoch": int(row["epoch"]),
            "train\nloss": float(row["train_loss_nats"]),
            "train\nacc %": float(row["train_span_accuracy_percent"]),
            "valid.\nloss": float(row["validation_loss_nats"]),
            "valid.\nacc %": float(row["span_accuracy_percent"]),
            INTERVAL_COLUMNS[0]: _with_half_width(row, "exact_match"),
            INTERVAL_COLUMNS[1]: _with_half_width(row, "f1"),
            "time\ns": round(float(row["train_seconds"]) + float(row["evaluation_seconds"])),
            "win/s": float(row["examples_per_second"]),
        }
        for row in read_rows(run.eval_table)
    ]


def _rows_by_set(run: RunDir) -> list[dict[str, CellValue]]:
    """The same, in each epoch for one validation set after another."""
    tables = [run.eval_table, *map(run.eval_table_of, run.further_sets)]
    by_set = zip(*map(read_rows, tables), strict=False)  # their rows may differ by one epoch
    return [
        {
            "epoch": int(row["epoch"]),
            "set": shorten(name, SET_WIDTH),
            "train\nloss": None if number else float(row["train_loss_nats"]),
            "valid.\nloss": float(row["validation_loss_nats"]),
            "valid.\nacc %": float(row["span_accuracy_percent"]),
            INTERVAL_COLUMNS[0]: _with_half_width(row, "exact_match"),
            INTERVAL_COLUMNS[1]: _with_half_width(row, "f1"),
            "time\ns": round(float(row["evaluation_seconds"]))
            + (0 if number else round(float(row["train_seconds"]))),
        }
        for rows in by_set
        for number, (name, row) in enumerate(zip(run.set_names, rows, strict=True))
    ]


def _with_half_width(row: Mapping[str, str], name: str) -> str:
    """A score and how far its interval reaches, which is not quite as far on both sides."""
    value, low, high = (float(row[f"{name}{end}_percent"]) for end in ("", "_low", "_high"))
    return f"{value:.1f} ±{(high - low) / 2:.1f}".rjust(10)  # rows that come later have their place


def closing_lines(job: Job, run: RunDir, result: Mapping[str, Any]) -> list[str]:
    """The last lines of a run: its scores and where everything is."""
    first, *further = (job.data.described([one], below_here) for one in job.data.scored)
    lines = [f"{score_line(result, '')} on {first}"]
    if further:
        sets = zip(result["sets"].values(), further, strict=True)
        lines += [f"{score_line(scores, '')} on {name}" for scores, name in sets]
    over = "each set's" if further else f"the {result['questions']:,}"
    lines += [
        *_language_lines(job),
        *threshold_lines(result),
        f"In brackets: 95 % intervals over {over} questions",
        (
            f"Done in {duration(result['seconds']['total'])}. Written to"
            f" {below_here(str(run.path))}:"
        ),
    ]
    probes = [("probes.csv", "each probe's answers as training went on")] if job.probe else []
    for name, what in (
        ("model/", "the tuned model, for from_pretrained"),
        ("eval.csv, train.csv", "scores per epoch, loss per step"),
        *([("eval-*, predictions-*", "the same of the other validation sets")] if further else []),
        *probes,
        ("curves.png, curves.svg", "the same as pictures"),
        ("predictions.jsonl", "an answer for each validation question"),
        ("report.html, report.md", "scores, curves, where it is wrong and how"),
        ("result.json", "the scores; only a run that succeeded has it"),
    ):
        lines.append(f"  {name:24}{what}")
    return lines


def _language_lines(job: Job) -> list[str]:
    """By whose rules, where not as anyone expects."""
    language = job.score.language
    return [] if language == "en" else [f"by {rules(language, v2=job.data.unanswerable)}"]


def probe_changes(rows: Sequence[Mapping[str, CellValue]]) -> list[dict[str, CellValue]]:
    """Each probe's answer before training and after each evaluation, repeats left out."""
    shown: list[dict[str, CellValue]] = []
    latest: dict[CellValue, CellValue] = {}
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


def progress_note(totals: Totals) -> str:
    """A few words on an epoch so far, for the bar and the log."""
    if not totals.windows:
        return ""
    return (
        f"loss {totals.loss / totals.windows:.3f}  {totals.windows / totals.seconds:.1f} windows/s"
    )
