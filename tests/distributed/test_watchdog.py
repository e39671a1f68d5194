"""How a rank's end is explained, once, whoever is at fault."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.distributed import watchdog as module
from runner.distributed.heartbeat import ExitNote, RankHeartbeats
from runner.distributed.watchdog import Watchdog
from runner.errors import MachineError, RunnerError, StorageError
from runner.run.attempts import read_end
from runner.run.folder import RunDir

ROOT = Path(__file__).parents[2]


class CutOff(Exception):
    """The connection to the others broke."""


@pytest.fixture
def crews(tmp_path: Path) -> list[RankHeartbeats]:
    run = RunDir(tmp_path)
    run.attempts.mkdir()
    found = [RankHeartbeats(run, 1, rank, 2) for rank in range(2)]
    for crew in found:
        crew.register()
    return found


@pytest.fixture
def watch(crews, monkeypatch):
    monkeypatch.setattr(module, "SIGN_OF_LIFE_S", 0.5)
    made = Watchdog(crews[0], 0, 60.0, None, lambda error: isinstance(error, CutOff))
    yield made
    made.close()


def test_an_error_of_ones_own_is_left_for_the_others(watch, crews):
    with pytest.raises(StorageError) as caught, watch.explaining():
        raise StorageError("train.csv: no space left")
    assert caught.value.speaks is True
    assert crews[1].notes() == {0: ExitNote(74, "train.csv: no space left", waits=False)}


def test_a_mistake_of_ours_is_left_with_its_place(watch, crews):
    watch.progress_at("step 7 (epoch 1)")
    with pytest.raises(KeyError), watch.explaining():
        raise KeyError("x")
    assert crews[1].notes() == {0: ExitNote(70, "at step 7 (epoch 1): KeyError: 'x'", waits=False)}


def test_who_is_cut_off_takes_over_the_reason_and_the_code(watch, crews):
    crews[1].leave_note(ExitNote(74, "disk full", waits=False))
    with pytest.raises(RunnerError, match=r"^rank 1: disk full$") as caught, watch.explaining():
        raise CutOff("gloo says something")
    assert caught.value.exit_code == 74
    assert caught.value.speaks is True


def test_who_is_cut_off_says_nothing_if_the_other_has(watch, crews, monkeypatch):
    crews[1].leave_note(ExitNote(65, "checkpoint refused", waits=False))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert crews[1].claim_output()
    with pytest.raises(RunnerError) as caught, watch.explaining():
        raise CutOff("gloo says something")
    assert (caught.value.exit_code, caught.value.speaks) == (65, False)


def test_a_rank_without_a_word_is_named(watch):
    watch.progress_at("step 7 (epoch 1)")
    with pytest.raises(MachineError) as caught, watch.explaining():
        raise CutOff("connection closed by peer")
    assert f"process {os.getpid()}) died without a word at step 7 (epoch 1)" in str(caught.value)
    assert str(caught.value).startswith("rank 1 (")


def test_a_broken_connection_between_living_ranks_is_said(watch, crews):
    crews[1].leave_note(ExitNote(71, "cut off", waits=True))
    watch.progress_at("step 7 (epoch 1)")
    with pytest.raises(MachineError) as caught, watch.explaining():
        raise CutOff("network is unreachable")
    assert "connection between ranks broke at step 7 (epoch 1): network" in str(caught.value)


@pytest.mark.parametrize("look", ["output_is_claimed", "beat", "silence", "notes"])
def test_the_watch_outlives_a_file_that_cannot_be_read(crews, monkeypatch, look):
    def fail(*_):
        failed.append(look)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    failed: list[str] = []
    monkeypatch.setattr(crews[0], "silence", lambda _: 1.0)
    monkeypatch.setattr(crews[0], look, fail)
    given_up: list[ExitNote] = []
    monkeypatch.setattr(Watchdog, "_give_up", lambda _, note: given_up.append(note))
    made = Watchdog(crews[0], 0, 0.2, None, lambda _: False)
    deadline = time.monotonic() + 10
    while (len(failed) < 3 or not given_up) and time.monotonic() < deadline:
        time.sleep(0.02)
    made.close()
    assert len(failed) >= 3
    assert given_up


STUCK = """
import sys, time
from runner.distributed.heartbeat import RankHeartbeats
from runner.run.folder import RunDir
from runner.distributed import watchdog as watch
watch.SIGN_OF_LIFE_S = 0.5
crew = RankHeartbeats(RunDir(sys.argv[1]), 1, 0, {world})
crew.register()
w = watch.Watchdog(crew, 0, 0.5, None, lambda error: False)
{before}
def take_a_nap():
    time.sleep({nap})
