"""Seconds by phase, and what counts as the command's launcher."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from runner import clock
from runner.clock import Clock


def process(*cmdline: str, created: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(cmdline=lambda: list(cmdline), create_time=lambda: created)


@pytest.mark.parametrize(
    ("cmdline", "launches"),
    [
        (("/usr/bin/python3", "/usr/bin/deepspeed", "runner/main.py", "x.toml"), True),
        (("python", "-u", "-m", "deepspeed.launcher.launch", "main.py"), True),
        (("python3.11", "/venv/bin/spantune", "run", "x.toml"), True),
        (("flock", "lock", "deepspeed", "runner/main.py"), False),
        (("bash", "-c", "deepspeed runner/main.py"), False),
        (("python", "-m", "pytest", "tests"), False),
        (("python",), False),
        ((), False),
    ],
)
def test_launchers_are_told_from_what_only_names_them(cmdline, launches):
    assert clock._launches(process(*cmdline)) is launches


def test_a_process_that_is_gone_launches_nothing():
    def gone():
        raise psutil.NoSuchProcess(1)

    assert clock._launches(SimpleNamespace(cmdline=gone)) is False


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
    monkeypatch.setattr(clock, "psutil", stub)
    Mine.create_time = lambda self: real().create_time()
    times = Clock()
    with times("data"):
        pass
    assert times.step_done()
    assert not times.step_done()
    line = times.first_step()
    assert line.startswith("first step after ")
    assert "launcher 5.0, start " in line
    assert "data 0.0" in line
    seconds = times.seconds()
    assert seconds["total"] >= seconds["until_first_step"] >= seconds["start"] > 0
    waited = float(line.split()[3])
    assert waited == pytest.approx(5 + seconds["until_first_step"], abs=0.1)
