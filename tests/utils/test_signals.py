"""Signals become a request; a launcher that is gone is noticed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.utils import signals

ROOT = Path(__file__).parents[2]
LISTENER = """
import signal, sys, time
from runner.utils import signals
signals.listen()
print("ready", flush=True)
while (reason := signals.stop_reason()) is None:
    time.sleep(0.01)
print(reason, flush=True)
{after}
"""


def listener(after: str = "", **options) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER.format(after=after)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # `nohup` hands down an ignored SIGHUP, which stays ignored, as it should.
        **{"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL), **options},
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def until_heard(process: subprocess.Popen[str]) -> None:
    """Wait until no signal is on its way to a process any more, and it sleeps again, or is dead."""
    path, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
    while True:
        status = path.read_text()
        pending = re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status)
        if re.search(r"State:\s*[SZ]", status) and not any(int(mask, 16) for mask in pending):
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_a_request(name):
    process = listener()
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{name}\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_same_signal_again_changes_nothing(name):
    # SLURM sends SIGTERM twice, and what is being saved must not be cut short.
    process = listener("sys.stdin.read()", stdin=subprocess.PIPE)
    process.send_signal(getattr(signal, name))
    assert process.stdout
    assert process.stdout.readline() == f"{name}\n"
    for _ in range(2):
        process.send_signal(getattr(signal, name))
        until_heard(process)
    assert process.communicate(timeout=60) == ("", None)
    assert process.returncode == 0


def test_a_second_interrupt_from_the_keyboard_ends_the_process():
    process = listener("time.sleep(30)")
    process.send_signal(signal.SIGINT)
    assert process.stdout
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT


def test_ignored_signals_are_heard_but_a_lost_terminal():
    # `trap '' USR2` keeps DeepSpeed's launcher alive, and is inherited; so is what nohup does.
    def ignore():
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = listener(preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    until_heard(process)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=60)[0] == "SIGUSR2\n"


def test_the_first_reason_counts():
    try:
        assert signals.stop_reason() is None
        signals.request_stop("SIGUSR2")
        signals.request_stop("SIGTERM")
        assert signals.stop_reason() == "SIGUSR2"
    finally:
        signals.forget_stop()
    assert signals.stop_reason() is None


CHILD = """
import sys, time
from runner.utils.signals import Launcher
above = Launcher()
assert not above.is_gone()
print("ready", flush=True)
sys.stdin.read()
began = time.monotonic()
while not above.is_gone() and time.monotonic() < began + 10:
    time.sleep(0.05)
open(sys.argv[1], "w").write(str(above.is_gone()))
"""
STARTER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize("levels", [1, 2])
def test_a_launcher_that_is_gone_is_noticed(tmp_path, levels):
    """One level: the parent; two: DeepSpeed's launch.py, whose own parent is killed."""
    answer = tmp_path / "answer"
    command = ["-c", CHILD, str(answer)]
    if levels == 2:
        # What counts is the command line: launch.py names itself in it.
        command = ["-c", STARTER + "#deepspeed.launcher.launch", *command]
    outer = subprocess.Popen(
        [sys.executable, "-c", STARTER, *command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert outer.stdout
    assert outer.stdin
    assert outer.stdout.readline() == "ready\n"
    os.kill(outer.pid, signal.SIGKILL)
    outer.wait()
    outer.stdin.close()
    deadline = time.monotonic() + 60
    while not answer.exists() or not answer.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.read_text() == "True"


# A rank that has only begun: it says how it is told to leave. Its launcher may end at once.
BEGINNER = """
import os, sys, time
from runner.utils import signals
def leave(reason):
    open(sys.argv[1] + ".new", "w").write(reason)
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    os._exit(75)
signals.listen(leave)
signals.follow_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
LATE_STARTER = """
import os, subprocess, sys, time
above = os.getppid()
print("starting", flush=True)
while os.getppid() == above: time.sleep(0.01)
subprocess.run([sys.executable, *sys.argv[1:]])
#deepspeed.launcher.launch
"""


@pytest.mark.parametrize("when", ["before the rank", "after its first line", "while it is stopped"])
def test_a_launcher_that_ends_in_the_first_seconds_ends_its_ranks(tmp_path, when):
    """Before the rank: DeepSpeed's own is killed while the program that it has started imports."""
    answer, command = tmp_path / "answer", ["-c", BEGINNER, str(tmp_path / "answer")]
    if when == "before the rank":
        command = ["-c", LATE_STARTER, *command]
    outer = subprocess.Popen(
        [sys.executable, "-c", STARTER, *command],
        cwd=ROOT,
        env={**os.environ, "CROSS_SIZE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert outer.stdout
    said = outer.stdout.readline().strip()
    if when == "while it is stopped":
        os.kill(int(said), signal.SIGSTOP)
    outer.kill()
    outer.wait()
    deadline = time.monotonic() + 30
    while not answer.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.read_text() == "the end of its launcher"


HELPER = """
import os, signal, subprocess, sys, time
from runner.utils import signals
signals.listen()
with signals.children_ignore_signals():
    done = subprocess.run(
        ["bash", "-c", "echo up >&2; read; echo done"], stdin=0, stdout=subprocess.PIPE
    )
print(done.returncode, done.stdout, signals.stop_reason(), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_helper_outlives_a_signal_to_the_whole_group(number):
    process = subprocess.Popen(
        [sys.executable, "-c", HELPER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "up\n"
    os.killpg(process.pid, number)
    out, _ = process.communicate("\n", timeout=60)
    assert out == f"0 b'done\\n' {number.name}\n"


def test_signals_are_heard_again_afterwards():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with signals.children_ignore_signals():
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
