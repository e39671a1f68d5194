"""Ranks as files: signs of life, last words, and whose fault it was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.distributed import heartbeat as module
from runner.distributed.heartbeat import ExitNote, RankHeartbeats, RankRecord, RollCall, diagnose
from runner.errors import StorageError
from runner.run.folder import RunDir

ROOT = Path(__file__).parents[2]
OTHER = """
import sys, time
from runner.distributed.heartbeat import RankHeartbeats
from runner.run.folder import RunDir
RankHeartbeats(RunDir(sys.argv[1]), 1, int(sys.argv[2]), 3).register()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def crews(tmp_path: Path) -> list[RankHeartbeats]:
    """Three ranks, all of them this process."""
    run = RunDir(tmp_path)
    run.attempts.mkdir()
    found = [RankHeartbeats(run, 1, rank, 3) for rank in range(3)]
    for crew in found:
        crew.register()
    return found


@pytest.fixture
def other(tmp_path: Path, crews):
    """Rank 2 as a process of its own."""
    (tmp_path / "attempts" / "0001.rank-0002").unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path), "2"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_a_rank_says_where_it_runs(crews, tmp_path):
    member = crews[0].rank_record(1)
    assert isinstance(member, RankRecord)
    assert (member.rank, member.pid) == (1, os.getpid())
    assert not member.is_dead()
    assert crews[0].name(1) == f"rank 1 ({member.host}, process {os.getpid()})"
    stranger = RankHeartbeats(RunDir(tmp_path), 1, 3, 4)
    assert stranger.rank_record(3) is None
    assert stranger.name(3) == "rank 3"
    assert stranger.silence(3) is None


def test_a_link_in_a_ranks_place_is_not_followed(crews, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "attempts" / "0001.rank-0003").symlink_to(victim)
    with pytest.raises(StorageError, match="File exists"):
        RankHeartbeats(RunDir(tmp_path), 1, 3, 4).register()
    assert victim.read_text() == "precious"


def test_signs_of_life_are_compared_by_the_files_own_clock(crews, tmp_path):
    path = tmp_path / "attempts" / "0001.rank-0001"
    os.utime(path, (1, time.time() - 50))
    assert 45 < crews[0].silence(1) < 60
    crews[1].beat()
    assert crews[0].silence(1) < 5
    assert crews[0].silence(0) == 0


def test_last_words_are_read_by_the_others(crews):
    assert crews[0].notes() == {}
    words = ExitNote(74, 'a "full" disk\nand \u4e2d', waits=False)
    crews[1].leave_note(words)
    crews[1].leave_note(ExitNote(70, "later words do not count", waits=False))
    crews[2].leave_note(ExitNote(71, "cut off", waits=True))
    assert crews[0].notes() == {1: words, 2: ExitNote(71, "cut off", waits=True)}
    assert crews[0].rank_record(1) is not None
    assert not crews[0].rank_record(1).is_dead()


def test_long_words_are_cut(crews):
    crews[1].leave_note(ExitNote(70, "word " * 10_000, waits=False))
    assert crews[0].notes()[1].text.startswith("word word")


def test_words_need_no_more_room_on_the_disk(crews, tmp_path):
    path = tmp_path / "attempts" / "0001.rank-0001"
    size = path.stat().st_size
    crews[1].leave_note(ExitNote(74, "the disk is full" * 20, waits=False))
    assert path.stat().st_size == size


def test_a_file_that_cannot_be_written_is_no_further_failure(crews, tmp_path):
    (tmp_path / "attempts" / "0001.rank-0001").unlink()
    crews[1].leave_note(ExitNote(70, "x", waits=False))
    assert crews[0].notes() == {}


def test_one_rank_speaks(crews, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert [crew.claim_output() for crew in (crews[1], crews[0], crews[2])] == [True, False, False]


def test_rank_0_is_let_speak_first(crews, monkeypatch):
    """It speaks while the others nap, though they have begun before it."""
    found = {}

    def nap(_: float) -> None:
        if not found:
            found[0] = crews[0].claim_output()

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=nap))
    for rank in (1, 2):
        found[rank] = crews[rank].claim_output()
    assert found == {0: True, 1: False, 2: False}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have been slept: no other pass. `clock.meanwhile` happens at each nap."""
    found = SimpleNamespace(slept=0.0, meanwhile=lambda: None)

    def sleep(seconds: float) -> None:
        found.slept += seconds
        found.meanwhile()

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: found.slept))
    return found


def test_who_said_why_is_found_at_once(crews, clock):
    crews[0].leave_note(ExitNote(71, "cut off", waits=True))
    crews[2].leave_note(ExitNote(74, "disk full", waits=False))
    words, gone = diagnose(crews[0], 0, patience=30)
    assert clock.slept == 0
    assert words[2].code == 74
    assert gone == [1]  # not known yet, and not asked for


def test_words_whose_name_is_lost_are_found_in_the_file(crews, tmp_path, clock):
    """As on a disk that has no room for a new name."""
    crews[0].leave_note(ExitNote(71, "cut off", waits=True))
    crews[1].leave_note(ExitNote(71, "cut off", waits=True))
    crews[2].leave_note(ExitNote(74, "disk full", waits=False))
    (tmp_path / "attempts" / "0001.rank-0002.ends").unlink()
    words, _ = diagnose(crews[0], 0, patience=30)
    assert clock.slept == 0
    assert words[2] == ExitNote(74, "disk full", waits=False)


def test_one_listing_tells_what_became_of_all(crews, tmp_path):
    for name in ("0001.rank-x.ends", "0002.rank-0002.ends", "0001.rank-0002.tmp"):
        (tmp_path / "attempts" / name).touch()
    assert crews[0].roll_call() == RollCall({}, claimed=False)
    crews[1].leave_note(ExitNote(74, "disk full", waits=False))
    crews[0].leave_note(ExitNote(71, "cut off", waits=True))
    assert crews[1].claim_output(at_once=True)
    assert crews[2].roll_call() == RollCall({0: True, 1: False}, claimed=True)
    assert crews[2].output_is_claimed()


def test_a_dead_rank_is_found_at_once(crews, other, clock):
    crews[0].leave_note(ExitNote(71, "cut off", waits=True))
    crews[1].leave_note(ExitNote(71, "cut off", waits=True))

    def kill() -> None:
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it stays, as one not asked for

    clock.meanwhile = kill
    words, gone = diagnose(crews[0], 0, patience=30)
    assert clock.slept < 30
    assert gone == [2]
    assert all(said.waits for said in words.values())


def test_a_rank_elsewhere_that_shows_no_life_counts_as_dead(crews, monkeypatch, clock):
    monkeypatch.setattr(module, "machine_id", lambda: "another")
    crews[0].leave_note(ExitNote(71, "cut off", waits=True))
    time.sleep(0.05)  # file times are not finer than that everywhere
    clock.meanwhile = crews[1].beat
    words, gone = diagnose(crews[0], 0, patience=1.5)
    assert gone == [2]
    assert clock.slept >= 1.5
    assert set(words) == {0}
