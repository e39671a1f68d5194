"""A job from its first line to its last: data, model, epochs, evaluation, export, result."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from span_kernels import reference_span_loss
from torch import Tensor

from runner import provenance
from runner.batches import epoch_batches, rank_share
from runner.card import model_card
from runner.console import Reporter, Step, duration
from runner.dataset import Example
from runner.engine import (
    Layout,
    batch_layout,
    deepspeed_config,
    gather,
    main_first,
    share,
    start_distributed,
    start_engine,
)
from runner.errors import DataError, ExpectationError, RunnerError
from runner.export import export_model, gathered_state, own_logits, verify_export
from runner.features import Windows, build_windows
from runner.job import Expect, Job, Stop
from runner.jobfile import dump_job
from runner.model import (
    choose_precision,
    freeze,
    load_pretrained,
    load_tokenizer,
    optimiser_groups,
    parameter_table,
    takes_segment_ids,
)
from runner.plots import draw_curves
from runner.prepare import Questions, load_questions, probe_examples
from runner.ranks import Rank, current_rank
from runner.rundir import RunDir, write_atomic, write_json
from runner.scoring import Evaluation, Reader, Readings, evaluate, read_windows, token_accuracy
from runner.tables import Value, append_row, markdown, read_rows, terminal


def train(job: Job, *, runs: Path, run_dir: Path | None = None, threads: int | None = None) -> RunDir:
    """Run a job on this process's rank; every rank of the run calls this with the same job.

    Args:
        job: the checked job, file names absolute.
        runs: folder of all runs; the run goes to runs/<job name>/<stamp>/.
        run_dir: the run's own folder instead; it must not hold a run yet.
        threads: CPU threads of each rank; None shares the machine's cores among its ranks.

    Returns:
        The run folder, with `result.json` in it.

    Raises:
        RunnerError: of the kind that says what is wrong; the run folder keeps what was written until then.
    """
    clock = Clock()
    rank = current_rank()
    device = start_distributed(rank, threads)
    layout = batch_layout(job.train, rank.world)
    run = main_first_folder(rank, runs, job.name, run_dir)
    reporter = Reporter(run.log, speaks=rank.is_main)
    if job.train.deterministic:
        torch.use_deterministic_algorithms(True)
    with clock("data"):
        tokenizer = main_first(rank, lambda: load_tokenizer(job.model))
        training, validation = main_first(rank, lambda: load_questions(job.data, job.seed, tokenizer))
        if len(training.dataset.examples) == 0:
            raise DataError(f"{job.data.train}: no questions")
        probes = probe_examples(job.probe)
        probe_windows = build_windows(probes, tokenizer, job.data.max_length, job.data.stride)
    with clock("model"):
        pretrained = main_first(rank, lambda: load_pretrained(job.model, job.seed))
        model = pretrained.model
        freeze(model, job.model.freeze)
        parameters = parameter_table(model)
        precision = choose_precision(job.model.precision, device)
        batches_per_epoch = -(-len(training.windows) // job.train.batch_size)
        total_steps = batches_per_epoch * job.train.epochs
        config = deepspeed_config(job.zero, job.train, layout, precision)
        # From here on each rank draws its own dropout.
        torch.manual_seed(job.seed * 1_000_003 + rank.index)
        groups = optimiser_groups(model, job.train.weight_decay)
        engine = start_engine(model.to(device), groups, job.train, config, total_steps)
    reader = Reader(
        model=engine,
        device=device,
        pad_id=tokenizer.pad_token_id or 0,
        segment_ids=takes_segment_ids(tokenizer),
        multiple=8 if device.type == "cuda" else 1,
    )
    if rank.is_main:
        write_atomic(run.job, dump_job(job))
        write_json(run.deepspeed, config)
    record = {
        **provenance.collect(job.seed, rank.world, torch.get_num_threads(), [device_name(device)] * rank.local_world),
        "data": {
            "train": {"source": job.data.train, "sha256": training.dataset.sha256},
            "validation": {"source": job.data.validation, "sha256": validation.dataset.sha256},
        },
        "model": {"name": job.model.name, "location": pretrained.location, "sha256": pretrained.weights_sha256},
        "precision": precision,
        "span_loss": "reference",
    }
    if rank.is_main:
        write_json(run.provenance, record)
        announce(reporter, job, run, training, validation, layout, precision, device, parameters, total_steps, clock)

    probe_rows: list[dict[str, Value]] = []

    def ask_probes(epoch: int) -> None:
        if not probes:
            return
        readings = read_windows(
            reader, probe_windows, probes, job.score, rank, unanswerable=job.data.unanswerable
        )
        if readings is not None:
            probe_rows.extend(probe_table(epoch, readings, probes, job))
            for row in probe_rows[-len(probes) :]:
                append_row(run.probe_table, row)

    with clock("probes"):
        ask_probes(0)
    kept: Kept | None = None
    stopper = Stopper(job.stop)
    step = 0
    clock.mark_first_step()
    for epoch in range(job.train.epochs):
        with clock("training"):
            totals = train_epoch(
                reader, training.windows, job, rank, layout, run, reporter, epoch, step, total_steps, clock
            )
            step += batches_per_epoch
        last = epoch == job.train.epochs - 1
        if (epoch + 1) % job.train.eval_every and not last:
            continue
        with clock("evaluation"):
            count = -(-len(validation.windows) // job.score.batch_size)
            with reporter.steps("  scoring", -(-count // rank.world), 10**9) as follow:
                readings = read_windows(
                    reader,
                    validation.windows,
                    validation.dataset.examples,
                    job.score,
                    rank,
                    unanswerable=job.data.unanswerable,
                    step=follow,
                )
            ask_probes(epoch + 1)
        verdict = None
        scores = None
        if readings is not None:
            scores = evaluate(readings, validation.dataset.examples, unanswerable=job.data.unanswerable)
            append_row(run.eval_table, eval_row(epoch + 1, step, totals, scores))
            verdict = stopper.judge(scores)
            show_epoch(reporter, run, job)
        verdict = share(verdict)
        with clock("checkpoint"):
            if verdict.keep:
                state = gathered_state(engine, job.zero.stage)
                logits = own_logits(reader, validation.windows)
                if rank.is_main and scores is not None:
                    kept = Kept(epoch + 1, step, scores, logits)
                    card = model_card(job, headline(scores), data_hashes(training, validation), dump_job(job))
                    export_model(run.model, model, state, tokenizer, card)
                del state
            save_checkpoint(engine, run, rank, step, {"epoch": epoch + 1, "step": step})
        if verdict.stop:
            reporter.say(f"{job.stop.metric if job.stop else ''} has stopped improving: early stop after epoch {epoch + 1}")
            break

    memory = gather(peak_memory(device))
    if rank.is_main:
        assert kept is not None and memory is not None
        with clock("verification"):
            difference = verify_export(
                run.model,
                validation.dataset.examples,
                validation.windows,
                kept.logits,
                job.data.max_length,
                job.data.stride,
            )
        write_predictions(run, kept.scores.readings, validation.dataset.examples)
        result = {
            "metrics": headline(kept.scores) | kept.scores.details,
            "epoch": kept.epoch,
            "step": kept.step,
            "weights_sha256": provenance.file_sha256(run.model / "model.safetensors"),
            "export_difference": difference,
            "seconds": clock.seconds(),
            "peak_memory_bytes": memory,
        }
        finish(run, reporter, job, result, kept, probe_rows)
    failure = share(expectation_failure(job.expect, kept.scores) if kept is not None and rank.is_main else None)
    if dist.is_initialized() and rank.world > 1:
        dist.barrier()
    if failure:
        raise ExpectationError(f"{run.path}: the run finished, but {failure}")
    return run


# --- one epoch ---------------------------------------------------------------------------------------------------


@dataclass
class Totals:
    """Sums over an epoch's windows, all ranks: loss, right spans, windows, tokens, padded tokens, seconds."""

    loss: float = 0.0
    right: float = 0.0
    windows: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0
    seconds: float = 0.0

    def add(self, other: Totals) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def train_epoch(
    reader: Reader,
    windows: Windows,
    job: Job,
    rank: Rank,
    layout: Layout,
    run: RunDir,
    reporter: Reporter,
    epoch: int,
    first_step: int,
    total_steps: int,
    clock: Clock,
) -> Totals:
    """Train one epoch and append its rows to train.csv. Returns the epoch's totals, on every rank."""
    engine = reader.model
    engine.train()
    batches = epoch_batches(
        windows.lengths_N, job.train.batch_size, job.seed, epoch, buckets=job.train.length_buckets
    )
    whole, since_row = Totals(), Totals()
    sums_2 = torch.zeros(2, device=reader.device)  # loss and right spans since the last row, on the device
    began = time.monotonic()
    title = f"epoch {epoch + 1}/{job.train.epochs}"
    with reporter.steps(title, len(batches), job.train.log_every) as follow:
        for done, rows in enumerate(batches, 1):
            for micro in rank_share(rows, rank.index, rank.world, layout.micro_batch_size, layout.micro_batches):
                logits_T2, padded, starts_B, ends_B, counted = reader.logits(windows, micro)
                loss = reference_span_loss(logits_T2, padded.segments_B2, starts_B, ends_B)
                # DeepSpeed averages over ranks and micro-batches; a short last batch must still be a mean over its rows.
                weight = counted * layout.world * layout.micro_batches / len(rows)
                engine.backward(loss * weight)
                engine.step()
                right_3 = token_accuracy(logits_T2, padded.segments_B2, starts_B, ends_B)
                sums_2 += torch.stack([loss.detach() * counted, right_3[2] * (counted > 0)])
                since_row.windows += counted
                since_row.tokens += int(windows.lengths_N[micro].sum())
                since_row.slots += padded.input_ids_BL.numel() if counted else 0
            if epoch == 0 and done == 1:
                clock.first_step_done()
            if done % job.train.log_every == 0 or done == len(batches):
                since_row.seconds = time.monotonic() - began
                began = time.monotonic()
                row = reduced(since_row, sums_2)
                whole.add(row)
                sums_2.zero_()
                since_row = Totals()
                step = first_step + done
                if not np.isfinite(row.loss):
                    raise RunnerError(
                        f"the loss is {row.loss} at step {step} of epoch {epoch + 1}; lower train.learning_rate or set "
                        f"model.precision to fp32"
                    )
                if rank.is_main:
                    append_row(run.train_table, train_row(engine, row, step, epoch + done / len(batches), clock))
            note = f"loss {whole.loss / max(1.0, whole.windows):.3f}" if whole.windows else ""
            rate = whole.windows / max(1e-9, whole.seconds)
            follow(done, f"{note}  {rate:.1f} windows/s" if note else "")
    return whole