watch.LONG_WORK_FACTOR = {wide}
w.progress_at("step 7 (epoch 1)", bounded={bounded})
take_a_nap()
w.close()
"""


def stuck(
    tmp_path: Path,
    *,
    nap: float,
    bounded: bool,
    world: int = 1,
    before: str = "",
    wide: float = 99,
):
    (tmp_path / "attempts").mkdir(exist_ok=True)
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(world=world, nap=nap, bounded=bounded, before=before, wide=wide))
    return subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        text=True,
        check=False,
    )


def test_a_rank_that_makes_no_progress_ends_and_says_where_it_hangs(tmp_path):
    done = stuck(tmp_path, nap=60, bounded=True)
    assert done.returncode == 71
    assert done.stderr.count("\n") == 1
    assert (
        "no progress at step 7 (epoch 1) for 0 s (train.timeout_minutes): rank 0 (" in done.stderr
    )
    assert "hangs in take_a_nap (stuck.py:" in done.stderr


def test_an_end_is_noted_before_it_is_printed_at_a_terminal_that_takes_nothing(tmp_path):
    (tmp_path / "attempts").mkdir()
    before = (
        "from runner.run.lease import Lease\n"
        "w._lease = Lease.acquire(RunDir(sys.argv[1]))\n"
        "import os\n"
        "reads, writes = os.pipe()\n"
        "os.set_blocking(writes, False)\n"
        "try:\n"
        "    while os.write(writes, b'x' * 4096):\n"
        "        pass\n"
        "except BlockingIOError:\n"
        "    os.set_blocking(writes, True)\n"
        "os.dup2(writes, 2)"
    )
    script = STUCK.format(world=1, nap=60, bounded=True, before=before, wide=99)
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        deadline, run = time.monotonic() + 30, RunDir(tmp_path)
        while (end := read_end(run, 1)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    assert end is not None
    assert end.exit_code == 71
    assert "no progress at step 7 (epoch 1) for 0 s (train.timeout_minutes): " in end.message
    assert run.log.read_text()[9:] == f"{end.message}\n"


def test_long_work_has_more_time_than_a_step(tmp_path):
    done = stuck(tmp_path, nap=1, bounded=False)  # twice the time of a step
    assert (done.returncode, done.stderr) == (0, "")


def test_long_work_that_never_ends_is_found_too(tmp_path):
    done = stuck(tmp_path, nap=60, bounded=False, wide=2)
    assert done.returncode == 71
    assert done.stderr.count("\n") == 1
    assert "no progress at step 7 (epoch 1) for 1 s (2 train.timeout_minutes): rank 0 (" in (
        done.stderr
    )
    assert "hangs in take_a_nap (stuck.py:" in done.stderr


def test_a_rank_that_gives_no_sign_of_life_is_named_even_so(tmp_path):
    # Rank 1 appears and is never heard of again; rank 0 waits for it without a bound.
    before = (
        "import dataclasses, os\n"
        "other = RankHeartbeats(RunDir(sys.argv[1]), 1, 1, 2)\n"
        "other.register()\n"
        "path = os.path.join(sys.argv[1], 'attempts', '0001.rank-0001')\n"
        "os.utime(path, (1, time.time() - 5))"
    )
    done = stuck(tmp_path, nap=60, bounded=False, world=2, before=before)
    assert done.returncode == 71
    assert "rank 1 (" in done.stderr
    assert "gives no sign of life" in done.stderr
    assert "take_a_nap" not in done.stderr


def test_a_rank_that_does_not_notice_the_end_follows_with_its_code(tmp_path):
    before = (
        "from runner.run.lease import Lease\n"
        "w._lease = Lease.acquire(RunDir(sys.argv[1]))\n"
        "other = RankHeartbeats(RunDir(sys.argv[1]), 1, 1, 2)\n"
        "other.register()\n"
        "from runner.distributed.heartbeat import ExitNote\n"
        "other.leave_note(ExitNote(76, 'the loss is nan', waits=False))\n"
        "other.claim_output(at_once=True)"
    )
    done = stuck(tmp_path, nap=60, bounded=False, world=2, before=before)
    assert (done.returncode, done.stderr) == (76, "")
    end = read_end(RunDir(tmp_path), 1)
    assert end is not None
    assert (end.exit_code, end.message) == (76, "rank 1: the loss is nan")


# All ranks of a run in one process, each step as much work for the processor as takes a part of the
# time that it may take.
AT_WORK = """
import sys, time
from runner.distributed.heartbeat import RankHeartbeats
from runner.run.folder import RunDir
from runner.distributed import watchdog as watch
watch.SIGN_OF_LIFE_S = 0.5
crew, other = (RankHeartbeats(RunDir(sys.argv[1]), 1, rank, 2) for rank in range(2))
crew.register()
other.register()
w = watch.Watchdog(crew, 0, 1.5, None, lambda error: False)
for step in range(8):
    w.progress_at("step " + str(step))
    worked = time.process_time()
    while time.process_time() < worked + 0.05:  # however busy the machine is
        pass
    other.beat()
    print(step, flush=True)
    if step == 5:
        time.sleep(60)
w.close()
"""


def test_time_in_which_all_ranks_were_suspended_is_no_hang(tmp_path):
    """Stopped for longer than a step may take, they go on; one that hangs later is found."""
    (tmp_path / "attempts").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 71, said
    assert "no progress at step 5 " in said
