"""What hundreds of ranks ask of one file server: the real watch of each, in a time that is made.

Every rank's watch, and its main thread at its end, is a thread, of which one runs at a time: time
passes when all of them sleep. Their files are real; each operation on them is counted.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.distributed import heartbeat, watchdog
from runner.distributed.heartbeat import RankHeartbeats
from runner.distributed.watchdog import Watchdog
from runner.errors import RunnerError, StorageError
from runner.run.attempts import AttemptRecord, entry_file
from runner.run.folder import RunDir
from runner.utils.files import write_json

TIMEOUT_S = 600.0  # as train.timeout_minutes has it, unless told otherwise
# A few ranks in the fast tier; as many as the promise is about in the other.
SIZES = [64, pytest.param(512, marks=pytest.mark.slow)]
COUNTED = {"os.listdir", "os.scandir", "os.utime", "os.rename", "os.remove", "os.link", "os.mkdir"}


class CutOff(Exception):
    """The connection to the others broke."""


class Over(SystemExit):
    """A rank's process ends."""


class World:
    """Ranks and their time.

    Attributes:
        now: seconds; files are dated by it.
        ops, kinds: operations below the run folder, by rank and by name, since they were cleared.
        codes, texts: with what each rank ended, and what it would have said.
        said: what was said.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.run, self.size, self.now = RunDir(folder), size, time.time()
        self.ops: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.codes: dict[int, int] = {}
        self.texts: dict[int, str] = {}
        self.said: list[str] = []
        self.watches: dict[int, Watchdog] = {}
        self._asleep: list[tuple[float, int, threading.Lock]] = []
        self._order, self._closed = itertools.count(), False
        self._me = threading.local()

    def sleep(self, seconds: float) -> None:
        """What `time.sleep` is here, and for a test: let time pass."""
        mine = self._queue(self.now + seconds)
        self._pass_on()
        mine.acquire()
        if self._closed:
            raise Over

    def spawn(self, rank: int, work: Callable[[], None]) -> None:
        """Let a thread of a rank begin, now."""
        mine = self._queue(self.now)

        def begin() -> None:
            self._me.rank = rank
            mine.acquire()
            try:
                if not self._closed:
                    work()
            except Over:
                pass
            finally:
                if not self._closed:
                    self._pass_on()

        threading.Thread(target=begin, daemon=True).start()

    def close(self) -> None:
        """Let all threads end."""
        self._closed = True
        for _, _, lock in self._asleep:
            lock.release()

    def count(self, kind: str, times: int = 1) -> None:
        rank = getattr(self._me, "rank", None)
        if rank is not None and not self._closed:
            self.ops[rank] += times
            self.kinds[kind] += times

    def start(self) -> None:
        """Let all ranks appear in one moment."""
        for rank in range(self.size):
            self._me.rank = rank
            beats = RankHeartbeats(self.run, 1, rank, self.size, "nonce")
            beats.register()
            self.watches[rank] = Watchdog(
                beats, rank, TIMEOUT_S, None, lambda error: isinstance(error, CutOff)
            )
        self._me.rank = None
        self.clear()

    def clear(self) -> None:
        self.ops.clear()
        self.kinds.clear()

    def fail(self, rank: int, error: Exception, after: float = 0) -> None:
        """Let a rank's main thread come upon an error, and its process end by it."""

        def main() -> None:
            self.sleep(after)
            with pytest.raises(RunnerError) as caught, self.watches[rank].explaining():
                raise error
            self.codes[rank], self.texts[rank] = caught.value.exit_code, str(caught.value)
            if caught.value.speaks:
                self.said.append(str(caught.value))

        self.spawn(rank, main)

    def exit(self, code: int) -> None:
        self.codes[self._me.rank] = code
        raise Over

    def thread(self, target: Callable[[], None], **_: Any) -> Any:
        rank = self._me.rank
        return SimpleNamespace(start=lambda: self.spawn(rank, target))

    def event(self) -> Any:
        found: list[bool] = []

        def wait(seconds: float) -> bool:
            if not found:
                self.sleep(seconds)
            return bool(found)

        return SimpleNamespace(
            wait=wait, set=lambda: found.append(True), is_set=lambda: bool(found)
        )

    def _queue(self, until: float) -> threading.Lock:
        lock = threading.Lock()
        lock.acquire()
        heapq.heappush(self._asleep, (until, next(self._order), lock))
        return lock

    def _pass_on(self) -> None:
        self.now, _, first = heapq.heappop(self._asleep)
        first.release()


counting: list[World] = []  # the world whose operations count, if there is one


def count_audited(event: str, args: tuple[Any, ...]) -> None:
    """What Python says of itself: no operation by way of `os` or `open` is missed but those that
    `worlds` wraps."""
    if not counting or (event != "open" and event not in COUNTED):
        return
    world, name = counting[0], args[0]
    if isinstance(name, str | os.PathLike) and os.fspath(name).startswith(str(world.run.path)):
        # A file that is not opened by `os.open` is read or written too.
        world.count(event, 2 if event == "open" and args[1] is not None else 1)


sys.addaudithook(count_audited)  # which can never be removed


