"""Which evaluation's weights are kept, and when training stops early."""

from __future__ import annotations

from dataclasses import dataclass

from runner.eval.evaluation import Evaluation
from runner.job.schema import Stop


@dataclass(frozen=True)
class Verdict:
    """What an evaluation leads to: its weights become the exported ones; training ends."""

    keep: bool
    stop: bool


class Stopper:
    """Keeps the best evaluation by the metric of [stop]; without [stop] the newest one."""

    def __init__(self, stop: Stop | None) -> None:
        self.stop = stop
        self.best: float | None = None
        self.waited = 0

    def judge(self, scores: Evaluation) -> Verdict:
        """Decide on a new evaluation."""
        if self.stop is None:
            return Verdict(keep=True, stop=False)
        value = scores.metric(self.stop.metric)
        gain = -value if self.stop.metric == "loss" else value
        if self.best is None or gain > self.best + self.stop.min_delta:
            self.best, self.waited = gain, 0
            return Verdict(keep=True, stop=False)
        self.waited += 1
        return Verdict(keep=False, stop=self.waited > self.stop.patience)
