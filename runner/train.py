"""A job from its first line to its last: data, model, epochs, evaluation, export, result."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from runner import provenance
from runner.card import model_card
from runner.clock import Clock
from runner.console import Reporter
from runner.engine import (
    deepspeed_config,
    gather,
    main_first,
    share,
    start_distributed,
    start_engine,
)
from runner.epoch import Course, train_epoch
from runner.errors import ExpectationError
from runner.export import export_model, gathered_state, own_logits, verify_export
from runner.features import build_windows
from runner.job import Job
from runner.jobfile import dump_job
from runner.layout import batch_layout
from runner.model import (
    Pretrained,
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
from runner.rundir import RunDir, below_here, write_atomic, write_json
from runner.scoring import Evaluation, Reader, evaluate, read_windows
from runner.span_loss import SpanLoss, choose_span_loss
from runner.stopping import Stopper, missed_expectation
from runner.summary import (
    announcement,
    closing_lines,
    data_hashes,
    epoch_rows,
    eval_row,
    headline,
    probe_changes,
    probe_table,
    report_text,
    write_predictions,
)
from runner.tables import Value, append_row, terminal


@dataclass
class Kept:
    """The evaluation whose weights stand in `model/`."""

    epoch: int
    step: int
    scores: Evaluation
    logits: list[np.ndarray]


def train(
    job: Job, *, runs: Path, run_dir: Path | None = None, threads: int | None = None
) -> RunDir:
    """Run a job on this process's rank; every rank of the run calls this with the same job.

    Args:
        job: the checked job, file names absolute.
        runs: folder of all runs; the run goes to runs/<job name>/<stamp>/.
        run_dir: the run's own folder instead; it must not hold a run yet.
        threads: CPU threads of each rank; None shares the machine's cores among its ranks.

    Returns:
        The run folder, with `result.json` in it.

    Raises:
        RunnerError: of the kind that says what is wrong; the run folder keeps what was written
            until then.
    """
    clock = Clock()
    rank = current_rank()
    if job.train.deterministic:
        # cuBLAS reads this when CUDA starts; without it the strict mode below refuses its products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = start_distributed(rank, threads)
    layout = batch_layout(job.train, rank.world)
    run = RunDir(share(main_only(rank, lambda: str(RunDir.create(runs, job.name, run_dir).path))))
    reporter = Reporter(run.log, speaks=rank.is_main)
    reporter.say(f"{job.name}: {below_here(str(run.path))}")

    with clock("data"):
        tokenizer = main_first(rank, lambda: load_tokenizer(job.model))
        training, validation = main_first(
            rank, lambda: load_questions(job.data, job.seed, tokenizer)
        )
        probes = probe_examples(job.probe)
        probe_windows = build_windows(probes, tokenizer, job.data.max_length, job.data.stride)
    with clock("model"):
        pretrained = main_first(rank, lambda: load_pretrained(job.model, job.seed))
        freeze(pretrained.model, job.model.freeze)
        parameters = parameter_table(pretrained.model)
        precision = choose_precision(job.model.precision, device)
        trained = int(str(parameters[-1]["trained"]))
        config = deepspeed_config(job.zero, job.train, layout, precision, trained)
        total_steps = -(-len(training.windows) // job.train.batch_size) * job.train.epochs
        # From here on each rank draws its own dropout.
        torch.manual_seed(job.seed * 1_000_003 + rank.index)
        groups = optimiser_groups(pretrained.model, job.train.weight_decay)
        span_loss = choose_span_loss(job.model.span_loss, pretrained.model, device, job.zero.stage)
        engine = start_engine(pretrained.model, device, groups, job.train, config, total_steps)
    pad_id = tokenizer.pad_token_id
    reader = Reader(
        model=engine,
        device=device,
        pad_id=pad_id if isinstance(pad_id, int) else 0,
        segment_ids=takes_segment_ids(tokenizer),
        multiple=8 if device.type == "cuda" else 1,
    )
    course = Course(
        reader,
        span_loss,
        training.windows,
        job.train,
        job.seed,
        rank,
        layout,
        clock,
        lambda row: append_row(run.train_table, row),
    )
    if rank.is_main:
        write_atomic(run.job, dump_job(job))
        write_json(run.deepspeed, config)
        write_json(
            run.provenance,
            record(job, rank, device, training, validation, pretrained, precision, span_loss),
        )
        for line in announcement(job, training, validation, parameters[-1], precision, layout):
            reporter.say(f"  {line}")
        reporter.say(f"  {span_loss.described()}")
        if job.model.freeze:
            reporter.show(terminal("Frozen layers", parameters))

    probe_rows: list[dict[str, Value]] = []

    def ask_probes(epoch: int) -> None:
        if not probes:
            return
        readings = read_windows(
            reader, probe_windows, probes, job.score, rank, unanswerable=job.data.unanswerable
        )
        if readings is not None:
            probe_rows.extend(rows := probe_table(epoch, readings, job.probe))
            for row in rows:
                append_row(run.probe_table, row)

    with clock("probes"):
        ask_probes(0)
    kept: Kept | None = None
    stopper = Stopper(job.stop)
    for epoch in range(1, job.train.epochs + 1):
        with (
            clock("training"),
            reporter.steps(
                f"epoch {epoch}/{job.train.epochs}", course.steps_per_epoch, job.train.log_every
            ) as follow,
        ):
            totals = train_epoch(course, epoch - 1, follow)
        if epoch % job.train.eval_every and epoch < job.train.epochs:
            continue
        step = epoch * course.steps_per_epoch
        with clock("evaluation"):
            readings = read_windows(
                reader,
                validation.windows,
                validation.dataset.examples,
                job.score,
                rank,
                unanswerable=job.data.unanswerable,
            )
        with clock("probes"):
            ask_probes(epoch)
        scores = verdict = None
        if readings is not None:
            scores = evaluate(
                readings, validation.dataset.examples, unanswerable=job.data.unanswerable
            )
            verdict = stopper.judge(scores)
            append_row(run.eval_table, eval_row(epoch, step, totals, scores))
            draw_curves(run, job.name)
            reporter.show(terminal("", epoch_rows(run)))
        verdict = share(verdict)
        with clock("saving"):
            if verdict.keep:
                state = gathered_state(engine, job.zero.stage)
                logits = own_logits(reader, validation.windows)
                if scores is not None:
                    kept = Kept(epoch, step, scores, logits)
                    card = model_card(
                        job, headline(scores), data_hashes(training, validation), dump_job(job)
                    )
                    export_model(run.model, engine.module, state, tokenizer, card)
                del state
            save_checkpoint(engine, run, rank, step, epoch)
        if verdict.stop and job.stop is not None:
            reporter.say(
                f"{job.stop.metric} has stopped improving: training ends early, after epoch {epoch}"
            )
            break

    memory = gather(peak_memory(device))

    def conclude() -> str | None:
        if kept is None or memory is None:
            raise AssertionError("the last epoch is always evaluated, on rank 0")
        with clock("verification"):
            difference = verify_export(
                run.model,
                validation.dataset.examples,
                validation.windows,
                kept.logits,
                job.data.max_length,
                job.data.stride,
            )
        result = {
            "metrics": headline(kept.scores) | kept.scores.details,
            "epoch": kept.epoch,
            "step": kept.step,
            "weights_sha256": provenance.file_sha256(run.model / "model.safetensors"),
            "export_difference": difference,
            "seconds": clock.seconds(),
            "peak_memory_bytes": memory,
        }
        finish(job, run, reporter, kept, validation, probe_rows, result)
        return missed_expectation(job.expect, kept.scores)

    missed = share(main_only(rank, conclude))
    if missed:
        raise ExpectationError(f"{run.path}: the run finished, but {missed}")
    return run


def finish(
    job: Job,
    run: RunDir,
    reporter: Reporter,
    kept: Kept,
    validation: Questions,
    probe_rows: Sequence[dict[str, Value]],
    result: dict[str, Any],
) -> None:
    """Write predictions, report and, last of all, result.json; show the outcome."""
    shown = probe_changes(probe_rows)
    write_predictions(run, kept.scores.readings, validation.dataset.examples)
    write_atomic(run.report, report_text(job, result, epoch_rows(run), shown))
    write_json(run.result, result)
    if shown:
        reporter.show(terminal("What the model answers", shown))
    for line in closing_lines(job, run, result):
        reporter.say(line)


def record(
    job: Job,
    rank: Rank,
    device: torch.device,
    training: Questions,
    validation: Questions,
    pretrained: Pretrained,
    precision: str,
    span_loss: SpanLoss,
) -> dict[str, Any]:
    """provenance.json: all that could make a second run differ."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.processor_name()
    )
    return {
        **provenance.collect(
            job.seed, rank.world, torch.get_num_threads(), [name] * rank.local_world
        ),
        "data": {
            part: {"source": questions.dataset.source, "sha256": questions.dataset.sha256}
            for part, questions in (("train", training), ("validation", validation))
        },
        "model": {
            "name": job.model.name,
            "location": pretrained.location,
            "sha256": pretrained.weights_sha256,
        },
        "zero_stage": job.zero.stage,
        "precision": precision,
        "span_loss": {"path": span_loss.path, "reason": span_loss.reason},
    }


def main_only(rank: Rank, work: Any) -> Any:
    """Do `work` on rank 0 alone, None elsewhere; its failure ends every rank."""
    return main_first(rank, lambda: work() if rank.is_main else None)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory of this rank so far, in bytes: of the process, and of the GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def save_checkpoint(engine: Any, run: RunDir, rank: Rank, step: int, epoch: int) -> None:
    """Save DeepSpeed's checkpoint and keep the newest two."""
    engine.save_checkpoint(
        str(run.checkpoints),
        tag=run.checkpoint(step),
        client_state={"epoch": epoch},
        save_latest=False,
    )
    if rank.is_main:
        for old in sorted(run.checkpoints.glob("step-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)
        for script in run.checkpoints.glob("zero_to_*.py"):
            script.unlink()  # DeepSpeed leaves programs beside its data; nobody should run those
    if dist.get_world_size() > 1:
        dist.barrier()
