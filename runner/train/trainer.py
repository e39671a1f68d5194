"""A job from its first line to its last: data, model, epochs, evaluation, export, result."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from runner.checkpoint.best import MODEL, BestEvaluation, save_best
from runner.checkpoint.manager import BEST, CheckpointManager
from runner.checkpoint.store import Stage
from runner.data.sampler import epoch_batches, rank_passes
from runner.data.windows import Windows
from runner.distributed.collectives import broadcast, gather_to_main, is_connection_lost, main_first
from runner.distributed.failures import before_rendezvous, explaining_oom
from runner.distributed.heartbeat import RankHeartbeats
from runner.distributed.preemption import StopSaveSync
from runner.distributed.process_group import start_distributed
from runner.distributed.watchdog import Watchdog
from runner.errors import DivergedError, ExpectationError, Interrupted, StorageError
from runner.eval.evaluation import TunedThreshold, evaluate, in_use, tune
from runner.eval.inference import dry_run, predict_windows
from runner.eval.predictions import LISTED
from runner.eval.results import headline, reported, settings_of_run
from runner.export.model_card import model_card
from runner.export.save import gathered_state, publish_model
from runner.export.verify import own_logits
from runner.job.load import dump_job
from runner.job.schema import BatchLayout, Job, Train, missed_expectation
from runner.model.dropout import DropoutMasks
from runner.model.forward import SpanModel
from runner.model.loss import SpanLoss
from runner.report.plots import draw_curves
from runner.run.folder import RunDir
from runner.run.lease import Lease
from runner.run.provenance import differing_fields, read_record
from runner.tracking.client import Trackers, start_trackers
from runner.train.finish import finish, identity, peak_memory, record, verified_result
from runner.train.nan_monitor import NanMonitor
from runner.train.run_log import (
    INTERVAL_COLUMNS,
    data_hashes,
    epoch_rows,
    eval_row,
    latest_threshold,
    probe_table,
)
from runner.train.setup import build_session
from runner.train.state import EarlyStopping, Memory, Progress, Totals
from runner.utils.console import Reporter, Step
from runner.utils.files import below_here, write_json
from runner.utils.ranks import Rank, current_rank
from runner.utils.signals import defer_stop, stop_reason
from runner.utils.tables import CellValue, append_row, rich_table
from runner.utils.timing import PhaseTimer


def train(job: Job, *, attempt: Lease | None, threads: int | None = None) -> RunDir:
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
    clock = PhaseTimer()
    rank = current_rank()
    if job.train.deterministic:
        # cuBLAS reads this when CUDA starts; without it the strict mode below refuses its products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with before_rendezvous():
        with clock("deepspeed"):
            device = start_distributed(rank, threads, job.train.timeout_minutes)
        defer_stop()
        folder, number = broadcast((str(attempt.run.path), attempt.number) if attempt else None)
    run = RunDir(folder)
    crew = RankHeartbeats(run, number, rank.index, rank.world)
    watch = Watchdog(crew, rank.index, 60 * job.train.timeout_minutes, attempt, is_connection_lost)
    with watch.explaining(), explaining_oom(watch):
        train_watched(job, run, rank, device, number, attempt, clock, watch)
    watch.close()
    return run


def train_watched(
    job: Job,
    run: RunDir,
    rank: Rank,
    device: torch.device,
    number: int,
    attempt: Lease | None,
    clock: PhaseTimer,
    watch: Watchdog,
) -> None:
    """The job from its data to its result; `watch` is told where it is, and explains what fails."""
    reporter = Reporter(run.log, speaks=rank.is_main)
    reporter.line(f"{job.name}: {below_here(str(run.path))}")
    trackers = begin_tracking(job, run, rank, reporter)
    have = build_session(job, run, rank, device, clock, watch)
    training, validation = have.training, have.validation

    # What is remembered, how it is saved, and when.
    progress = Progress(torch.zeros(2, device=device), have.total_steps // job.train.epochs)
    memory = Memory(progress, EarlyStopping(job.stop), clock)
    checkpoints = CheckpointManager(
        run,
        number,
        attempt,
        rank,
        have.engine,
        device,
        identity(job, rank, have),
        reporter.line,
    )
    health = NanMonitor(
        rank,
        training.windows.questions_N,
        [example.id for example in training.dataset.examples],
        scaled=have.precision == "fp16",
    )
    meeting = StopSaveSync(rank, 60 * job.train.checkpoint_minutes)

    def save(best: Callable[[Stage], None] | None = None, *, required: bool) -> None:
        watch.progress_at(f"saving after step {progress.step}", bounded=False)
        with clock("saving"):
            health.check_weights(have.engine.module)
            whole = checkpoints.save(memory, best, required=required)
        meeting.saved(whole=whole)

    def boundary(ahead: str | None = None) -> None:
        """Between two steps, or two batches of an evaluation: save or stop, if the ranks agree."""
        watch.progress_at(ahead or f"step {progress.step + 1} (epoch {progress.epoch})")
        agreed = meeting.poll()
        if agreed.stop or agreed.save:
            save(required=agreed.stop)
        if agreed.stop:
            raise Interrupted(
                f"{below_here(str(run.path))}: stopped by {stop_reason() or 'a signal to another rank'};"
                f" step {progress.step} of {have.total_steps} is saved, and the same command goes"
                " on from there"
            )

    def draw() -> None:
        """The curves so far; a picture that cannot be written is drawn again later."""
        try:
            draw_curves(run, job.name)
        except StorageError as error:
            reporter.line(f"  no curves: {error}")

    def write_row(table: Path, row: dict[str, CellValue]) -> None:
        if attempt is not None:
            attempt.verify()
        append_row(table, row)
        trackers.log(table.stem, row)

    course = Course(
        have.model,
        have.span_loss,
        training.windows,
        job.train,
        job.seed,
        rank,
        have.layout,
        have.computing.noise,
        clock,
        health,
        lambda text: reporter.line(f"  {text}"),
        lambda row: write_row(run.train_table, row),
        boundary,
    )
    if rank.is_main:
        write_json(run.deepspeed, have.config)
        for line in have.described(job):
            reporter.line(f"  {line}")
        if job.model.freeze:
            reporter.table(rich_table("Frozen layers", have.parameters))

    def ask_probes(epoch: int, tuned: TunedThreshold | None) -> None:
        asked_before = any(row["epoch"] == epoch for row in memory.probe_rows)
        if not have.probes or asked_before:  # and saved, by the attempt before this one
            return
        threshold = None if tuned is None else tuned.threshold
        if tuned is None and rank.is_main:
            # An epoch that is not scored is asked at the threshold of the last one that was.
            threshold = latest_threshold(run)
        readings = predict_windows(
            have.model,
            have.probe_windows,
            have.probes,
            in_use(job.score, threshold),
            rank,
            unanswerable=job.data.unanswerable,
        )
        if readings is not None:
            memory.probe_rows.extend(rows := probe_table(epoch, readings, job.probe))
            for row in rows:
                write_row(run.probe_table, row)

    def tuned_threshold() -> TunedThreshold | None:
        """Tune on data.tuning. Every rank must call this; rank 0 gets what was found."""
        tuning = have.tuning
        if tuning is None:
            return None
        readings = predict_windows(
            have.model,
            tuning.windows,
            tuning.dataset.examples,
            job.score,
            rank,
            unanswerable=True,
            n_listed=1,
            step=lambda done, note="": boundary("the tuning of the null threshold"),
        )
        return None if readings is None else tune(readings, tuning.dataset, job.score)

    watch.progress_at("loading the checkpoint", bounded=False)
    kept: BestEvaluation | None = None
    with clock("loading"):
        found = checkpoints.load(memory, needs_best=job.stop is not None)
        if found is not None and rank.is_main:
            kept = checkpoints.kept(memory)
    origin = record(job, rank, device, have)
    if rank.is_main and (found is None or not run.provenance.exists()):
        write_json(run.provenance, origin)
    if found is None:
        with clock("probes"):
            ask_probes(0, None)
    else:
        trackers.resume(memory.probe_rows)
        reporter.line(f"  goes on after step {progress.step} of {have.total_steps} ({found.name})")
        if rank.is_main:
            for field in differing_fields(read_record(run.provenance), origin):
                reporter.line(f"  other than at the beginning, so bits may differ: {field}")
    watch.progress_at("the longest batch of the scoring")
    with clock("evaluation"):
        for part in (validation, have.tuning):
            if part is not None:
                dry_run(have.model, part.windows, job.score)
    while not progress.over:
        if progress.scored:
            progress.next_epoch()
        epoch, last = progress.epoch, progress.epoch == job.train.epochs
        watch.progress_at(f"step {progress.step + 1} (epoch {epoch})")
        with (
            clock("training"),
            health.naming_questions(),
            reporter.steps(
                f"epoch {epoch}/{job.train.epochs}", progress.steps_per_epoch, job.train.log_every
            ) as follow,
        ):
            train_epoch(course, progress, follow)
        is_scored = epoch % job.train.eval_every == 0 or last
        with clock("evaluation"):
            tuned = tuned_threshold() if is_scored else None
        with clock("probes"):
            ask_probes(epoch, tuned)
        if not is_scored:
            if rank.is_main:
                draw()
            save(required=False)
            progress.next_epoch()
            continue
        with clock("evaluation"):
            readings = predict_windows(
                have.model,
                validation.windows,
                validation.dataset.examples,
                job.score,
                rank,
                unanswerable=job.data.unanswerable,
                n_listed=LISTED,
                step=lambda done, note="": boundary("the scoring of the model"),
            )
        watch.progress_at(f"scoring after epoch {epoch}", bounded=False)
        scores = verdict = None
        if readings is not None:
            scores = evaluate(
                readings,
                validation.dataset.examples,
                job.score,
                unanswerable=job.data.unanswerable,
                seed=job.seed,
                tuned=tuned,
            )
            verdict = memory.stopper.judge(scores)
            write_row(run.eval_table, eval_row(epoch, progress.step, progress.totals, scores))
            draw()
            reporter.table(rich_table("", epoch_rows(run), right=INTERVAL_COLUMNS))
        verdict = broadcast(verdict)
        progress.scored, progress.over = True, verdict.stop or last
        if verdict.keep:
            state = gathered_state(have.engine, job.zero.stage)
            logits = own_logits(have.model, validation.windows)
            if scores is not None:
                kept = BestEvaluation(epoch, progress.step, scores, logits)

            def write_best(
                stage: Stage, kept: BestEvaluation | None = kept, state: Any = state
            ) -> None:
                if kept is None:
                    raise AssertionError("rank 0 has scored the model")
                # A card is made to be published: on whose cluster it ran is not for it.
                public = job.model_copy(update={"slurm": None})
                scores, answering = kept.scores, settings_of_run(job, kept.scores)
                card = model_card(
                    job,
                    reported(scores),
                    data_hashes(training, validation, have.tuning),
                    dump_job(public),
                    intervals=scores.intervals,
                    settings=answering,
                )
                folder = stage.folder / BEST
                save_best(folder, kept, have.engine.module, state, have.tokenizer, card, answering)

            save(write_best, required=True)
            if rank.is_main:
                publish_model(checkpoints.best_folder(memory) / MODEL, run.model)
        else:
            save(required=progress.over)
        if verdict.stop and job.stop is not None and not last:
            reporter.line(
                f"{job.stop.metric} has stopped improving: training ends early, after epoch {epoch}"
            )

    watch.progress_at("the last checks", bounded=False)
    peaks = gather_to_main(peak_memory(device))

    def conclude() -> str | None:
        if kept is None or peaks is None:
            raise AssertionError("the last epoch is always evaluated, on rank 0")
        publish_model(checkpoints.best_folder(memory) / MODEL, run.model)
        result = verified_result(job, run, kept, validation, clock, peaks)
        if attempt is not None:
            attempt.verify()
        finish(job, run, reporter, kept, validation, memory.probe_rows, result)
        trackers.log("result", headline(kept.scores))
        trackers.close()
        return missed_expectation(job.expect, result["metrics"])

    missed = broadcast(main_only(rank, conclude))
    if missed:
        raise ExpectationError(f"{run.path}: the run finished, but {missed}")


def begin_tracking(job: Job, run: RunDir, rank: Rank, reporter: Reporter) -> Trackers:
    """Start the job's trackers on rank 0; elsewhere there are none."""
    if not rank.is_main:
        return Trackers((), 0, reporter.line)
    config = job.model_dump(mode="json", exclude_none=True, exclude={"probe", "track"})
    return start_trackers(job.track, run, job.name, config, lambda text: reporter.line(f"  {text}"))


def main_only(rank: Rank, work: Any) -> Any:
    """Do `work` on rank 0 alone, None elsewhere; its failure ends every rank."""
    return main_first(rank, lambda: work() if rank.is_main else None)


@dataclass(frozen=True)
class Course:
    """What stays the same from epoch to epoch.

    Attributes:
        model: the engine and how it is fed.
        span_loss: turns its logits into the loss.
        windows: the training windows.
        section: the job's [train].
        seed: the job's seed, which decides the order.
        rank, layout: which of a step's windows are this rank's.
        noise: where dropout comes from.
        clock: told when the first step is done.
        health: told of losses and gradients.
        say: takes a line for the log on rank 0.
        write_row: takes each row of train.csv on rank 0.
        boundary: called between two steps, when all that is to be remembered is in `Progress`; it
            may save, or end training by an exception.
    """

    model: SpanModel
    span_loss: SpanLoss
    windows: Windows
    section: Train
    seed: int
    rank: Rank
    layout: BatchLayout
    noise: DropoutMasks
    clock: PhaseTimer
    health: NanMonitor
    say: Callable[[str], None]
    write_row: Callable[[dict[str, CellValue]], None]
    boundary: Callable[[], None]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch; the last may be a short one."""
        return -(-len(self.windows) // self.section.batch_size)


def train_epoch(course: Course, progress: Progress, follow: Step) -> None:
    """Train what is left of an epoch; every rank must call this with the same arguments.

    Args:
        course: what to train, how.
        progress: the epoch, and how much of it is done; it is kept up to date, and its totals at
            the end are the epoch's.
        follow: told of each step.

    Raises:
        DivergedError: if loss or gradients are no longer numbers, naming step and questions.
    """
    course.model.engine.train()
    batches = epoch_batches(
        course.windows.lengths_N,
        course.section.batch_size,
        course.seed,
        progress.epoch - 1,
        buckets=course.section.length_buckets,
    )
    train_steps(course, progress, batches, follow)


def train_steps(
    course: Course, progress: Progress, batches: Sequence[np.ndarray], follow: Step
) -> None:
    """Train what is left of an epoch, whose optimiser steps see these windows; as `train_epoch`."""
    engine, windows, layout = course.model.engine, course.windows, course.layout
    shares = [
        rank_passes(
            rows, course.rank.index, layout.world, layout.micro_batch_size, layout.micro_batches
        )
        for rows in batches[progress.done :]
    ]
    prefetched = course.model.prefetch(windows, itertools.chain(*shares))
    began = time.monotonic()
    left = zip(batches[progress.done :], shares, strict=True)
    for done, (rows, mine) in enumerate(left, progress.done + 1):
        step = progress.step + 1
        for number, micro in enumerate(mine):
            # Dropout depends on the place in training alone, so that a resumed run repeats it.
            course.noise.reseed(progress.epoch, done, number)
            course.health.begin_pass(micro)
            logits = course.model(next(prefetched))
            counted = logits.batch.counted
            loss = course.span_loss(logits)
            # DeepSpeed averages over ranks and micro-batches; weighted so, a step's gradient is the
            # mean over its windows even where a short last batch leaves ranks with unequal shares.
            engine.backward(loss * (counted * layout.world * layout.micro_batches / len(rows)))
            take_step(engine, step)
            if counted:
                right_3 = logits.accuracy()
                progress.sums_2 += torch.stack([loss.detach() * counted, right_3[2]])
                progress.mine.windows += counted
                progress.mine.tokens += int(windows.lengths_N[micro].sum())
                progress.mine.slots += len(logits.logits_T2)
                course.health.record(step, micro, loss)
        course.health.record_step(step, rows, engine.get_global_grad_norm())
        if course.clock.step_done():
            course.say(course.clock.first_step())
        progress.done = done
        now = time.monotonic()
        progress.mine.seconds += now - began
        if done % course.section.log_every == 0 or done == len(batches):
            row = over_ranks(progress)
            course.health.check_loss(row.loss)
            progress.start_row(row)
            if course.rank.is_main:
                norm = engine.get_global_grad_norm()
                course.write_row(
                    {
                        "step": step,
                        "epoch": round(progress.epoch - 1 + done / len(batches), 6),
                        "loss_nats": row.loss / row.windows,
                        "span_accuracy_percent": 100 * row.right / row.windows,
                        "learning_rate": float(engine.get_lr()[0]),
                        "grad_norm": None if norm is None else float(norm),
                        "examples_per_second": row.windows / row.seconds,
                        "tokens_per_second": row.tokens / row.seconds,
                        "padding_percent": 100 * (1 - row.tokens / row.slots),
                        "elapsed_seconds": course.clock.elapsed(),
                    }
                )
        follow(done, _note(progress.totals))
        course.boundary()
        began = time.monotonic()


def take_step(engine: Any, step: int) -> None:
    """Let the optimiser take its step, if the last micro-batch of one was read.

    Raises:
        DivergedError: if fp16 finds no scale at which the gradients are finite.
    """
    try:
        engine.step()
    except Exception as error:  # DeepSpeed has no kind of its own for it
        if "loss scale already at minimum" not in str(error):
            raise
        raise DivergedError(
            f"the gradients of step {step} overflow at every loss scale; lower train.learning_rate,"
            ' or set model.precision = "bf16" or "fp32"'
        ) from None


def over_ranks(progress: Progress) -> Totals:
    """Add up the ranks' sums since the last row: the only place where the loop waits for the
    device."""
    mine, sums_2 = progress.mine, progress.sums_2
    counts = torch.tensor([mine.windows, mine.tokens, mine.slots], device=sums_2.device)
    sums_5 = torch.cat([sums_2, counts]).double()
    if dist.get_world_size() > 1:
        dist.all_reduce(sums_5)
    loss, right, windows, tokens, slots = sums_5.tolist()
    return Totals(loss, right, windows, tokens, slots, mine.seconds)


def _note(totals: Totals) -> str:
    if not totals.windows:
        return ""
    return (
        f"loss {totals.loss / totals.windows:.3f}  {totals.windows / totals.seconds:.1f} windows/s"
    )
