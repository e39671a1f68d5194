"""The training loop: `fit` is a run from its first step, or from where it was cut short, to the
end.

Below it come the parts of an epoch, in the order in which they are called. What they work with is
built in `setup`, what they remember is in `state`, what they tell goes through `run_log`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from span_kernels import warm_up
from torch import Tensor

from runner.checkpoint.best import MODEL, BestEvaluation, save_best
from runner.checkpoint.commit import Ranks, agree
from runner.checkpoint.manager import BEST, CheckpointManager
from runner.checkpoint.store import Stage
from runner.data.loader import DeviceBatch
from runner.data.splits import Split
from runner.distributed.collectives import (
    all_gather,
    broadcast,
    gather_to_main,
    is_connection_lost,
    main_first,
)
from runner.distributed.failures import before_rendezvous, explaining_oom
from runner.distributed.heartbeat import RankHeartbeats
from runner.distributed.preemption import StopSaveSync
from runner.distributed.process_group import start_distributed
from runner.distributed.rendezvous import Ticket
from runner.distributed.watchdog import Watchdog
from runner.errors import DataError, DivergedError, ExpectationError, Interrupted, StorageError
from runner.eval.evaluation import Evaluation, TunedThreshold, evaluate, in_use, tune
from runner.eval.inference import Predictions, dry_run, predict_windows
from runner.eval.predictions import LISTED
from runner.eval.results import settings_of_run
from runner.export.save import gathered_state, publish_model
from runner.export.verify import FreshProcess, own_logits
from runner.job.schema import Job, missed_expectation
from runner.run.folder import RunDir
from runner.run.lease import Lease
from runner.run.provenance import differing_fields, read_record
from runner.train.finish import (
    card_text,
    finish,
    peak_memory,
    provenance_record,
    resume_identity,
    verified_result,
)
from runner.train.nan_monitor import NanMonitor
from runner.train.run_log import RunLog
from runner.train.setup import Session, build_session
from runner.train.state import EarlyStopping, TrainState, compute_strictly
from runner.train.summary import latest_threshold, progress_note
from runner.utils.files import below_here, full_disk_errors, is_there, storage_errors, write_json
from runner.utils.ranks import current_rank
from runner.utils.signals import defer_stop, stop_reason
from runner.utils.timing import PhaseTimer


def train(
    job: Job, *, lease: Lease | None, threads: int | None = None, verbose: bool = False
) -> RunDir:
    """Run a job on this process's rank, from where its folder's newest checkpoint left it; every
    rank of the run calls this with the same job.

    Args:
        job: the checked job, file names absolute.
        lease: on the run folder, on rank 0; None elsewhere.
        threads: CPU threads of each rank; None shares the machine's cores among its ranks.
        verbose: whether the terminal gets all that the log does.

    Returns:
        The run folder, with `result.json` in it.

    Raises:
        RunnerError: of the kind that says what is wrong; the run folder keeps what was written
            until then. `Interrupted`, if a signal asked for an end: after everything was saved.
    """
    timer, rank = PhaseTimer(), current_rank()
    if job.train.deterministic:
        compute_strictly()
    with before_rendezvous():
        with timer("deepspeed"):
            device = start_distributed(rank, threads, Ticket.of(job), job.train.timeout_minutes)
        defer_stop()
        told = (str(lease.run.path), lease.number, lease.nonce) if lease else None
        folder, number, nonce = broadcast(told)
    run = RunDir(folder)
    heartbeats = RankHeartbeats(run, number, rank.index, rank.world, nonce)
    # Together: a rank that has no file to leave word in would seem to have died without one.
    agree(Ranks(rank.index, all_gather), heartbeats.register)
    seconds = 60 * job.train.timeout_minutes
    watchdog = Watchdog(heartbeats, rank.index, seconds, lease, is_connection_lost)
    with ExitStack() as explained:
        explained.enter_context(watchdog.explaining())
        if lease is not None:
            explained.enter_context(lease.explaining())
        for failures in (storage_errors(), full_disk_errors(), explaining_oom(watchdog)):
            explained.enter_context(failures)
        log = RunLog(job, run, rank, lease, verbose=verbose)
        timer.announce = log.phase
        session = build_session(job, run, rank, device, timer, watchdog)
        checkpoints = CheckpointManager(
            run,
            number,
            lease,
            rank,
            session.engine,
            resume_identity(session),
            partial(log.line, indent=""),
        )
        Trainer(session, log, checkpoints, watchdog, timer, lease).fit()
    watchdog.close()
    return run


class Trainer:
    """One rank's part in a run; every rank calls the same methods in the same order.

    Args:
        session: what it trains with.
        log: what it tells.
        checkpoints: what it saves to go on, and goes on from.
        watchdog: is told where this rank is, and explains what fails.
        timer: seconds by phase.
        lease: on the run folder, on rank 0.
    """

    def __init__(
        self,
        session: Session,
        log: RunLog,
        checkpoints: CheckpointManager,
        watchdog: Watchdog,
        timer: PhaseTimer,
        lease: Lease | None,
    ) -> None:
        self.session, self.log, self.checkpoints = session, log, checkpoints
        self.watchdog, self.timer = watchdog, timer
        self.job, self.run, self.rank = session.job, session.run, session.rank
        self.engine, self.sampler = session.engine, session.sampler
        self.state = TrainState(
            session.device, session.sampler.steps, EarlyStopping(session.job.stop), timer
        )
        training = session.splits.training
        self.nans = NanMonitor(
            self.rank,
            training.windows.questions_N,
            [example.id for example in training.dataset.examples],
            scaled=session.precision == "fp16",
        )
        self.preemption = StopSaveSync(self.rank, 60 * self.job.train.checkpoint_minutes)
        self.fence = lease.verify if lease else lambda: None
        self.best: BestEvaluation | None = None  # on rank 0, once there is one
        self.fresh_process: FreshProcess | None = None  # on rank 0, once training is over

    # --- the loop

    def fit(self) -> None:
        """Train, evaluate and save epoch by epoch, then finish the run."""
        self.log.begin(self.session)
        if not self.load_checkpoint():
            self.answer_probes(0)
        self.compile_kernels()
        self.dry_run_scoring()
        while not self.state.finished:
            if self.state.scored:
                self.state.next_epoch()
            self.train_epoch()
            if self.is_scored():
                tuned = self.tune_threshold()
                self.answer_probes(self.state.epoch, tuned)
                self.score_epoch(tuned)
            else:
                self.answer_probes(self.state.epoch)
                self.log.curves()
                self.save()
                self.state.next_epoch()
        self.finish()

    def train_epoch(self) -> None:
        """Train what is left of an epoch.

        Raises:
            DivergedError: if loss or gradients are no longer numbers, naming step and questions.
        """
        state, windows = self.state, self.session.splits.training.windows
        self.watchdog.progress_at(f"step {state.step + 1} (epoch {state.epoch})")
        with self.timer("training"), self.nans.naming_questions(), self.log.steps(state) as follow:
            self.engine.train()
            steps = self.sampler.epoch(state.epoch)[state.done :]
            passes = chain.from_iterable(map(self.sampler.passes, steps))
            batches = self.session.model.prefetch(windows, passes)
            for rows in steps:
                with state.counting_seconds():
                    self.train_step(rows, batches)
                if state.done % self.job.train.log_every == 0 or state.done == self.sampler.steps:
                    self.log_step()
                elif state.step == 1:
                    self.log_step()  # that something is learnt is to be seen at once
                follow(state.done, progress_note(state.totals))
                self.save_or_stop()

    def train_step(self, rows: np.ndarray, batches: Iterator[DeviceBatch]) -> None:
        """Take the optimiser step over the windows at `rows`, of all ranks."""
        state, step = self.state, self.state.step + 1
        for number, mine in enumerate(self.sampler.passes(rows)):
            # Dropout depends on the place in training alone, so that a resumed run repeats it.
            self.session.plan.dropout.reseed(state.epoch, state.done + 1, number)
            self.nans.begin_pass(mine)
            logits = self.session.model(next(batches))
            loss = self.session.span_loss(logits)
            self.engine.backward(loss * self.sampler.weight(logits.batch.counted, rows))
            take_step(self.engine, step)
            if logits.batch.counted:
                state.add(loss, logits, int(self.sampler.lengths_N[mine].sum()))
                self.nans.record(step, mine, loss)
        self.nans.record_step(step, rows, self.engine.get_global_grad_norm())
        if self.timer.step_done():
            self.log.line(self.timer.first_step(), detail=True)
        state.done += 1

    def log_step(self) -> None:
        """Add up what all ranks did since the last row: the only place where training waits for
        the device."""
        totals = self.state.reduce()
        self.nans.check_loss(totals.loss)
        self.log.step(self.state, totals, self.engine)

    def score_epoch(self, tuned: TunedThreshold | None) -> None:
        """Score the model, and save it: as the best so far if [stop] says so."""
        state, sets = self.state, self.session.splits.sets.validation
        with self.timer("evaluation"):
            place = "the scoring of the model"
            found = {name: self.predict(split, place, LISTED) for name, split in sets.items()}
        self.watchdog.progress_at(f"scoring after epoch {state.epoch}", bounded=False)
        scores = {
            name: self.evaluate(predictions, sets[name], tuned)
            for name, predictions in found.items()
            if predictions is not None  # on rank 0
        }
        decision = broadcast(state.early_stopping.judge(scores) if scores else None)
        is_last = state.epoch == self.job.train.epochs
        if self.rank.is_main and (decision.stop or is_last):
            self.fresh_process = FreshProcess()  # it imports while curves are drawn and we save
        if scores:
            self.log.evaluation(state, scores)
        state.scored, state.finished = True, decision.stop or is_last
        best = self.export_best(scores) if decision.is_best else None
        self.save(best, required=decision.is_best or state.finished)
        if best is not None and self.rank.is_main:
            self.publish()
        if decision.stop and self.job.stop is not None and not is_last:
            where = f" on {self.job.stop.on}" if self.job.stop.on else ""
            self.log.line(
                f"{self.job.stop.metric}{where} has stopped improving: training ends early, after"
                f" epoch {state.epoch}",
                indent="",
            )

    def save_or_stop(self, place: str | None = None, done: int = 0, note: str = "") -> None:
        """Save or stop, if the ranks agree: between two steps, or two batches of a scoring (which
        says how many are done)."""
        state = self.state
        self.watchdog.progress_at(place or f"step {state.step + 1} (epoch {state.epoch})")
        agreed = self.preemption.poll()
        if agreed.stop or agreed.save:
            self.save(required=agreed.stop)
        if agreed.stop:
            raise Interrupted(
                f"{below_here(str(self.run.path))}: stopped by"
                f" {stop_reason() or 'a signal to another rank'}; step {state.step} of"
                f" {self.session.total_steps} is saved, and the same command goes on from there"
            )

    def save(self, best: Callable[[Stage], None] | None = None, *, required: bool = False) -> None:
        """Commit a checkpoint; `best` writes the model that an evaluation has found the best."""
        self.watchdog.progress_at(f"saving after step {self.state.step}", bounded=False)
        with self.timer("saving"):
            self.log.write_steps()
            self.nans.check_weights(self.engine.module)
            whole = self.checkpoints.save(self.state, best, required=required)
        self.preemption.saved(whole=whole)

    # --- before it

    def load_checkpoint(self) -> bool:
        """Go on from the newest checkpoint, and note what the run is; False without any."""
        self.watchdog.progress_at("loading the checkpoint", bounded=False)
        with self.timer("loading"):
            found = self.checkpoints.load(self.state, needs_best=self.job.stop is not None)
            if found is not None and self.rank.is_main:
                self.best = self.checkpoints.load_best(self.state)
        record = provenance_record(self.session)
        if found is not None:
            self.log.resume(self.state, self.session.total_steps, found.name)
        if self.rank.is_main:
            self.note_provenance(record, begins=found is None)
        return found is not None

    def note_provenance(self, record: dict[str, Any], *, begins: bool) -> None:
        """Note where the numbers come from, or say what differs from the beginning (rank 0). It
        decides no number: a record that is damaged costs a line, never the run."""
        path = self.run.provenance
        try:
            if not begins and is_there(path):
                for field in differing_fields(read_record(path), record):
                    self.log.line(f"other than at the beginning, so bits may differ: {field}")
                return
        except DataError as error:
            self.log.line(f"{error}; it is written anew, as of now")
        except StorageError as error:
            self.log.line(f"{error}; whether anything differs from the beginning is not known")
            return
        write_json(path, record, self.fence)

    def compile_kernels(self) -> None:
        """Let Triton compile what the steps will launch on a GPU, before one waits for it."""
        self.watchdog.progress_at("compiling the kernels", bounded=False)
        head = self.session.span_loss.head
        warm_up(
            self.session.device,
            next(self.engine.module.parameters()).dtype,
            rows=self.sampler.layout.micro_batch_size,
            longest=self.session.splits.longest(),
            width=None if head is None else head.in_features,
        )

    def dry_run_scoring(self) -> None:
        """Read the longest batch of the scoring, for nothing: what does not fit fails now."""
        self.watchdog.progress_at("the longest batch of the scoring")
        splits = self.session.splits
        with self.timer("evaluation"):
            for windows in splits.windows()[1:]:  # all but those of training
                dry_run(self.session.model, windows, self.job.score)

    # --- parts of an evaluation

    def is_scored(self) -> bool:
        """Whether the model is scored after this epoch."""
        epoch, section = self.state.epoch, self.job.train
        return epoch % section.eval_every == 0 or epoch == section.epochs

    def tune_threshold(self) -> TunedThreshold | None:
        """Tune the null threshold on data.tuning; rank 0 gets what was found."""
        tuning = self.session.splits.sets.tuning
        if tuning is None:
            return None
        with self.timer("evaluation"):
            place = "the tuning of the null threshold"
            found = self.predict(tuning, place, 1)
            return None if found is None else tune(found, tuning.dataset, self.job.score)

    def answer_probes(self, epoch: int, tuned: TunedThreshold | None = None) -> None:
        """Answer the job's probes after an epoch, 0 before training."""
        splits, state = self.session.splits, self.state
        # What an earlier start has answered and saved is not answered again.
        if not splits.probes or any(row["epoch"] == epoch for row in state.probe_rows):
            return
        with self.timer("probes"):
            threshold = None if tuned is None else tuned.threshold
            if tuned is None and self.rank.is_main:
                # After an epoch that is not scored, the threshold of the last one that was.
                threshold = latest_threshold(self.run)
            found = predict_windows(
                self.session.model,
                splits.probe_windows,
                splits.probes,
                in_use(self.job.score, threshold),
                self.rank,
                unanswerable=self.job.data.unanswerable,
            )
            if found is not None:
                self.log.probes(state, epoch, found)

    def predict(self, split: Split, place: str, listed: int) -> Predictions | None:
        """Answer a data set; between two batches the ranks may save or stop."""
        return predict_windows(
            self.session.model,
            split.windows,
            split.dataset.examples,
            self.job.score,
            self.rank,
            unanswerable=self.job.data.unanswerable,
            n_listed=listed,
            step=partial(self.save_or_stop, place),
        )

    def evaluate(
        self, found: Predictions, split: Split, tuned: TunedThreshold | None
    ) -> Evaluation:
        """Score the answers to a validation set (rank 0)."""
        return evaluate(
            found,
            split.dataset.examples,
            self.job.score,
            unanswerable=self.job.data.unanswerable,
            seed=self.job.seed,
            tuned=tuned,
        )

    def export_best(self, scores: Mapping[str, Evaluation]) -> Callable[[Stage], None]:
        """Gather the weights of the best evaluation so far; returns what writes them. Every rank
        must call this: with ZeRO-3 each has a part."""
        weights = gathered_state(self.engine, self.job.zero.stage)
        logits = own_logits(self.session.model, self.session.splits.validation.windows)
        if scores:
            (_, first), *further = scores.items()
            place = self.state.epoch, self.state.step
            self.best = BestEvaluation(*place, first, logits, dict(further))
        return partial(self.write_best, weights)

    def write_best(self, weights: Mapping[str, Tensor], stage: Stage) -> None:
        """Write the best evaluation and its model into a checkpoint (rank 0)."""
        if self.best is None:
            raise AssertionError("rank 0 has scored the model")
        settings = settings_of_run(self.job, self.best.scores)
        card = card_text(self.session, self.best, settings)
        folder, tokenizer = stage.folder / BEST, self.session.tokenizer
        save_best(folder, self.best, self.engine.module, weights, tokenizer, card, settings)

    # --- after it

    def finish(self) -> None:
        """Prove the export on rank 0 and write the result.

        Raises:
            ExpectationError: if the finished run is not what [expect] says.
        """
        self.watchdog.progress_at("the last checks", bounded=False)
        peaks = gather_to_main(peak_memory(self.session.device))
        missed = broadcast(main_first(self.rank, partial(self.conclude, peaks)))
        if missed:
            raise ExpectationError(f"{self.run.path}: the run finished, but {missed}")

    def conclude(self, peaks: Sequence[dict[str, int]] | None) -> str | None:
        """Rank 0's last work; returns what [expect] misses."""
        if not self.rank.is_main:
            return None
        if self.best is None or peaks is None:
            raise AssertionError("the last epoch is always evaluated, on rank 0")
        exported = self.publish()
        fresh = self.fresh_process or FreshProcess()
        result = verified_result(self.session, self.best, exported, fresh, self.state, peaks)
        finish(self.session, self.log, self.best, self.state, result, self.fence)
        return missed_expectation(self.job.expect, result)

    def publish(self) -> Path:
        """Let `model/` be the best model so far, and return where that is kept (rank 0)."""
        exported = self.checkpoints.best_folder(self.state) / MODEL
        publish_model(exported, self.run.model, self.fence)
        return exported


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
