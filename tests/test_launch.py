"""How deepspeed's launcher is started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.launch import MAIN, launch


@pytest.fixture
def started(monkeypatch):
    """What was started, and the exit code that it is to have."""
    seen = SimpleNamespace(code=0)

    def run(command, *, env, check):
        seen.command, seen.env = command, env
        assert not check
        return SimpleNamespace(returncode=seen.code)

    monkeypatch.setattr(subprocess, "run", run)
    return seen


@pytest.mark.parametrize(("ranks", "options"), [(None, []), (2, ["--num_gpus", "2"])])
def test_the_command(started, ranks, options):
    assert launch(["rank", "a job.toml", "--set", "seed=1"], ranks) == 0
    interpreter, *rest = started.command
    assert interpreter == sys.executable
    port = rest.pop(rest.index("--master_port") + 1)
    expected = ["-m", "deepspeed.launcher.runner", "--master_port", *options, str(MAIN)]
    assert rest == [*expected, "rank", "a job.toml", "--set", "seed=1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(port)))


def test_ranks_run_under_this_interpreter(started, monkeypatch):
    monkeypatch.setenv("PATH", "/somewhere")
    monkeypatch.setenv("A_SETTING", "kept")
    launch(["rank", "job.toml"], None)
    folder = str(Path(sys.executable).parent)
    assert started.env["PATH"].split(os.pathsep) == [folder, "/somewhere"]
    assert started.env["A_SETTING"] == "kept"


@pytest.mark.parametrize(
    ("code", "expected"), [(0, 0), (65, 65), (247, 247), (-9, 137), (-15, 143)]
)
def test_the_exit_code_is_the_launchers(started, code, expected):
    started.code = code
    assert launch(["rank", "job.toml"], None) == expected


def test_the_script_that_is_started_is_there():
    assert MAIN.is_file()
