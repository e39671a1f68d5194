"""A rank that waits for others who never come hears the signals meanwhile."""

from __future__ import annotations

import signal
import time

import pytest

from runner.utils.ranks import free_port

# Be the second of two ranks, and say when it waits.
ALONE = """
import os
from datetime import timedelta
from runner import errors
from runner.distributed import process_group as engine
from runner.utils import signals
os.environ |= {{"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "{port}"}}
signals.listen({leave})
rendezvous = engine.rendezvous
def told(*arguments, **options):
    print("waiting", flush=True)
    return rendezvous(*arguments, **options)
engine.rendezvous = told
code = 0
try:
    engine._rendezvous(timedelta(minutes=10))
except errors.Interrupted as stop:
    code = stop.exit_code
os._exit(code)
"""


@pytest.mark.parametrize("leave", ["signals.exit_early", "None"])
def test_a_signal_ends_the_waiting_for_a_rank_that_never_comes(zygote, leave):
    """At once in a process that runs one job; as a request in one that runs several."""
    run = zygote.start(code=ALONE.format(leave=leave, port=free_port()))
    deadline = time.monotonic() + 60
    while "waiting" not in run.text():
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.01)
    run.kill(0, signal.SIGTERM)
    assert run.wait(60) == [75], run.text()
