"""How ranks meet: who waits for others that never come hears the signals meanwhile, and the ranks of
two runs at one port are told apart."""

from __future__ import annotations

import signal
import socket
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


# Be a rank of a run, at a port where those of another one meet too.
MEETING = """
import os, time
from datetime import timedelta
from runner import errors
from runner.distributed import failures, process_group
from runner.utils.ranks import Rank
index = {index}
os.environ |= {{"RANK": str(index), "WORLD_SIZE": "2", "MASTER_PORT": "{port}"}}
token = process_group.run_token(Rank(index, 2, index, 2), {job!r})
code = 0
print("up", flush=True)
try:
    with failures.before_rendezvous():
        process_group._rendezvous(timedelta(seconds={seconds}), token)
        print("met", index, flush=True)
        time.sleep(1)
except errors.RunnerError as error:
    code = error.exit_code
    print("rank", index, error, flush=True)
os._exit(code)
"""


def meeting(zygote, port, job, index, *, seconds=60, **variables):
    code = MEETING.format(index=index, port=port, job=job, seconds=seconds)
    return zygote.start(code=code, **variables)


@pytest.mark.parametrize("alike", ["launcher", "job"])
def test_a_rank_of_another_run_is_refused_and_the_run_goes_on(zygote, alike):
    """The stranger comes first: without a word it would be taken for the run's own rank."""
    port = free_port()
    launchers = ("7", "7") if alike == "launcher" else ("7", "8")
    ours = meeting(zygote, port, "one", 0, SPANTUNE_LAUNCHER=launchers[0])
    job = "one" if alike == "job" else "another"
    stranger = meeting(zygote, port, job, 1, SPANTUNE_LAUNCHER=launchers[1])
    assert stranger.wait(60) == [71], stranger.text()
    assert (
        f"rank 1 the ranks of another run meet at port {port} of 127.0.0.1; start this one at"
        " another port (deepspeed --master_port N" in stranger.text()
    )
    own = meeting(zygote, port, "one", 1, SPANTUNE_LAUNCHER=launchers[0])
    assert (ours.wait(60), own.wait(60)) == ([0], [0]), ours.text() + own.text()
    assert "met 0" in ours.text()
    assert "met 1" in own.text()


def test_a_port_that_is_taken_is_named(zygote):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        run = meeting(zygote, port, "one", 0)
        assert run.wait(60) == [71]
    assert f"another run, or another program, has port {port} of 127.0.0.1; start" in run.text()


def test_ranks_that_do_not_come_are_waited_for_as_long_as_a_meeting_takes(zygote):
    """A stranger has come, so that the store counts two; the run's own second rank never does."""
    port = free_port()
    ours, stranger = (meeting(zygote, port, str(n), n, seconds=4) for n in (0, 1))
    assert ours.wait(30) == [71], ours.text()
    assert "the ranks have not met: " in ours.text()
    assert stranger.wait(30) == [71]
