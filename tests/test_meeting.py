"""A rank that waits for others who never come hears the signals meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runner.ranks import free_port

ROOT = Path(__file__).parents[1]
ALONE = """
from datetime import timedelta
import sys
from runner import engine, errors, signals
signals.listen({leave})
print("waiting", flush=True)
try:
    engine._meet(timedelta(minutes=10))
except errors.Interrupted as stop:
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("leave", ["signals.leave_early", "None"])
def test_a_signal_ends_the_waiting_for_a_rank_that_never_comes(leave):
    """At once in a process that runs one job; as a request in one that runs several."""
    environment = os.environ | {
        **{"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE.format(leave=leave)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "waiting\n"
    try:
        process.wait(1)  # it waits indeed
    except subprocess.TimeoutExpired:
        pass
    else:
        raise AssertionError("it did not wait")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
