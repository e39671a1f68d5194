"""How far training has come: what must be remembered beside weights and optimiser to go on as if
nothing had happened."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runner.eval.evaluation import Evaluation
from runner.job.schema import Stop
from runner.utils.tables import CellValue
from runner.utils.timing import PhaseTimer


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


@dataclass
class Progress:
    """Where training stands between two optimiser steps.

    Attributes:
        epoch: the one that is trained, from 1.
        done: its steps that are done.
        scored: whether the model was scored after it.
        over: whether training has ended.
        totals: of the epoch as far as rows of train.csv tell, the same on every rank.
        mine: of this rank since the last row, without loss and right.
        sums_2: loss and right of this rank since the last row, on its device, float32.
        steps_per_epoch: optimiser steps of one epoch.
    """

    sums_2: Tensor
    steps_per_epoch: int
    epoch: int = 1
    done: int = 0
    scored: bool = False
    over: bool = False
    totals: Totals = field(default_factory=Totals)
    mine: Totals = field(default_factory=Totals)

    @property
    def step(self) -> int:
        """Optimiser steps that are done, over all epochs."""
        return (self.epoch - 1) * self.steps_per_epoch + self.done

    def start_row(self, written: Totals) -> None:
        """Count a row that was written into the epoch's totals, and begin the sums of the next."""
        self.totals.add(written)
        self.mine = Totals()
        self.sums_2.zero_()

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.done, self.scored = self.epoch + 1, 0, False
        self.totals, self.mine = Totals(), Totals()
        self.sums_2.zero_()

    def facts(self) -> dict[str, Any]:
        """What is alike on every rank, as JSON."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            "scored": self.scored,
            "over": self.over,
            "totals": vars(self.totals),
        }

    def own(self) -> dict[str, Any]:
        """What is this rank's own: tensors and plain values."""
        return {"mine": vars(self.mine), "sums_2": self.sums_2.cpu()}

    def restore(self, facts: dict[str, Any], own: dict[str, Any]) -> None:
        """Take back what `facts` and `own` gave."""
        self.epoch, self.done = facts["epoch"], facts["done"]
        self.scored, self.over = facts["scored"], facts["over"]
        self.totals, self.mine = Totals(**facts["totals"]), Totals(**own["mine"])
        self.sums_2.copy_(own["sums_2"])


@dataclass
class Memory:
    """All that a run remembers beside weights and optimiser.

    Attributes:
        progress: where training stands.
        stopper: what early stopping has seen.
        clock: seconds so far.
        probe_rows: rows of probes.csv.
        best: name of the checkpoint that holds the weights to be exported; None before the first
            evaluation.
    """

    progress: Progress
    stopper: EarlyStopping
    clock: PhaseTimer
    probe_rows: list[dict[str, CellValue]] = field(default_factory=list)
    best: str | None = None

    def facts(self) -> dict[str, Any]:
        """What is alike on every rank, as JSON."""
        return {
            "progress": self.progress.facts(),
            "stopper": {"best": self.stopper.best, "waited": self.stopper.waited},
            "seconds": self.clock.seconds(),
            "probe_rows": self.probe_rows,
            "best": self.best,
        }

    def restore(self, facts: dict[str, Any], own: dict[str, Any]) -> None:
        """Take back what `facts`, and `progress.own` of this rank, gave."""
        self.progress.restore(facts["progress"], own)
        self.stopper.best = facts["stopper"]["best"]
        self.stopper.waited = facts["stopper"]["waited"]
        self.clock.carry(facts["seconds"])
        self.probe_rows[:] = facts["probe_rows"]
        self.best = facts["best"]


def seed_everything(seed: int) -> None:
    """Seed every generator of this process that anything may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Let the generators go on from what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys_K, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys_K.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass(frozen=True)
class StopDecision:
    """What an evaluation leads to: its weights become the exported ones; training ends."""

    keep: bool
    stop: bool


class EarlyStopping:
    """Keeps the best evaluation by the metric of [stop]; without [stop] the newest one."""

    def __init__(self, stop: Stop | None) -> None:
        self.stop = stop
        self.best: float | None = None
        self.waited = 0

    def judge(self, scores: Evaluation) -> StopDecision:
        """Decide on a new evaluation."""
        if self.stop is None:
            return StopDecision(keep=True, stop=False)
        value = scores.metric(self.stop.metric)
        gain = -value if self.stop.metric == "loss" else value
        if self.best is None or gain > self.best + self.stop.min_delta:
            self.best, self.waited = gain, 0
            return StopDecision(keep=True, stop=False)
        self.waited += 1
        return StopDecision(keep=False, stop=self.waited > self.stop.patience)
