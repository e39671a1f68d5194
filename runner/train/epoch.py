"""One epoch of training: forward, backward, step, and a row of train.csv every few steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from runner.data.collate import epoch_batches, rank_share
from runner.data.loader import Reader, token_accuracy
from runner.data.windows import Windows
from runner.errors import DivergedError
from runner.job.layout import Layout
from runner.job.schema import Train
from runner.model.dropout import Noise
from runner.model.loss import SpanLoss
from runner.train.nan_monitor import Health
from runner.train.state import Progress, Totals
from runner.utils.console import Step
from runner.utils.ranks import Rank
from runner.utils.tables import Value
from runner.utils.timing import Clock


@dataclass(frozen=True)
class Course:
    """What stays the same from epoch to epoch.

    Attributes:
        reader: the engine and how to feed it.
        span_loss: turns what it read into the loss.
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

    reader: Reader
    span_loss: SpanLoss
    windows: Windows
    section: Train
    seed: int
    rank: Rank
    layout: Layout
    noise: Noise
    clock: Clock
    health: Health
    say: Callable[[str], None]
    write_row: Callable[[dict[str, Value]], None]
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
    course.reader.model.train()
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
    engine, windows, layout = course.reader.model, course.windows, course.layout
    shares = [
        rank_share(
            rows, course.rank.index, layout.world, layout.micro_batch_size, layout.micro_batches
        )
        for rows in batches[progress.done :]
    ]
    prepared = course.reader.ahead(windows, itertools.chain(*shares))
    began = time.monotonic()
    left = zip(batches[progress.done :], shares, strict=True)
    for done, (rows, mine) in enumerate(left, progress.done + 1):
        step = progress.step + 1
        for number, micro in enumerate(mine):
            # Dropout depends on the place in training alone, so that a resumed run repeats it.
            course.noise.restart(progress.epoch, done, number)
            course.health.begins(micro)
            read = course.reader.run(next(prepared))
            loss = course.span_loss(read)
            # DeepSpeed averages over ranks and micro-batches; weighted so, a step's gradient is the
            # mean over its windows even where a short last batch leaves ranks with unequal shares.
            engine.backward(loss * (read.counted * layout.world * layout.micro_batches / len(rows)))
            take_step(engine, step)
            if read.counted:
                right_3 = token_accuracy(read)
                progress.sums_2 += torch.stack([loss.detach() * read.counted, right_3[2]])
                progress.mine.windows += read.counted
                progress.mine.tokens += int(windows.lengths_N[micro].sum())
                progress.mine.slots += len(read.logits_T2)
                course.health.passed(step, micro, loss)
        course.health.stepped(step, rows, engine.get_global_grad_norm())
        if course.clock.step_done():
            course.say(course.clock.first_step())
        progress.done = done
        now = time.monotonic()
        progress.mine.seconds += now - began
        if done % course.section.log_every == 0 or done == len(batches):
            row = over_ranks(progress)
            course.health.look(row.loss)
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
