"""Which evaluation's weights are kept, when training stops early, and whether the end is what was
expected."""

from __future__ import annotations

from dataclasses import dataclass

from runner.evaluation import Evaluation
from runner.job import Expect, Stop


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


def missed_expectation(expect: Expect | None, scores: Evaluation) -> str | None:
    """Say by how much a run missed its [expect]; None where it is met or nothing is expected."""
    if expect is None:
        return None
    missed = []
    for name in ("exact_match", "f1", "span_accuracy", "loss"):
        wanted = getattr(expect, name)
        if wanted is None:
            continue
        found = scores.metric(name)
        if not abs(found - wanted) <= expect.tolerance:
            missed.append(
                f"{name} is {found:.2f}, {abs(found - wanted):.2f} from the expected {wanted:.2f} "
                f"(tolerance {expect.tolerance:g})"
            )
    return "; ".join(missed) or None
