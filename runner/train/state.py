"""What a run remembers beside weights and optimiser, to go on as if nothing had happened."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from runner.eval.evaluation import Evaluation
from runner.job.schema import Stop
from runner.model.forward import SpanLogits
from runner.utils.tables import CellValue
from runner.utils.timing import PhaseTimer


@dataclass
class Totals:
    """Sums over windows.

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
class StopDecision:
    """What an evaluation leads to: its weights become the exported ones; training ends."""

    is_best: bool
    stop: bool


class EarlyStopping:
    """Follows the best evaluation by the metric of [stop]; without it the newest is the best."""

    def __init__(self, stop: Stop | None) -> None:
        self.stop = stop
        self.best: float | None = None
        self.waited = 0

    def judge(self, scores: Mapping[str, Evaluation]) -> StopDecision:
        """Decide on a new evaluation of each validation set."""
        if self.stop is None:
            return StopDecision(is_best=True, stop=False)
        decides = next(iter(scores)) if self.stop.on is None else self.stop.on
        value = scores[decides].metric(self.stop.metric)
        gain = -value if self.stop.metric == "loss" else value
        if self.best is None or gain > self.best + self.stop.min_delta:
            self.best, self.waited = gain, 0
            return StopDecision(is_best=True, stop=False)
        self.waited += 1
        return StopDecision(is_best=False, stop=self.waited > self.stop.patience)


@dataclass
class TrainState:
    """Where training stands between two optimiser steps, and all that it has found so far.

    Attributes:
        device: of this rank.
        steps_per_epoch: optimiser steps of one epoch; the last may be a short one.
        early_stopping: what the evaluations so far lead to.
        timer: seconds so far.
        epoch: the one that is trained, from 1.
        done: its steps that are done.
        scored: whether the model was scored after it.
        finished: whether training has ended.
        totals: of the epoch as far as rows of train.csv tell, the same on every rank.
        since_row: of this rank since the last row, without loss and right.
        sums_2: loss and right of this rank since the last row, float32 on its device.
        probe_rows: rows of probes.csv.
        best: name of the checkpoint with the weights to be exported; None before the first
            evaluation.
    """

    device: torch.device
    steps_per_epoch: int
    early_stopping: EarlyStopping
    timer: PhaseTimer
    epoch: int = 1
    done: int = 0
    scored: bool = False
    finished: bool = False
    totals: Totals = field(default_factory=Totals)
    since_row: Totals = field(default_factory=Totals)
    sums_2: Tensor = field(init=False)
    probe_rows: list[dict[str, CellValue]] = field(default_factory=list)
    best: str | None = None

    def __post_init__(self) -> None:
        self.sums_2 = torch.zeros(2, device=self.device)

    @property
    def step(self) -> int:
        """Optimiser steps that are done, over all epochs."""
        return (self.epoch - 1) * self.steps_per_epoch + self.done

    def add(self, loss: Tensor, logits: SpanLogits, tokens: int) -> None:
        """Count a forward pass over `tokens` real tokens; nothing is read from the device."""
        right_3 = logits.accuracy()
        self.sums_2 += torch.stack([loss.detach() * logits.batch.counted, right_3[2]])
        self.since_row.windows += logits.batch.counted
        self.since_row.tokens += tokens
        self.since_row.slots += len(logits.logits_T2)

    @contextmanager
    def counting_seconds(self) -> Iterator[None]:
        """Count the wall time of an optimiser step."""
        began = time.monotonic()
        yield
        self.since_row.seconds += time.monotonic() - began

    def reduce(self) -> Totals:
        """Add up all ranks' sums since the last row into the epoch's totals, and begin new ones.
        Every rank must call this; it waits for the device."""
        mine = self.since_row
        counts = torch.tensor([mine.windows, mine.tokens, mine.slots], device=self.device)
        sums_5 = torch.cat([self.sums_2, counts]).double()
        if dist.get_world_size() > 1:
            dist.all_reduce(sums_5)
        loss, right, windows, tokens, slots = sums_5.tolist()
        row = Totals(loss, right, windows, tokens, slots, mine.seconds)
        self.totals.add(row)
        self._begin_row()
        return row

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.done, self.scored = self.epoch + 1, 0, False
        self.totals = Totals()
        self._begin_row()

    def _begin_row(self) -> None:
        self.since_row = Totals()
        self.sums_2.zero_()

    # The keys below stand in every checkpoint: a new name for one refuses all open runs.

    def state_dict(self) -> dict[str, Any]:
        """What is alike on every rank, as JSON."""
        return {
            "progress": {
                "epoch": self.epoch,
                "done": self.done,
                "scored": self.scored,
                "over": self.finished,
                "totals": vars(self.totals),
            },
            "stopper": {"best": self.early_stopping.best, "waited": self.early_stopping.waited},
            "seconds": self.timer.seconds(),
            "probe_rows": self.probe_rows,
            "best": self.best,
        }

    def rank_state_dict(self) -> dict[str, Any]:
        """What is this rank's own: tensors and plain values."""
        return {
            "random": random_state(self.device),
            "progress": {"mine": vars(self.since_row), "sums_2": self.sums_2.cpu()},
        }

    def load_state_dict(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` and `rank_state_dict` gave; random numbers go on as they
        were, so nothing may draw any between this and the next step."""
        progress, mine = state["progress"], rank_state["progress"]
        self.epoch, self.done = progress["epoch"], progress["done"]
        self.scored, self.finished = progress["scored"], progress["over"]
        self.totals, self.since_row = Totals(**progress["totals"]), Totals(**mine["mine"])
        self.sums_2.copy_(mine["sums_2"])
        self.early_stopping.best = state["stopper"]["best"]
        self.early_stopping.waited = state["stopper"]["waited"]
        self.timer.carry(state["seconds"])
        self.probe_rows[:] = state["probe_rows"]
        self.best = state["best"]
        restore_random_state(rank_state["random"], self.device)


def seed_everything(seed: int) -> None:
    """Seed every generator of this process that anything may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def compute_strictly() -> None:
    """Let torch and cuBLAS compute the same bits each time, or refuse. Before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would fill each new tensor with NaN, a kernel each; nobody here reads what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of this process's generators: tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    keys_K = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys_K, position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Let the generators go on from what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys_K, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys_K.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