def reduced(mine: Totals, sums_2: Tensor) -> Totals:
    """Add up a row's sums over the ranks: the only time that the loop waits for the device."""
    values = torch.tensor([mine.windows, mine.tokens, mine.slots], device=sums_2.device)
    sums_5 = torch.cat([sums_2, values])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums_5)
    loss, right, windows, tokens, slots = sums_5.tolist()
    return Totals(loss, right, windows, tokens, slots, mine.seconds)


def train_row(engine: Any, row: Totals, step: int, epoch: float, clock: Clock) -> dict[str, Value]:
    """One row of train.csv."""
    norm = engine.get_global_grad_norm()
    return {
        "step": step,
        "epoch": round(epoch, 6),
        "loss_nats": row.loss / row.windows,
        "span_accuracy_percent": 100 * row.right / row.windows,
        "learning_rate": float(engine.get_lr()[0]),
        "grad_norm": None if norm is None else float(norm),
        "examples_per_second": row.windows / row.seconds,
        "tokens_per_second": row.tokens / row.seconds,
        "padding_percent": 100 * (1 - row.tokens / row.slots),
        "elapsed_seconds": clock.elapsed(),
    }


# --- early stopping ----------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """The evaluation whose weights are exported."""

    epoch: int
    step: int
    scores: Evaluation
    logits: list[np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """What an evaluation leads to."""

    keep: bool
    stop: bool


class Stopper:
    """Keeps the best evaluation; without [stop] the newest one."""

    def __init__(self, stop: Stop | None) -> None:
        self.stop = stop
        self.best: float | None = None
        self.waited = 0

    def judge(self, scores: Evaluation) -> Verdict:
        """Decide on a new evaluation."""
        if self.stop is None:
            return Verdict(keep=True, stop=False)
        value = scores.metric(self.stop.metric)
        gain = value if self.stop.metric != "loss" else -value
        if self.best is None or gain > self.best + self.stop.min_delta:
            self.best, self.waited = gain, 0
            return Verdict(keep=True, stop=False)
        self.waited += 1
        return Verdict(keep=False, stop=self.waited > self.stop.patience)


def expectation_failure(expect: Expect | None, scores: Evaluation) -> str | None:
    """Say by how much a run missed its [expect]; None where it is met or nothing is expected."""
    missed = []
    for name in ("exact_match", "f1", "span_accuracy", "loss"):
        wanted = getattr(expect, name) if expect else None
        if wanted is None:
            continue
        found = scores.metric(name)
        if not abs(found - wanted) <= expect.tolerance:  # type: ignore[union-attr]
            missed.append(f"{name} is {found:.2f}, expected {wanted:.2f} +- {expect.tolerance:g}")  # type: ignore[union-attr]
    return "; ".join(missed) or None


# --- what is written and shown -----------------------------------------------------------------------------------


class Clock:
    """Seconds by phase, from the start of the process."""

    def __init__(self) -> None:
        self._born = psutil.Process().create_time()
        self._phases: dict[str, float] = {"start": time.time() - self._born}
        self._first_step: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - began

    def mark_first_step(self) -> None:
        self._first_step = None

    def first_step_done(self) -> None:
        self._first_step = self.elapsed()

    def elapsed(self) -> float:
        """Seconds since the process began."""
        return time.time() - self._born

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, until the first step was done, and in all."""
        extra = {} if self._first_step is None else {"until_first_step": self._first_step}
        return {name: round(value, 3) for name, value in (self._phases | extra | {"total": self.elapsed()}).items()}


def main_first_folder(rank: Rank, runs: Path, name: str, run_dir: Path | None) -> RunDir:
    """Rank 0 makes the run folder; a refusal reaches every rank."""
    made: list[RunDir] = []

    def make() -> None:
        if rank.is_main:
            made.append(RunDir.create(runs, name, run_dir))

    main_first(rank, make)
    return RunDir(share(str(made[0].path) if made else None))


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.processor_name()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory of this rank so far, in bytes: of the process, and of the GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def save_checkpoint(engine: Any, run: RunDir, rank: Rank, step: int, client_state: dict[str, int]) -> None:
    """Save DeepSpeed's checkpoint and keep the newest two."""
    engine.save_checkpoint(
        str(run.checkpoints), tag=run.checkpoint(step), client_state=client_state, save_latest=False
    )
    if rank.is_main:
        for old in sorted(run.checkpoints.glob("step-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)


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


def probe_table(epoch: int, readings: Readings, probes: Sequence[Example], job: Job) -> list[dict[str, Value]]:
    """Rows of probes.csv: what the model answers after `epoch` epochs, with score and character offsets."""
    return [
        {
            "epoch": epoch,
            "probe": number,
            "question": example.question,
            "answer": answer.text,
            "score": answer.score,
            "start_character": answer.start,
            "end_character": answer.end,
            "expected": probe.answer,
        }
        for number, (example, answer, probe) in enumerate(zip(probes, readings.answers, job.probe, strict=True), 1)
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


def announce(
    reporter: Reporter,
    job: Job,
    run: RunDir,
    training: Questions,
    validation: Questions,
    layout: Layout,
    precision: str,
    device: torch.device,
    parameters: Sequence[Mapping[str, Value]],
    total_steps: int,
    clock: Clock,
) -> None:
    """Say what is about to happen."""
    reporter.say(f"{job.name}: {run.path}")
    for name, part in (("train", training), ("validation", validation)):
        lengths = part.windows.lengths_N
        reporter.say(
            f"  {name}: {len(part.dataset.examples)} questions, {len(part.windows)} windows of {lengths.mean():.0f} "
            f"tokens on average, features {'from the cache' if part.cached else 'built'}"
        )
        if part.dataset.dropped:
            reporter.say(f"  {name}: {len(part.dataset.dropped)} bad rows dropped, first: {part.dataset.dropped[0]}")
    whole = parameters[-1]
    reporter.say(
        f"  model: {job.model.name}, {whole['parameters']:,} parameters, {whole['trained']:,} trained, {precision}"
    )
    if job.model.freeze:
        reporter.show(terminal("Parameters", parameters))
    reporter.say(
        f"  {total_steps} steps of {job.train.batch_size} windows: {layout.world} rank(s) x {layout.micro_batch_size} x "
        f"{layout.micro_batches} micro-batch(es), ZeRO-{job.zero.stage}, {device_name(device)}"
    )
    reporter.say(f"  span loss: reference (plain PyTorch); ready after {duration(clock.elapsed())}")


def show_epoch(reporter: Reporter, run: RunDir, job: Job) -> None:
    """Redraw the curves and show the table of epochs so far."""
    draw_curves(run, job.name)
    reporter.show(terminal("", epoch_rows(run)))


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


def finish(
    run: RunDir,
    reporter: Reporter,
    job: Job,
    result: Mapping[str, Any],
    kept: Kept,
    probe_rows: Sequence[Mapping[str, Value]],
) -> None:
    """Write report.md and, last of all, result.json; show where everything is."""
    shown = probe_changes(probe_rows)
    seconds = [{"phase": name, "seconds": value} for name, value in result["seconds"].items()]
    metrics = [{"metric": name, "value": value} for name, value in result["metrics"].items()]
    write_atomic(
        run.report,
        f"# {job.name}\n\nWeights of epoch {kept.epoch} (step {kept.step}), scored on `{job.data.validation}`.\n\n"
        f"{markdown(metrics)}\n## Epochs\n\n{markdown(epoch_rows(run))}\n![curves](curves.svg)\n\n"
        + (f"## Probes\n\n{markdown(shown)}\n" if shown else "")
        + f"## Time\n\n{markdown(seconds)}",
    )
    write_json(run.result, result)
    if shown:
        reporter.show(terminal("What the model answers", shown))
    metric = result["metrics"]
    reporter.say(
        f"Exact match {metric['exact_match']:.1f} %, F1 {metric['f1']:.1f} % on {job.data.validation} "
        f"(weights of epoch {kept.epoch})"
    )
    reporter.say(f"Done in {duration(result['seconds']['total'])}. Written to {run.path}:")
    for name, what in (
        ("model/", "the tuned model, for transformers' from_pretrained"),
        ("eval.csv, train.csv", "scores per epoch, loss per step"),
        ("curves.png, curves.svg", "the same as pictures"),
        ("predictions.jsonl", "an answer for each validation question"),
        ("report.md, result.json", "summary; result.json is written only by a run that succeeded"),
    ):
        reporter.say(f"  {name:24} {what}")


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
