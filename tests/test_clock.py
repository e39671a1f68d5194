"""Seconds by phase, over all starts of a run."""

from __future__ import annotations

import time

import pytest

from runner.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    """A clock and the function that lets time pass."""
    now = {"t": 1000.0}
    made = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: now["t"])

    def sleep(seconds: float) -> None:
        now["t"] += seconds

    return made, sleep


def test_phases_add_up(clock):
    clock, sleep = clock
    for seconds in (1.0, 2.0):
        with clock("data"):
            sleep(seconds)
    assert clock.seconds()["data"] == 3.0


def test_an_inner_phase_counts_only_there(clock):
    clock, sleep = clock
    with clock("training"):
        sleep(5)
        with clock("saving"):
            sleep(2)
            with clock("looking"):
                sleep(1)
        sleep(3)
    found = clock.seconds()
    assert (found["training"], found["saving"], found["looking"]) == (8.0, 2.0, 1.0)


def test_a_phase_that_fails_counts(clock):
    clock, sleep = clock

    def fail() -> None:
        sleep(2)
        raise KeyError

    with pytest.raises(KeyError), clock("data"):
        fail()
    with clock("model"):
        sleep(1)
    found = clock.seconds()
    assert (found["data"], found["model"]) == (2.0, 1.0)


def test_earlier_starts_are_carried_over(clock):
    clock, sleep = clock
    with clock("training"):
        sleep(1)
    before = clock.seconds()["total"]
    clock.carry({"start": 4.0, "training": 10.0, "until_first_step": 5.0, "total": 60.0})
    found = clock.seconds()
    assert found["training"] == 11.0
    assert found["start"] >= 4.0
    assert found["until_first_step"] == 5.0
    assert 60.0 <= found["total"] - before < 61.0
    clock.step_done()
    assert clock.seconds()["until_first_step"] == 5.0  # of the run's first step
    assert clock.elapsed() >= 60.0
