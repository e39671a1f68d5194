"""What ranks exchange by: shared memory gives what messages give, and is refused where it is not
shared. Real ranks are processes of their own here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from runner.distributed.gradient_exchange import _mapped
from tests.forked import forked

WORKER = Path(__file__).parents[1] / "workers" / "exchange_ranks.py"
pytestmark = pytest.mark.xdist_group("exchange")


@pytest.fixture(scope="module")
def said(zygote) -> list[dict[str, list[str]]]:
    """What the ranks say of every exchange: its kind, a hash of the weights."""
    lines = forked(zygote, WORKER, ranks=3)
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(found) == 3
    return found


def of(said: list[dict[str, list[str]]], key: str) -> tuple[set[str], set[str]]:
    """Kinds and hashes of one exchange; as many ranks as it had."""
    found = [rank[key] for rank in said if key in rank]
    assert len(found) == int(key[0])
    return {kind for kind, _ in found}, {hashed for _, hashed in found}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 3])
def test_shared_memory_gives_what_messages_give(said, world, dtype):
    """Twenty steps of random gradients, ranks out of pace: the same weights on all ranks, to the
    bit with two of them, since there a sum of gradients has one order only."""
    kinds, by_memory = of(said, f"{world} {dtype} shared")
    assert kinds == {"shared"}
    kinds, by_messages = of(said, f"{world} {dtype} messages")
    assert kinds == {"messages"}
    assert len(by_memory) == len(by_messages) == 1
    if world == 2:
        assert by_memory == by_messages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_cannot_see_the_memory_send_messages(said, world, dtype):
    """As on two machines: one rank alone fails to map it, and none uses it."""
    kinds, hashes = of(said, f"{world} {dtype} elsewhere")
    assert kinds == {"messages"}
    assert len(hashes) == 1
    assert world != 2 or hashes == of(said, f"{world} {dtype} messages")[1]


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
