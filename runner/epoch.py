"""One epoch of training: forward, backward, step, and a row of train.csv every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from runner.batches import epoch_batches, rank_share
from runner.clock import Clock
from runner.console import Step
from runner.errors import RunnerError
from runner.features import Windows
from runner.job import Train
from runner.layout import Layout
from runner.ranks import Rank
from runner.scoring import Reader, token_accuracy
from runner.span_loss import SpanLoss
from runner.tables import Value


@dataclass
class Totals:
    """Sums over windows, all ranks together.

    Attributes:
        loss: nats, summed over windows.
        right: windows whose likeliest start and end are both right.
        windows: how many.
        tokens: real tokens in them.
        slots: tokens computed, padding included.
        seconds: wall time.
    """

    loss: float = 0.0
    right: float = 0.0
    windows: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0
    seconds: float = 0.0

    def add(self, other: Totals) -> None:
        """Add another stretch of steps to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


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
        clock: told when the first step is done.
        write_row: takes each row of train.csv on rank 0.
    """

    reader: Reader
    span_loss: SpanLoss
    windows: Windows
    section: Train
    seed: int
    rank: Rank
    layout: Layout
    clock: Clock
    write_row: Callable[[dict[str, Value]], None]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch; the last may be a short one."""
        return -(-len(self.windows) // self.section.batch_size)


def train_epoch(course: Course, epoch: int, follow: Step) -> Totals:
    """Train one epoch; every rank must call this with the same arguments.

    Args:
        course: what to train, how.
        epoch: from 0.
        follow: told of each step.

    Returns:
        Totals of the epoch, the same on every rank.

    Raises:
        RunnerError: if the loss is no longer a number, naming the step.
    """
    engine, windows, layout = course.reader.model, course.windows, course.layout
    engine.train()
    batches = epoch_batches(
        windows.lengths_N,
        course.section.batch_size,
        course.seed,
        epoch,
        buckets=course.section.length_buckets,
    )
    epoch_totals, mine = Totals(), Totals()
    sums_2 = torch.zeros(2, device=course.reader.device)  # loss and right spans since the last row
    began = time.monotonic()
    for done, rows in enumerate(batches, 1):
        for micro in rank_share(
            rows, course.rank.index, layout.world, layout.micro_batch_size, layout.micro_batches
        ):
            read = course.reader.read(windows, micro)
            loss = course.span_loss(read)
            # DeepSpeed averages over ranks and micro-batches; weighted so, a step's gradient is the
            # mean over its windows even where a short last batch leaves ranks with unequal shares.
            engine.backward(loss * (read.counted * layout.world * layout.micro_batches / len(rows)))
            engine.step()
            if read.counted:
                right_3 = token_accuracy(
                    read.logits_T2, read.segments_B2, read.starts_B, read.ends_B
                )
                sums_2 += torch.stack([loss.detach() * read.counted, right_3[2]])
                mine.windows += read.counted
                mine.tokens += int(windows.lengths_N[micro].sum())
                mine.slots += len(read.logits_T2)
        course.clock.step_done()
        if done % course.section.log_every == 0 or done == len(batches):
            mine.seconds, began = time.monotonic() - began, time.monotonic()
            row = _over_ranks(mine, sums_2)
            mine = Totals()
            sums_2.zero_()
            epoch_totals.add(row)
            step = epoch * len(batches) + done
            norm = engine.get_global_grad_norm()
            norm = None if norm is None else float(norm)
            # fp16 looks for its loss scale by overflowing: an infinite norm is normal there.
            lost = not np.isfinite(norm or 0.0) and not engine.fp16_enabled()
            if lost or not np.isfinite(row.loss):
                raise RunnerError(
                    f"loss {row.loss}, gradient norm {norm} at step {step} (epoch {epoch + 1}); "
                    'lower train.learning_rate, or set model.precision = "fp32"'
                )
            if course.rank.is_main:
                course.write_row(
                    {
                        "step": step,
                        "epoch": round(epoch + done / len(batches), 6),
                        "loss_nats": row.loss / row.windows,
                        "span_accuracy_percent": 100 * row.right / row.windows,
                        "learning_rate": float(engine.get_lr()[0]),
                        "grad_norm": norm,
                        "examples_per_second": row.windows / row.seconds,
                        "tokens_per_second": row.tokens / row.seconds,
                        "padding_percent": 100 * (1 - row.tokens / row.slots),
                        "elapsed_seconds": course.clock.elapsed(),
                    }
                )
        follow(done, _note(epoch_totals))
    return epoch_totals


def _over_ranks(mine: Totals, sums_2: Tensor) -> Totals:
    """Add up the ranks' sums: the only place where the loop waits for the device."""
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
