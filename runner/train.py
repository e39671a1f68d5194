"""A job from its first line to its last: data, model, epochs, evaluation, export, result."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from runner import provenance
from runner.card import model_card
from runner.checkpoint import BEST, Checkpoints, windows_sha256
from runner.claim import Attempt
from runner.clock import Clock
from runner.console import Reporter
from runner.control import Boundary, everyone, gather, is_cut_off, main_first, share
from runner.crew import Crew
from runner.engine import (
    deepspeed_config,
    start_distributed,
    start_engine,
)
from runner.epoch import Course, train_epoch
from runner.errors import ExpectationError, Interrupted, MachineError
from runner.expectation import missed_expectation
from runner.export import gathered_state, own_logits, publish_model, verify_export
from runner.features import build_windows
from runner.health import Health
from runner.job import Job
from runner.jobfile import dump_job
from runner.keeping import MODEL, Kept, write_kept
from runner.layout import Layout, batch_layout
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
from runner.progress import Memory, Progress, seed_everything
from runner.ranks import Rank, current_rank
from runner.rundir import RunDir, below_here, write_atomic, write_json
from runner.sameness import differing_fields, read_record
from runner.scoring import Reader, evaluate, read_windows
from runner.signals import asked
from runner.span_loss import SpanLoss, choose_span_loss
from runner.stopping import Stopper
from runner.store import Stage
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
from runner.watch import Watch


def train(job: Job, *, attempt: Attempt | None, threads: int | None = None) -> RunDir:
    """Run a job on this process's rank, from where its folder's newest checkpoint left it; every
    rank of the run calls this with the same job.

    Args:
        job: the checked job, file names absolute.
        attempt: the claim on the run folder, on rank 0; None elsewhere.
        threads: CPU threads of each rank; None shares the machine's cores among its ranks.

    Returns:
        The run folder, with `result.json` in it.

    Raises:
        RunnerError: of the kind that says what is wrong; the run folder keeps what was written
            until then. `Interrupted`, if a signal asked for an end: after everything was saved.
    """
    clock = Clock()
    rank = current_rank()
    if job.train.deterministic:
        # cuBLAS reads this when CUDA starts; without it the strict mode below refuses its products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = start_distributed(rank, threads)
    folder, number = share((str(attempt.run.path), attempt.number) if attempt else None)
    run = RunDir(folder)
    crew = Crew(run, number, rank.index, rank.world)
    watch = Watch(crew, rank.index, 60 * job.train.timeout_minutes, attempt, is_cut_off)
    with watch.answering(), memory_sentences(watch):
        train_watched(job, run, rank, device, number, attempt, clock, watch)
    watch.close()
    return run


def train_watched(
    job: Job,
    run: RunDir,
    rank: Rank,
    device: torch.device,
    number: int,
    attempt: Attempt | None,
    clock: Clock,
    watch: Watch,
) -> None:
    """The job from its data to its result; `watch` is told where it is, and explains what fails."""
    layout = batch_layout(job.train, rank.world)
    reporter = Reporter(run.log, speaks=rank.is_main)
    reporter.say(f"{job.name}: {below_here(str(run.path))}")

    watch.at("reading the data", bounded=False)
    with clock("data"):
        tokenizer = main_first(rank, lambda: load_tokenizer(job.model))
        training, validation = main_first(
            rank, lambda: load_questions(job.data, job.seed, tokenizer)
        )
        probes = probe_examples(job.probe)
        probe_windows = build_windows(probes, tokenizer, job.data.max_length, job.data.stride)
    stop_if_asked(run)
    watch.at("loading the model", bounded=False)
    with clock("model"):
        pretrained = main_first(rank, lambda: load_pretrained(job.model, job.seed))
        freeze(pretrained.model, job.model.freeze)
        parameters = parameter_table(pretrained.model)
        precision = choose_precision(job.model.precision, device)
        trained = int(str(parameters[-1]["trained"]))
        config = deepspeed_config(job.zero, job.train, layout, precision, trained)
        total_steps = -(-len(training.windows) // job.train.batch_size) * job.train.epochs
        # From here on each rank draws its own dropout.
        seed_everything(job.seed * 1_000_003 + rank.index)
        groups = optimiser_groups(pretrained.model, job.train.weight_decay)
        span_loss = choose_span_loss(job.model.span_loss, pretrained.model, device, job.zero.stage)
        engine = start_engine(pretrained.model, device, groups, job.train, config, total_steps)
    stop_if_asked(run)
    pad_id = tokenizer.pad_token_id
    reader = Reader(
        model=engine,
        device=device,
        pad_id=pad_id if isinstance(pad_id, int) else 0,
        segment_ids=takes_segment_ids(tokenizer),
        multiple=8 if device.type == "cuda" else 1,
    )

    # What is remembered, how it is saved, and when.
    progress = Progress(torch.zeros(2, device=device), total_steps // job.train.epochs)
    memory = Memory(progress, Stopper(job.stop), clock)
    checkpoints = Checkpoints(
        run,
        number,
        attempt,
        rank,
        engine,
        device,
        identity(job, rank, layout, precision, training, validation),
        reporter.say,
    )
    health = Health(
        rank,
        training.windows.questions_N,
        [example.id for example in training.dataset.examples],
        scaled=precision == "fp16",
    )
    meeting = Boundary(rank, 60 * job.train.checkpoint_minutes)

    def save(best: Callable[[Stage], None] | None = None, *, required: bool) -> None:
        watch.at(f"saving after step {progress.step}", bounded=False)
        with clock("saving"):
            health.check(engine.module)
            checkpoints.save(memory, best, required=required)
        meeting.saved()

    def boundary() -> None:
        """Between two steps, or two batches of an evaluation: save or stop, if the ranks agree."""
        watch.at(f"step {progress.step + 1} (epoch {progress.epoch})")
        agreed = meeting.agree()
        if agreed.stop or agreed.save:
            save(required=agreed.stop)
        if agreed.stop:
            raise Interrupted(
                f"{below_here(str(run.path))}: stopped by {asked() or 'a signal to another rank'};"
                f" step {progress.step} of {total_steps} is saved, and the same command goes on"
                " from there"
            )

    def write_row(table: Path, row: dict[str, Value]) -> None:
        if attempt is not None:
            attempt.check()
        append_row(table, row)

    course = Course(
        reader,
        span_loss,
        training.windows,
        job.train,
        job.seed,
        rank,
        layout,
        clock,
        health,
        lambda row: write_row(run.train_table, row),
        boundary,
    )
    if rank.is_main:
        write_json(run.deepspeed, config)
        for line in announcement(job, training, validation, parameters[-1], precision, layout):
            reporter.say(f"  {line}")
        reporter.say(f"  {span_loss.described()}")
        if job.model.freeze:
            reporter.show(terminal("Frozen layers", parameters))

    def ask_probes(epoch: int) -> None:
        if not probes:
            return
        readings = read_windows(
            reader, probe_windows, probes, job.score, rank, unanswerable=job.data.unanswerable
        )
        if readings is not None:
            memory.probe_rows.extend(rows := probe_table(epoch, readings, job.probe))
            for row in rows:
                write_row(run.probe_table, row)

    watch.at("loading the checkpoint", bounded=False)
    kept: Kept | None = None
    with clock("loading"):
        found = checkpoints.load(memory, needs_best=job.stop is not None)
        if found is not None and rank.is_main:
            kept = checkpoints.kept(memory)
    origin = record(job, rank, device, training, validation, pretrained, precision, span_loss)
    if found is None:
        if rank.is_main:
            write_json(run.provenance, origin)
        with clock("probes"):
            ask_probes(0)
    else:
        reporter.say(f"  goes on after step {progress.step} of {total_steps} ({found.name})")
        if rank.is_main:
            for field in differing_fields(read_record(run.provenance), origin):
                reporter.say(f"  other than at the beginning, so bits may differ: {field}")
    while not progress.over:
        if progress.scored:
            progress.next_epoch()
        epoch, last = progress.epoch, progress.epoch == job.train.epochs
        with (
            clock("training"),
            reporter.steps(
                f"epoch {epoch}/{job.train.epochs}", progress.steps_per_epoch, job.train.log_every
            ) as follow,
        ):
            train_epoch(course, progress, follow)
        if epoch % job.train.eval_every and not last:
            save(required=False)
            progress.next_epoch()
            continue
        with clock("evaluation"):
            readings = read_windows(
                reader,
                validation.windows,
                validation.dataset.examples,
                job.score,
                rank,
                unanswerable=job.data.unanswerable,
                step=lambda done, note="": boundary(),
            )
        watch.at(f"scoring after epoch {epoch}", bounded=False)
        with clock("probes"):
            ask_probes(epoch)
        scores = verdict = None
        if readings is not None:
            scores = evaluate(
                readings, validation.dataset.examples, unanswerable=job.data.unanswerable
            )
            verdict = memory.stopper.judge(scores)
            write_row(run.eval_table, eval_row(epoch, progress.step, progress.totals, scores))
            draw_curves(run, job.name)
            reporter.show(terminal("", epoch_rows(run)))
        verdict = share(verdict)
        progress.scored, progress.over = True, verdict.stop or last
        if verdict.keep:
            state = gathered_state(engine, job.zero.stage)
            logits = own_logits(reader, validation.windows)
            if scores is not None:
                kept = Kept(epoch, progress.step, scores, logits)

            def write_best(stage: Stage, kept: Kept | None = kept, state: Any = state) -> None:
                if kept is None:
                    raise AssertionError("rank 0 has scored the model")
                hashes = data_hashes(training, validation)
                # A card is made to be published: on whose cluster it ran is not for it.
                public = job.model_copy(update={"slurm": None})
                card = model_card(job, headline(kept.scores), hashes, dump_job(public))
                write_kept(stage.folder / BEST, kept, engine.module, state, tokenizer, card)

            save(write_best, required=True)
            if rank.is_main:
                publish_model(checkpoints.best_folder(memory) / MODEL, run.model)
        else:
            save(required=progress.over)
        if verdict.stop and job.stop is not None:
            reporter.say(
                f"{job.stop.metric} has stopped improving: training ends early, after epoch {epoch}"
            )

    watch.at("the last checks", bounded=False)
    peaks = gather(peak_memory(device))

    def conclude() -> str | None:
        if kept is None or peaks is None:
            raise AssertionError("the last epoch is always evaluated, on rank 0")
        publish_model(checkpoints.best_folder(memory) / MODEL, run.model)
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
            "peak_memory_bytes": peaks,
        }
        if attempt is not None:
            attempt.check()
        finish(job, run, reporter, kept, validation, memory.probe_rows, result)
        return missed_expectation(job.expect, result["metrics"])

    missed = share(main_only(rank, conclude))
    if missed:
        raise ExpectationError(f"{run.path}: the run finished, but {missed}")


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


def identity(
    job: Job,
    rank: Rank,
    layout: Layout,
    precision: str,
    training: Questions,
    validation: Questions,
) -> dict[str, Any]:
    """What a checkpoint must share with this start to be its own."""
    return {
        "world": rank.world,
        "zero_stage": job.zero.stage,
        "layout": layout.micro_batches,
        "precision": precision,
        "train": training.dataset.sha256,
        "validation": validation.dataset.sha256,
        "windows": windows_sha256(training.windows, validation.windows),
    }


def stop_if_asked(run: RunDir) -> None:
    """End before the first step, if a signal has reached any rank. Every rank must call this."""
    reasons = [reason for reason in everyone(asked()) if reason is not None]
    if reasons:
        raise Interrupted(
            f"{below_here(str(run.path))}: stopped by {reasons[0]} before training began; nothing"
            " was lost, and the same command goes on"
        )


@contextmanager
def memory_sentences(watch: Watch) -> Iterator[None]:
    """Say in a sentence that memory ran out, and where."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "can't allocate memory" not in str(error):
            raise
        first = " ".join(str(error).split()).partition(". ")[0][:200]
        raise MachineError(
            f"out of memory at {watch.place}: {first}; lower train.micro_batch_size (the same"
            " steps in smaller passes), score.batch_size or data.max_length"
        ) from error


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory of this rank so far, in bytes: of the process, and of the GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak
