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
from runner.computing import Computing, choose_computing, keep_frozen
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
from runner.evaluation import TunedThreshold, evaluate, in_use, tune
from runner.expectation import missed_expectation
from runner.export import gathered_state, own_logits, publish_model, verify_export
from runner.features import build_windows
from runner.health import Health
from runner.job import Job, Score
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
from runner.noise import Noise
from runner.plots import draw_curves
from runner.prepare import Questions, load_questions, probe_examples
from runner.progress import Memory, Progress, seed_everything
from runner.ranks import Rank, current_rank
from runner.reading import Reader
from runner.records import LISTED
from runner.report import write_report
from runner.resident import make_resident
from runner.rundir import RunDir, below_here, write_json
from runner.sameness import differing_fields, read_record
from runner.scoring import read_windows
from runner.signals import asked, hold
from runner.span_loss import SpanLoss, choose_span_loss
from runner.stopping import Stopper
from runner.store import Stage
from runner.summary import (
    announcement,
    answering_of,
    closing_lines,
    data_hashes,
    epoch_rows,
    eval_row,
    headline,
    probe_changes,
    probe_table,
    reported,
    result_scores,
    write_predictions,
)
from runner.tables import Value, append_row, terminal
from runner.tracking import Trackers, start_trackers
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
    with leaving_together():
        with clock("deepspeed"):
            device = start_distributed(rank, threads, job.train.timeout_minutes)
        hold()
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
    trackers = begin_tracking(job, run, rank, reporter)

    watch.at("reading the data", bounded=False)
    with clock("data"):
        tokenizer = main_first(rank, lambda: load_tokenizer(job.model))
        training, validation, tuning = main_first(
            rank, lambda: load_questions(job.data, job.seed, tokenizer)
        )
        probes = probe_examples(job.probe)
        probe_windows = build_windows(probes, tokenizer, job.data.max_length, job.data.stride)
        sets = [part.windows for part in (training, validation, tuning) if part is not None]
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
        computing = choose_computing(
            job.model,
            job.zero,
            pretrained.model,
            device,
            precision,
            longest=max(int(windows.lengths_N.max()) for windows in sets),
            tokens=len(training.windows.tokens_T) * job.train.epochs,
            noise=Noise(job.seed, rank.index),
        )
        groups = optimiser_groups(pretrained.model, job.train.weight_decay)
        span_loss = choose_span_loss(job.model.span_loss, pretrained.model, device, job.zero.stage)
        engine = start_engine(
            pretrained.model,
            device,
            groups,
            job.train,
            config,
            total_steps,
            computing.optimiser,
        )
    stop_if_asked(run)
    pad_id = tokenizer.pad_token_id
    reader = Reader(
        model=engine,
        device=device,
        pad_id=pad_id if isinstance(pad_id, int) else 0,
        segment_ids=takes_segment_ids(tokenizer),
        multiple=8 if device.type == "cuda" else 1,
        packing=computing.packing,
        residents=make_resident(sets, device),
    )
    with clock("frozen"):
        reader, kept_lines = keep_frozen(
            reader,
            computing.trunk,
            sets,
            job.score.batch_size,
            run.path,
            rank,
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
        identity(job, rank, layout, precision, computing, training, validation, tuning),
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

    def boundary(ahead: str | None = None) -> None:
        """Between two steps, or two batches of an evaluation: save or stop, if the ranks agree."""
        watch.at(ahead or f"step {progress.step + 1} (epoch {progress.epoch})")
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
        trackers.log(table.stem, row)

    course = Course(
        reader,
        span_loss,
        training.windows,
        job.train,
        job.seed,
        rank,
        layout,
        computing.noise,
        clock,
        health,
        lambda text: reporter.say(f"  {text}"),
        lambda row: write_row(run.train_table, row),
        boundary,
    )
    if rank.is_main:
        write_json(run.deepspeed, config)
        for line in announcement(
            job, training, validation, tuning, parameters[-1], precision, layout
        ):
            reporter.say(f"  {line}")
        for line in [span_loss.described(), *computing.described(), *kept_lines]:
            reporter.say(f"  {line}")
        if job.model.freeze:
            reporter.show(terminal("Frozen layers", parameters))

    def ask_probes(epoch: int, score: Score) -> None:
        asked_before = any(row["epoch"] == epoch for row in memory.probe_rows)
        if not probes or asked_before:  # and saved, by the attempt before this one
            return
        readings = read_windows(
            reader, probe_windows, probes, score, rank, unanswerable=job.data.unanswerable
        )
        if readings is not None:
            memory.probe_rows.extend(rows := probe_table(epoch, readings, job.probe))
            for row in rows:
                write_row(run.probe_table, row)

    def tuned_threshold() -> TunedThreshold | None:
        """Tune on data.tuning. Every rank must call this; rank 0 gets what was found."""
        if tuning is None:
            return None
        readings = read_windows(
            reader,
            tuning.windows,
            tuning.dataset.examples,
            job.score,
            rank,
            unanswerable=True,
            keep=1,
            step=lambda done, note="": boundary("the tuning of the null threshold"),
        )
        return None if readings is None else tune(readings, tuning.dataset, job.score)

    watch.at("loading the checkpoint", bounded=False)
    kept: Kept | None = None
    with clock("loading"):
        found = checkpoints.load(memory, needs_best=job.stop is not None)
        if found is not None and rank.is_main:
            kept = checkpoints.kept(memory)
    origin = record(
        job, rank, device, training, validation, tuning, pretrained, precision, span_loss
    )
    origin |= {"computing": computing.recorded()}
    if rank.is_main and (found is None or not run.provenance.exists()):
        write_json(run.provenance, origin)
    if found is None:
        with clock("probes"):
            ask_probes(0, job.score)
    else:
        reporter.say(f"  goes on after step {progress.step} of {total_steps} ({found.name})")
        if rank.is_main:
            for field in differing_fields(read_record(run.provenance), origin):
                reporter.say(f"  other than at the beginning, so bits may differ: {field}")
    while not progress.over:
        if progress.scored:
            progress.next_epoch()
        epoch, last = progress.epoch, progress.epoch == job.train.epochs
        watch.at(f"step {progress.step + 1} (epoch {epoch})")
        with (
            clock("training"),
            reporter.steps(
                f"epoch {epoch}/{job.train.epochs}", progress.steps_per_epoch, job.train.log_every
            ) as follow,
        ):
            train_epoch(course, progress, follow)
        is_scored = epoch % job.train.eval_every == 0 or last
        with clock("evaluation"):
            tuned = tuned_threshold() if is_scored else None
        with clock("probes"):
            ask_probes(epoch, in_use(job.score, tuned.threshold if tuned else None))
        if not is_scored:
            if rank.is_main:
                draw_curves(run, job.name)
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
                keep=LISTED,
                step=lambda done, note="": boundary("the scoring of the model"),
            )
        watch.at(f"scoring after epoch {epoch}", bounded=False)
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
                # A card is made to be published: on whose cluster it ran is not for it.
                public = job.model_copy(update={"slurm": None})
                scores, answering = kept.scores, answering_of(job, kept.scores)
                card = model_card(
                    job,
                    reported(scores),
                    data_hashes(training, validation, tuning),
                    dump_job(public),
                    intervals=scores.intervals,
                    asked=answering,
                )
                folder = stage.folder / BEST
                write_kept(folder, kept, engine.module, state, tokenizer, card, answering)

            save(write_best, required=True)
            if rank.is_main:
                publish_model(checkpoints.best_folder(memory) / MODEL, run.model)
        else:
            save(required=progress.over)
        if verdict.stop and job.stop is not None and not last:
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
            **result_scores(kept.scores, job.score.null_threshold, job.seed),
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
        trackers.log("result", headline(kept.scores))
        trackers.close()
        return missed_expectation(job.expect, result["metrics"])

    missed = share(main_only(rank, conclude))
    if missed:
        raise ExpectationError(f"{run.path}: the run finished, but {missed}")


def begin_tracking(job: Job, run: RunDir, rank: Rank, reporter: Reporter) -> Trackers:
    """Start the job's trackers on rank 0; elsewhere there are none."""
    if not rank.is_main:
        return Trackers((), 0, reporter.say)
    config = job.model_dump(mode="json", exclude_none=True, exclude={"probe", "track"})
    return start_trackers(job.track, run, job.name, config, lambda text: reporter.say(f"  {text}"))


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
    write_predictions(run, kept.scores, validation, unanswerable=job.data.unanswerable)
    write_report(run.path, result)
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
    tuning: Questions | None,
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
            part: {
                "source": questions.dataset.source,
                "revision": questions.dataset.revision,
                "sha256": questions.dataset.sha256,
            }
            for part, questions in (
                ("train", training),
                ("validation", validation),
                ("tuning", tuning),
            )
            if questions is not None
        },
        "model": {
            "name": job.model.name,
            "location": pretrained.location,
            "revision": pretrained.revision,
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
    computing: Computing,
    training: Questions,
    validation: Questions,
    tuning: Questions | None,
) -> dict[str, Any]:
    """What a checkpoint must share with this start to be its own."""
    return {
        "world": rank.world,
        "zero_stage": job.zero.stage,
        "layout": layout.micro_batches,
        "precision": precision,
        "computing": computing.choice(),
        "train": training.dataset.sha256,
        "validation": validation.dataset.sha256,
        "tuning": None if tuning is None else tuning.dataset.sha256,
        "windows": windows_sha256(training.windows, validation.windows),
    }


@contextmanager
def leaving_together() -> Iterator[None]:
    """Explain why ranks do not meet, before there is a folder in which they could leave word."""
    try:
        yield
    except Exception as error:
        if not is_cut_off(error):
            raise
        if asked():
            raise Interrupted(f"stopped by {asked()} before training began") from None
        first = " ".join(str(error).split())[:200]
        raise MachineError(f"the ranks have not met: {first}") from None


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
