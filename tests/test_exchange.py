"""What ranks exchange by: shared memory gives what messages give, and is refused where it is not
shared. Real ranks are processes of their own here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.exchange import _mapped
from runner.ranks import free_port

WORKER = Path(__file__).parent / "workers" / "exchange_ranks.py"


def ranks(world: int, *arguments: str) -> list[str]:
    """What each rank of the worker says."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "PYTHONPATH": str(WORKER.parents[2]),
    }
    running = [
        subprocess.Popen(
            [sys.executable, WORKER, *arguments],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * world
    return said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 3])
def test_shared_memory_gives_what_messages_give(world, dtype):
    """Twenty steps of random gradients, ranks out of pace: the same weights on all ranks, to the
    bit with two of them, since there a sum of gradients has one order only."""
    by_memory = ranks(world, dtype, "shared")
    by_messages = ranks(world, dtype, "messages")
    assert {text.split()[0] for text in by_memory} == {"shared"}
    assert {text.split()[0] for text in by_messages} == {"messages"}
    assert len({text.split()[2] for text in by_memory}) == 1
    assert len({text.split()[2] for text in by_messages}) == 1
    if world == 2:
        assert by_memory[0].split()[2] == by_messages[0].split()[2]


def test_ranks_that_cannot_see_the_memory_send_messages():
    """As on two machines: one rank alone fails to map it, and none uses it."""
    said = ranks(2, "float32", "elsewhere")
    assert {text.split()[0] for text in said} == {"messages"}
    assert said[0] == said[1]


def test_another_file_behind_the_same_number_is_not_taken(tmp_path):
    strange = tmp_path / "file"
    strange.write_bytes(b"x" * 256)
    with strange.open("r+b") as file:
        assert _mapped(os.getpid(), file.fileno(), b"x" * 16, 256) is None
    descriptor = os.memfd_create("spantune-step")
    os.ftruncate(descriptor, 256)
    try:
        assert _mapped(os.getpid(), descriptor, b"x" * 16, 256) is None  # no nonce
        assert _mapped(os.getpid(), descriptor, b"\0" * 16, 256) is not None
        assert _mapped(os.getpid(), descriptor, b"\0" * 16, 512) is None  # too short
    finally:
        os.close(descriptor)
    assert _mapped(2**22 + 1, 3, b"\0" * 16, 256) is None  # no such process