@pytest.fixture
def worlds(tmp_path: Path, monkeypatch) -> Iterator[Callable[[int], World]]:
    """Makes a world of so many ranks."""

    def make(size: int) -> World:
        world = World(tmp_path, size)
        world.run.attempts.mkdir()
        record = replace(AttemptRecord.here(1, anew=False), nonce="nonce")
        write_json(entry_file(world.run, 1, "json"), record)
        clock = SimpleNamespace(monotonic=lambda: world.now, sleep=world.sleep)
        threads = SimpleNamespace(
            Thread=world.thread, Event=world.event, main_thread=threading.main_thread
        )
        monkeypatch.setattr(heartbeat, "time", clock)
        monkeypatch.setattr(watchdog, "time", clock)
        monkeypatch.setattr(watchdog, "threading", threads)
        monkeypatch.setattr(watchdog, "print_error", world.said.append)
        monkeypatch.setattr(os, "_exit", world.exit)
        utime = os.utime
        monkeypatch.setattr(os, "utime", lambda path: utime(path, (world.now, world.now)))
        for name in ("stat", "fstat", "pread", "fsync"):
            monkeypatch.setattr(os, name, wrapped(world, name))
        counting.append(world)
        world.start()
        return world

    yield make
    counting.pop().close()


def wrapped(world: World, name: str) -> Callable[..., Any]:
    call = getattr(os, name)

    def counted(what: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(what, int) or os.fspath(what).startswith(str(world.run.path)):
            world.count(name)
        return call(what, *rest, **options)

    return counted


def told(world: World, what: str) -> None:
    """For `pytest -rP`, and for `--server-*` of tests/bench/needs.py."""
    mean, most = sum(world.ops.values()) / world.size, max(world.ops.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(world.kinds.items()))
    sys.stdout.write(
        f"{world.size} ranks, {what}: {mean:.1f} operations a rank, at most {most}: {kinds}\n"
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [True, False], ids=["in training", "in long work"])
def test_in_peace_a_rank_asks_one_thing_in_5_s(worlds, size, steps):
    """And rank 0 a listing a second; also when they have begun to look after their neighbours."""
    world, seconds = worlds(size), 240

    def live(seconds: int) -> None:
        for _ in range(seconds):
            world.sleep(1)
            for watch in world.watches.values() if steps else ():
                watch.progress_at("step 7", bounded=False)

    for before in (0, int(TIMEOUT_S)):
        live(before)
        world.clear()
        live(seconds)
        told(world, f"{seconds} s after {before} s")
        assert world.ops.pop(0) <= seconds / 5 + seconds
        assert max(world.ops.values()) <= seconds / 5
        assert min(world.ops.values()) >= seconds / 12
        if steps:
            assert not world.kinds["os.listdir"]
    assert not world.said + list(world.codes)


def cut_off(world: World, but: Iterable[int]) -> None:
    """Within a second the connections of all ranks break but of some."""
    after = random.Random(0)
    for rank in sorted(set(range(world.size)) - set(but)):
        world.fail(rank, CutOff("closed by peer"), after.random())


DEATHS = {"one": [5], "the first": [0], "a machine": range(8, 16), "many": range(40)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dead", DEATHS)
def test_ranks_that_die_elsewhere_are_named_and_few_files_are_read(worlds, size, dead):
    world, gone = worlds(size), DEATHS[dead]
    world.sleep(30)
    world.clear()
    for rank in gone:
        world.watches[rank].close()
    cut_off(world, gone)
    world.sleep(60)
    told(world, f"{dead} dead")
    living = sorted(set(range(size)) - set(gone))
    assert world.codes == dict.fromkeys(living, 71)
    (said,) = world.said
    named = [f"rank {rank} (" in said for rank in gone]
    assert all(named[:8])
    assert not any(named[8:])
    assert said.count("rank ") == min(8, len(gone))
    assert ("and 32 more died without a word" in said) is (len(gone) == 40)
    # The lowest that lives looks twice at those that are missing, for all.
    assert world.ops.pop(living[0]) <= 50 + 6 * len(gone)
    assert max(world.ops.values()) <= 50


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("notice", [True, False])
def test_a_failure_is_known_to_all_at_little_cost(worlds, size, notice):
    """Whether their connections break or they wait for a device, and see it by their watches."""
    world = worlds(size)
    world.sleep(30)
    world.clear()
    world.fail(7, StorageError("train.csv: no space left"))
    if notice:
        cut_off(world, [7])
    world.sleep(60)
    told(world, "a failure")
    assert world.codes == dict.fromkeys(range(size), 74)
    (said,) = world.said
    assert said in ("train.csv: no space left", "rank 7: train.csv: no space left")
    assert world.ops.pop(0) <= 50 + 60  # its listings
    assert max(world.ops.values()) <= 50


def test_a_rank_that_falls_silent_is_found_by_the_one_before_it(worlds):
    """In long work, where nobody's connection tells."""
    world = worlds(64)
    world.sleep(30)
    world.watches[63].close()
    world.watches[0].close()
    world.sleep(TIMEOUT_S + 200)
    assert world.codes == dict.fromkeys(range(1, 63), 71)
    (said,) = world.said
    assert said.startswith("no progress at the start for 2 h")
    assert said.count("gives no sign of life") == 2
    assert "rank 0 (" in said
    assert "rank 63 (" in said
    assert sum(world.ops.values()) <= 64 * ((TIMEOUT_S + 230) / 5 + 50)


def test_of_many_ranks_that_hang_some_are_named(worlds, monkeypatch):
    """Where all seem to wait for each other. Their main thread is here the test's own."""
    monkeypatch.setattr(watchdog, "_WAITING", ("distributed/test_many_ranks",))
    world = worlds(64)
    for watch in world.watches.values():
        watch.progress_at("step 7", bounded=True)
    world.sleep(TIMEOUT_S + 10)
    assert world.codes == dict.fromkeys(range(64), 71)
    (said,) = world.said
    assert said.startswith("no progress at step 7 for 10 min 0 s (train.timeout_minutes): rank 0 (")
    assert said.count(" hangs in ") == 8
    assert said.endswith("; and 56 more")
