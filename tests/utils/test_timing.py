"""Seconds by phase, over all starts of a run."""

from __future__ import annotations

import time
from types import SimpleNamespace

import psutil
import pytest

import runner.utils.timing
from runner.utils.signals import STARTED
from runner.utils.timing import PhaseTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock and the function that lets time pass."""
    now = {"t": 1000.0}
    made = PhaseTimer()
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
    assert 60.0 - 1e-6 <= found["total"] - before < 61.0
    clock.step_done()
    assert clock.seconds()["until_first_step"] == 5.0  # of the run's first step
    assert clock.elapsed() >= 60.0


def process(*cmdline: str, created: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(cmdline=lambda: list(cmdline), create_time=lambda: created)


@pytest.mark.parametrize(
    ("cmdline", "launches"),
    [
        (("/usr/bin/python3", "/usr/bin/deepspeed", "runner/main.py", "x.toml"), True),
        (("python", "-u", "-m", "deepspeed.launcher.launch", "main.py"), True),
        (("python3.11", "/venv/bin/spantune", "run", "x.toml"), True),
        (("python3.11", "-m", "runner", "run", "x.toml"), True),
        (("flock", "lock", "deepspeed", "runner/main.py"), False),
        (("bash", "-c", "deepspeed runner/main.py"), False),
        (("python", "-m", "pytest", "tests"), False),
        (("python",), False),
        ((), False),
    ],
)
def test_launchers_are_told_from_what_only_names_them(cmdline, launches):
    assert runner.utils.timing._launches(process(*cmdline)) is launches


def test_a_process_that_is_gone_launches_nothing():
    def gone():
        raise psutil.NoSuchProcess(1)

    assert runner.utils.timing._launches(SimpleNamespace(cmdline=gone)) is False


def test_the_first_step_is_told_once_with_what_came_before(monkeypatch):
    class Mine:
        def create_time(self):
            return psutil.Process().create_time()

        def parents(self):
            born = self.create_time()
            launcher = ("python", "-m", "deepspeed.launcher.launch")
            runner = ("python", "/bin/deepspeed", "main.py")
            return [process(*launcher, created=born - 2), process(*runner, created=born - 5)]

    stub = SimpleNamespace(Process=Mine, Error=psutil.Error)
    real = psutil.Process
    monkeypatch.setattr(runner.utils.timing, "psutil", stub)
    Mine.create_time = lambda self: real().create_time()
    times = PhaseTimer()
    with times("data"):
        pass
    assert times.step_done()
    assert not times.step_done()
    line = times.first_step()
    assert line.startswith("first step after ")
    assert "s: launcher 5.0, start " in line
    assert "data 0.0" in line
    for name in ("one", "two", "three", "four"):
        with times(name):
            time.sleep(0.01)
    assert len(times.first_step().split(",")) == 4, "a line of a terminal holds no more"
    seconds = times.seconds()
    assert seconds["total"] >= seconds["until_first_step"] >= seconds["start"] > 0
    waited = float(line.split()[3])
    assert waited == pytest.approx(5 + seconds["until_first_step"], abs=0.1)


def test_what_the_launcher_did_before_is_no_start_up_of_this_run(monkeypatch):
    monkeypatch.setenv(STARTED, repr(psutil.Process().create_time() - 2))
    times = PhaseTimer()
    assert times.step_done()
    assert "launcher 2.0, start " in times.first_step()
    monkeypatch.setenv(STARTED, repr(psutil.Process().create_time() + 100))  # a clock was set
    assert "launcher 0.0" in PhaseTimer().first_step()
