"""Only the ranks of one run meet; who is not of it is told whose ranks these are."""

from __future__ import annotations

import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runner.distributed.rendezvous import Ticket
from runner.utils.ranks import free_port

TICKET = Ticket("bert", "d1", "gpu1", "boot ns", 17)

# Be the second of two ranks, and say when it waits.
ALONE = """
import os
from runner import errors
from runner.distributed import rendezvous as module
from runner.utils import signals
os.environ |= {{"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "{port}"}}
signals.listen({leave})
rendezvous = module.rendezvous
def told(*arguments, **options):
    print("waiting", flush=True)
    return rendezvous(*arguments, **options)
module.rendezvous = told
code = 0
try:
    module.meet(module.ALONE, 600)
except errors.Interrupted as stop:
    code = stop.exit_code
os._exit(code)
"""
# Meet, say what became of it, and be there a while for others.
RANK = """
import os, time
from runner import errors
from runner.distributed import rendezvous as module
module._YIELD_S, module._ASK_S = {wait}, {ask}
time.sleep({late} * (rank == 0) + {behind} * rank)
try:
    ticket = module.Ticket({run!r}, {run!r}, "gpu1", "here", {launcher})
    store, index, _ = module.meet(ticket, {patience})
    os.write(1, f"{run}: rank {{index}} has met\\n".encode())
except errors.MachineError as error:
    os.write(1, f"{run}: rank {{rank}}: {{error}}\\n".encode())
    os._exit(error.exit_code)
time.sleep({stay})
os._exit(0)
"""


def ranks_of(zygote, run: str, port: int, **changed):
    options = {
        "launcher": None,
        "wait": 0,
        "late": 0,
        "behind": 0,
        "patience": 60,
        "stay": 0,
        "ask": 3,
    } | changed
    return zygote.start(ranks=2, code=RANK.format(run=run, **options), MASTER_PORT=str(port))


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


def _await_listener(port: int) -> None:
    """Wait until a process listens at a port, without knocking there."""
    deadline = time.monotonic() + 60
    while True:
        rows = [line.split() for name in ("tcp", "tcp6") for line in _sockets(name)]
        if any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows):
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _sockets(name: str) -> list[str]:
    path = Path("/proc/net") / name
    return path.read_text().splitlines()[1:] if path.exists() else []


REFUSED = (
    "127.0.0.1:{port}: the ranks of another run meet there: bert (gpu1); give this run a port of"
    " its own: deepspeed --master_port=PORT (torchrun: --master-port=PORT; others: MASTER_PORT)"
)


@pytest.mark.parametrize(
    ("late", "wait", "speaker", "behind"),
    [
        (0, 10, 0, 0),  # the second's rank 0 finds its port taken, and says so for all
        (3, 0.1, 1, 1),  # before that another rank has met the first run's rank 0
    ],
)
def test_two_runs_at_one_port_do_not_mix(zygote, late, wait, speaker, behind):
    """The second names the first, once; the first does not notice, even where a rank of the second
    has come to its rank 0 before its own."""
    port = free_port()
    other = ranks_of(zygote, "electra", port, late=late, wait=wait) if late else None
    own = ranks_of(zygote, "bert", port, stay=4, behind=behind)
    if other is None:
        _await_listener(port)
        other = ranks_of(zygote, "electra", port, wait=wait)
    codes = other.wait(60)
    assert codes[speaker] == 71, other.text() + own.text()
    assert codes[1 - speaker] in (71, -signal.SIGTERM)  # by its launcher
    assert other.text() == f"electra: rank {speaker}: {REFUSED.format(port=port)}\n"
    assert own.wait(60) == [0, 0], own.text()
    assert sorted(own.text().splitlines()) == ["bert: rank 0 has met", "bert: rank 1 has met"]


def test_a_port_of_another_program_is_said_too(zygote):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = ranks_of(zygote, "bert", port, ask=0.2)
        assert run.wait(60) == [71, -signal.SIGTERM]
    assert f"bert: rank 0: 127.0.0.1:{port}: is taken already; give this run a port" in run.text()


# Open the groups within a second or two, as if that were the time for it, and use them.
GROUPS = """
import os, time
from datetime import timedelta
import torch
import torch.distributed as dist
from runner.distributed import collectives, failures, process_group
from runner.errors import MachineError
from runner.utils.ranks import current_rank
collectives.RENDEZVOUS = process_group.RENDEZVOUS = timedelta(seconds=2)
try:
    with failures.before_rendezvous():
        {break}
        process_group.start_distributed(current_rank())
except MachineError as error:
    os.write(1, f"{error}\\n".encode())
    os._exit(error.exit_code)
time.sleep(3 * rank)
assert collectives.all_gather(rank) == [0, 1]
time.sleep(3 * rank)
dist.all_reduce(torch.ones(1))
os._exit(0)
"""


def test_ranks_that_have_met_wait_for_each_other_as_long_as_work_takes(zygote):
    codes, text = zygote.run(code=GROUPS.replace("{break}", "pass"), ranks=2)
    assert codes == [0, 0], text


@pytest.mark.parametrize("group", ["init_process_group", "new_group"])
def test_a_rank_that_is_lost_after_the_meeting_is_not_waited_for(zygote, group):
    code = GROUPS.replace("{break}", f"if rank: dist.{group} = lambda *_, **__: os._exit(0)")
    codes, text = zygote.run(code=code, ranks=2)
    assert codes == [71, 0], text
    assert "the ranks have not met: " in text


@pytest.mark.parametrize(
    ("changed", "admitted"),
    [
        ({}, True),
        ({"digest": "d2"}, False),
        ({"launcher": 18}, False),
        ({"launcher": 18, "machine": "another"}, True),  # what the number means is not known here
        ({"launcher": None}, True),
        ({"run": "x", "host": "gpu2"}, True),  # these are for who reads them
    ],
)
def test_who_belongs_to_a_run(changed, admitted):
    assert TICKET.admits(replace(TICKET, **changed)) is admitted
    assert replace(TICKET, **changed).admits(TICKET) is admitted
