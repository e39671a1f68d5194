"""When training stops early, and which evaluation is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from runner.job.schema import Stop
from runner.train.state import EarlyStopping


def verdicts(stop: Stop | None, *values: float) -> list[tuple[bool, bool]]:
    """(keep, stop) of one evaluation after another, whose metric has these values."""
    stopper, asked = EarlyStopping(stop), []

    def scores(value: float) -> Any:
        return SimpleNamespace(metric=lambda name: asked.append(name) or value)

    found = [stopper.judge({"first": scores(value)}) for value in values]
    assert asked == ([] if stop is None else [stop.metric] * len(values))
    return [(verdict.is_best, verdict.stop) for verdict in found]


KEPT, WAITED, STOPPED = (True, False), (False, False), (False, True)


def test_without_stop_the_newest_is_kept_and_nothing_stops():
    assert verdicts(None, 50.0, 40.0, 30.0, 20.0) == [KEPT] * 4


@pytest.mark.parametrize("metric", ["f1", "exact_match"])
def test_more_is_better(metric):
    stop = Stop(metric=metric, patience=1)
    assert verdicts(stop, 50.0, 51.0, 49.0, 48.0) == [KEPT, KEPT, WAITED, STOPPED]


def test_of_a_loss_less_is_better():
    stop = Stop(metric="loss", patience=1)
    assert verdicts(stop, 3.0, 2.5, 2.6, 2.7) == [KEPT, KEPT, WAITED, STOPPED]


def test_a_tie_is_no_gain_and_the_first_stays_the_best():
    assert verdicts(Stop(metric="f1", patience=2), 50.0, 50.0, 50.0, 50.0) == [
        *(KEPT, WAITED, WAITED, STOPPED)
    ]


@pytest.mark.parametrize(("metric", "sign"), [("f1", 1), ("loss", -1)])
def test_a_gain_must_exceed_min_delta_over_the_best(metric, sign):
    """Small gains add up: they are held against the best, not against the one before."""
    stop = Stop(metric=metric, patience=5, min_delta=0.5)
    values = [sign * value for value in (10.0, 10.5, 10.25, 10.75, 11.0, 11.5)]
    assert verdicts(stop, *values) == [KEPT, WAITED, WAITED, KEPT, WAITED, KEPT]


def test_a_gain_starts_patience_anew():
    stop = Stop(metric="f1", patience=1)
    assert verdicts(stop, 10.0, 9.0, 11.0, 10.0, 12.0, 1.0, 1.0) == [
        *(KEPT, WAITED, KEPT, WAITED, KEPT, WAITED, STOPPED)
    ]


def test_without_patience_the_first_that_is_no_gain_stops():
    assert verdicts(Stop(metric="f1", patience=0), 10.0, 10.0) == [KEPT, STOPPED]


def test_another_set_may_decide():
    stopper = EarlyStopping(Stop(metric="f1", patience=0, on="second"))

    def scores(first: float, second: float) -> Any:
        return {
            "first": SimpleNamespace(metric=lambda _: first),
            "second": SimpleNamespace(metric=lambda _: second),
        }

    assert stopper.judge(scores(50.0, 10.0)).is_best
    verdict = stopper.judge(scores(60.0, 9.0))
    assert (verdict.is_best, verdict.stop) == STOPPED
