"""Who may run in a folder: claims, signs of life, succession, and races between starts."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from runner.distributed.heartbeat import RankHeartbeats
from runner.errors import DataError, RunDirError, StorageError
from runner.run import attempts as ledger
from runner.run import lease as claim
from runner.run.attempts import (
    SILENT_S,
    attempt_numbers,
    attempts,
    attempts_without_progress,
    entry_file,
    is_alive,
    is_earlier_life,
    read_attempt,
    read_end,
    sealed,
)
from runner.run.folder import RunDir
from runner.run.lease import Lease
from runner.utils.files import write_json
from runner.utils.processes import is_stopped
from runner.utils.tables import append_row, read_rows

ROOT = Path(__file__).parents[2]
CLAIMER = """
import os, sys
from runner.run.lease import Lease
from runner.errors import RunDirError
from runner.run.folder import RunDir
print("ready", flush=True)
os.read(int(sys.argv[2]), 1)  # until its other end is closed, for all who wait at once
try:
    attempt = Lease.acquire(RunDir(sys.argv[1]))
except RunDirError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
print(attempt.number, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return RunDir(tmp_path)


def claimers(run: RunDir, count: int) -> list[subprocess.Popen[str]]:
    """Processes that claim the folder at the same moment; who has it holds it until its stdin
    ends."""
    gate, opens = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(run.path), str(gate)],
            cwd=ROOT,
            pass_fds=[gate],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    os.close(gate)
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    os.close(opens)
    return processes


def elsewhere(run: RunDir, number: int = 1, *, silent: float = 0.0, **changes) -> None:
    """Enter an attempt of another machine, `silent` seconds after its last sign of life."""
    run.attempts.mkdir(exist_ok=True)
    entry = {
        "attempt": number,
        "host": "node07",
        "pid": 4711,
        "slurm_job_id": "1234",
        "slurm_restart_count": 0,
        "started": time.time() - 3600,
        "from_step": 0,
        "machine": "another",
        "born": 0.0,
        "anew": False,
        **changes,
    }
    entry_file(run, number, "json").write_text(json.dumps(entry))
    entry_file(run, number, "alive").touch()
    for kind in ("json", "alive"):
        then = time.time() - silent
        os.utime(entry_file(run, number, kind), (then, then))


def test_a_claim_says_who_made_it(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    attempt = Lease.acquire(run)
    entry = json.loads((run.attempts / "0001.json").read_text())
    assert entry["attempt"] == attempt.number == 1
    assert (entry["host"], entry["pid"]) == (socket.gethostname(), os.getpid())
    assert (entry["slurm_job_id"], entry["slurm_restart_count"]) == ("77", 2)
    assert abs(entry["started"] - time.time()) < 60
    assert entry["from_step"] is None
    attempt.note_resumed_step(40)
    assert read_attempt(run, 1) == attempts(run)[0]
    assert json.loads((run.attempts / "0001.json").read_text())["from_step"] == 40
    attempt.step = 60
    attempt.release(75)
    end = json.loads((run.attempts / "0001.end.json").read_text())
    assert (end["exit_code"], end["step"]) == (75, 60)
    assert abs(end["ended"] - time.time()) < 60


def test_an_end_says_why_in_the_ledger_and_in_the_log(run):
    first = Lease.acquire(run)
    first.release(69, "o/n is not in the cache\nnor is m/n")
    assert read_end(run, 1).message == "o/n is not in the cache\nnor is m/n"
    said = r"\d\d:\d\d:\d\d o/n is not in the cache\n\d\d:\d\d:\d\d nor is m/n\n"
    assert re.fullmatch(said, run.log.read_text())
    second = Lease.acquire(run)
    second.release(70, "KeyError: 'x'", "Traceback ...\nKeyError: 'x\x1b'")
    assert read_end(run, 2).message == "KeyError: 'x'"
    assert [line[9:] for line in run.log.read_text().splitlines()[2:]] == [
        "Traceback ...",
        "KeyError: 'x\\x1b'",
    ]
    before = run.log.read_text()
    Lease.acquire(run).release(0)
    assert (read_end(run, 3).message, run.log.read_text()) == ("", before)


@pytest.mark.parametrize(
    "obstacle",
    [
        Path.mkdir,
        os.mkfifo,
        lambda log: log.symlink_to("/dev/full"),
        lambda log: log.symlink_to("other"),
    ],
)
def test_a_log_that_cannot_be_written_costs_nothing_else(run, obstacle):
    obstacle(run.log)
    Lease.acquire(run).release(74, "no room")
    assert (read_end(run, 1).exit_code, read_end(run, 1).message) == (74, "no room")
    assert not (run.path / "other").exists()


def test_who_does_not_hold_the_run_says_nothing_in_its_log(run):
    thawed = Lease.acquire(run)
    run.log.write_text("said\n")
    elsewhere(run, 2)
    thawed.release(73, "was taken over")
    assert read_end(run, 1).message == "was taken over"
    RankHeartbeats(run, 1, 1, 2, thawed.nonce).append_log("rank 0 died")
    assert run.log.read_text() == "said\n"
    RankHeartbeats(run, 2, 1, 2).append_log("rank 0 died")
    assert run.log.read_text().endswith(" rank 0 died\n")
    run.attempts.rename(run.path / "gone")  # and made anew
    Lease.acquire(run)
    run.log.write_text("said\n")
    RankHeartbeats(run, 1, 1, 2, thawed.nonce).append_log("rank 0 died")
    with pytest.raises(RunDirError, match="made anew by somebody else"):
        thawed.release(73, "was taken over")
    assert run.log.read_text() == "said\n"


def test_signs_of_life_are_given_until_the_end(run, monkeypatch):
    monkeypatch.setattr(claim, "LEASE_BEAT_S", 0.02)
    attempt = Lease.acquire(run)
    alive = run.attempts / "0001.alive"
    for _ in range(2):
        os.utime(alive, (0, 0))
        deadline = time.monotonic() + 10
        while alive.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert alive.stat().st_mtime > 0
    attempt.release(0)
    time.sleep(0.2)
    os.utime(alive, (0, 0))
    time.sleep(0.2)
    assert alive.stat().st_mtime == 0


def test_a_living_owner_is_named(run):
    elsewhere(run, silent=7)
    assert is_alive(run)
    with pytest.raises(RunDirError) as caught:
        Lease.acquire(run)
    assert re.fullmatch(
        rf"{re.escape(str(run.path))} is being run by node07 \(job 1234, process 4711, started"
        r" 1 h 0 min ago\), whose last sign of life is [78] s old; nothing was started",
        str(caught.value),
    )
    assert attempt_numbers(run) == [1]


@pytest.mark.parametrize("silent", [0, SILENT_S / 2, SILENT_S - 5])
def test_an_owner_on_another_machine_lives_until_it_is_silent(run, silent):
    elsewhere(run, silent=silent)
    with pytest.raises(RunDirError, match="nothing was started"):
        Lease.acquire(run)


@pytest.mark.parametrize("silent", [SILENT_S + 5, 3600, 30 * 24 * 3600])
def test_a_silent_owner_is_succeeded(run, silent):
    elsewhere(run, silent=silent)
    assert not is_alive(run)
    assert Lease.acquire(run).number == 2


@pytest.mark.parametrize("skew", [-3600, 3600])
def test_clocks_of_hosts_may_disagree(run, skew, monkeypatch):
    # Only the file system's times are compared with each other.
    elsewhere(run, silent=7)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    with pytest.raises(RunDirError, match=r"sign of life is [78] s old"):
        Lease.acquire(run)


def test_an_ended_owner_is_succeeded_at_once(run):
    first = Lease.acquire(run)
    with pytest.raises(RunDirError):
        Lease.acquire(run)
    first.release(75)
    assert Lease.acquire(run).number == 2


def test_an_owner_whose_process_is_gone_is_succeeded_at_once(run):
    [process] = claimers(run, 1)
    assert process.stdout
    assert process.stdout.readline() == "1\n"
    with pytest.raises(RunDirError):
        Lease.acquire(run)
    process.kill()
    # Not waited for: a killed process that nobody has asked for its code is dead too.
    deadline = time.monotonic() + 10
    while is_alive(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert Lease.acquire(run).number == 2
    process.wait()


def test_a_process_id_that_another_process_has_now_is_no_life(run):
    attempt = Lease.acquire(run)
    entry = json.loads((run.attempts / "0001.json").read_text())
    entry["born"] -= 100
    (run.attempts / "0001.json").write_text(json.dumps(entry))
    assert not is_alive(run)
    attempt.release(0)


def test_a_requeued_job_succeeds_its_earlier_life_at_once(run, monkeypatch):
    elsewhere(run, slurm_job_id="1234", slurm_restart_count=1)
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(RunDirError):
        Lease.acquire(run)
    monkeypatch.setenv("SLURM_JOB_ID", "1235")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(RunDirError):
        Lease.acquire(run)
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    assert is_earlier_life(attempts(run)[0])
    assert Lease.acquire(run).number == 2


def test_an_entry_that_is_just_being_written_is_a_life(run):
    run.attempts.mkdir()
    (run.attempts / "0001.json").touch()
    with pytest.raises(RunDirError, match="a start that just began"):
        Lease.acquire(run)
    os.utime(run.attempts / "0001.json", (0, 0))
    assert Lease.acquire(run).number == 2  # it was never finished


def test_who_was_succeeded_learns_it(run):
    first = Lease.acquire(run)
    first.verify()
    elsewhere(run, 2)
    with pytest.raises(RunDirError) as caught:
        first.verify()
    assert "was taken over by node07 (job 1234, process 4711" in str(caught.value)
    assert "without writing anything more" in str(caught.value)
    assert caught.value.exit_code == 73


def test_what_counts_is_settled_by_the_newest_attempt_that_could_commit(run):
    assert sealed(run) == (0, [])
    first = Lease.acquire(run)
    assert sealed(run) == (0, [])
    first.seal([])
    assert sealed(run) == (1, [])
    first.release(75)
    second = Lease.acquire(run)
    assert sealed(run) == (1, [])  # the second has not looked yet
    for name in ("0001.rank-0000", "0001.rank-0001", "0002.rank-0000"):
        (run.attempts / name).touch()
    second.seal(["step-000010-a0001"])
    assert sealed(run) == (2, ["step-000010-a0001"])
    assert [path.name for path in run.attempts.glob("*.rank-*")] == ["0002.rank-0000"]
    second.release(75)
    third = Lease.acquire(run)
    third.release(75)
    assert sealed(run) == (2, ["step-000010-a0001"])
    # Begun anew, and killed before it could settle anything: nothing of before counts.
    Lease.acquire(run, anew=True)
    assert sealed(run) == (4, [])


@pytest.mark.parametrize("damage", [None, "", "{", '{"a": 1}', "[1]"])
def test_what_counted_and_is_lost_or_damaged_is_no_beginning(run, damage):
    lease = Lease.acquire(run)
    lease.seal(["step-000010-a0001"])
    lease.note_resumed_step(10)
    lease.release(75)
    path = entry_file(run, 1, "sealed")
    path.unlink()
    if damage is not None:
        path.write_text(damage)
    with pytest.raises(DataError, match=r"0001\.sealed: is (lost|damaged: ).*--restart"):
        sealed(run)


@pytest.mark.parametrize("kind", ["json", "sealed", "end.json", ""])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_a_ledger_that_cannot_be_read_is_not_taken_for_absent(run, monkeypatch, kind, number):
    lease = Lease.acquire(run)
    lease.release(75)
    name = str(entry_file(run, 1, kind) if kind else run.attempts)

    def failing(call):
        def fail(path, *arguments, **options):
            if os.fspath(path) == name:
                raise OSError(number, os.strerror(number), path)
            return call(path, *arguments, **options)

        return fail

    for module, call in ((os, "open"), (io, "open"), (os, "stat"), (os, "listdir")):
        monkeypatch.setattr(module, call, failing(getattr(module, call)))
    ask = sealed if kind in ("json", "sealed") else Lease.acquire
    with pytest.raises(StorageError, match=re.escape(os.strerror(number))):
        ask(run)


@pytest.mark.parametrize(
    ("from_steps", "committed", "idle"),
    [
        ([], [], 0),
        ([0], [], 1),
        ([0, 0, 0], [], 3),
        ([0, None, None], [], 3),
        ([0, 0, 0], [40], 0),
        ([0, 40, 40], [40], 2),
        ([0, 40, None], [40], 2),
        ([0, 40, 40], [], 2),  # checkpoints that are gone
        ([0, 40, 40, 40], [30, 40], 3),
        ([0, 40, 40, 40], [40, 60], 0),
        ([500, "anew", 0, 0], [], 3),
    ],
)
def test_starts_without_progress_are_counted(run, from_steps, committed, idle):
    for number, step in enumerate(from_steps, 1):
        anew = step == "anew"
        elsewhere(run, number, from_step=None if anew else step, anew=anew)
    for step in committed:
        (run.checkpoints / f"step-{step:06d}-a0001").mkdir(parents=True)
    assert attempts_without_progress(run) == idle


@pytest.mark.parametrize("stale", [False, True])
def test_of_starts_at_once_exactly_one_wins(tmp_path, run, stale):
    """50 races (25 for a new folder, 25 for a dead owner's) of 2 to 8 starts on threads, and one of
    4 processes for each."""
    for number in range(25):
        folder = RunDir(tmp_path / f"{number}")
        folder.path.mkdir()
        if stale:
            elsewhere(folder, silent=3600)
        count = 2 + number % 7

        def start(_, folder=folder):
            try:
                return Lease.acquire(folder).number
            except RunDirError as error:
                return str(error)

        with ThreadPoolExecutor(count) as pool:
            outcomes = list(pool.map(start, range(count)))
        assert outcomes.count(2 if stale else 1) == 1
        refused = [text for text in outcomes if isinstance(text, str)]
        assert len(refused) == count - 1
        assert all("nothing was started" in text for text in refused)
        named = f"{socket.gethostname()} (process {os.getpid()}, started 0 s ago)"
        assert all(named in text or "that just began (0 s ago)" in text for text in refused)
        assert attempt_numbers(folder) == ([1, 2] if stale else [1])

    if stale:
        elsewhere(run, silent=3600)
    starters = claimers(run, 4)
    winner = next(p for p in starters if p.stdout and p.stdout.readline())
    losers = [p for p in starters if p is not winner]
    for process in losers:
        _, err = process.communicate(timeout=20)
        assert process.returncode == 73
        assert f"process {winner.pid}" in err or "just began" in err
        assert err.count("\n") == 1
    winner.communicate(timeout=20)
    assert winner.returncode == 0


def test_a_frozen_start_that_thaws_is_fenced(run):
    """SIGSTOP, takeover, SIGCONT: the thawed one gives signs of life again, to nobody's harm."""
    [process] = claimers(run, 1)
    assert process.stdout
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGSTOP)
    while not is_stopped(process.pid):
        time.sleep(0.01)
    try:
        while not is_stopped(process.pid):
            time.sleep(0.01)
        with pytest.raises(RunDirError):
            Lease.acquire(run)
        for kind in ("alive", "json"):
            then = time.time() - SILENT_S - 5
            os.utime(entry_file(run, 1, kind), (then, then))
        heir = Lease.acquire(run)
        assert heir.number == 2
    finally:
        process.send_signal(signal.SIGCONT)
    entry_file(run, 1, "alive").touch()
    heir.verify()
    with pytest.raises(RunDirError, match=f"process {os.getpid()}"):
        Lease.acquire(run)
    process.communicate(timeout=20)


def remade(run: RunDir, tmp_path: Path) -> Lease:
    """The folder removed and made anew, with another run's first start in it."""
    shutil.rmtree(run.path)
    run.path.mkdir()
    return Lease.acquire(run)


def test_a_folder_made_anew_is_another_runs(tmp_path, run):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    first = Lease.acquire(run)
    heir = remade(run, tmp_path)
    before = {path.name: path.read_bytes() for path in run.attempts.iterdir()}
    for act in (
        first.verify,
        lambda: first.note_resumed_step(40),
        lambda: first.seal(["step-000010-a0001"]),
        lambda: first.release(0),
        lambda: append_row(run.train_table, {"step": 1}, first.verify),
        lambda: write_json(run.result, {}, first.verify),
    ):
        with pytest.raises(RunDirError, match="was removed while this start ran, and made anew"):
            act()
    assert {path.name: path.read_bytes() for path in run.attempts.iterdir()} == before
    assert not run.result.exists()
    heir.verify()
    heir.release(0)


def test_an_empty_folder_in_its_place_is_not_ours(tmp_path, run):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    first = Lease.acquire(run)
    shutil.rmtree(run.path)
    with pytest.raises(StorageError, match="No such file"):
        first.verify()
    run.path.mkdir()
    with pytest.raises(RunDirError, match="made anew"):
        first.verify()


def test_a_ledger_that_is_removed_takes_no_run_its_folder(run):
    first = Lease.acquire(run)
    shutil.rmtree(run.attempts)
    first.verify()


def test_a_row_after_the_heir_has_the_tables_reaches_nobody(run):
    """The start is frozen between opening the table and asking whether it is its own."""
    append_row(run.train_table, {"step": 1})

    def succeeded() -> None:
        heirs = run.path / "heirs.csv"
        append_row(heirs, {"step": 1})
        heirs.replace(run.train_table)

    append_row(run.train_table, {"step": 2}, succeeded)
    assert read_rows(run.train_table) == [{"step": "1"}]


def test_a_clock_that_is_set_takes_no_living_run_over(run, monkeypatch):
    """psutil's time of a process's birth moves with the wall clock, and signs of life stay where
    they are."""
    first = Lease.acquire(run)
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 3600)
    then = time.time() - 3600
    for kind in ("alive", "json"):
        os.utime(entry_file(run, 1, kind), (then, then))
    with pytest.raises(RunDirError, match="nothing was started"):
        Lease.acquire(run)
    first.release(75)
    assert Lease.acquire(run).number == 2


def test_an_entry_of_an_earlier_version_says_when_its_process_began(run):
    Lease.acquire(run)
    entry = json.loads((run.attempts / "0001.json").read_text())
    del entry["nonce"]
    entry["born"] = psutil.Process().create_time()
    (run.attempts / "0001.json").write_text(json.dumps(entry))
    assert is_alive(run)
    entry["born"] -= 100
    (run.attempts / "0001.json").write_text(json.dumps(entry))
    assert not is_alive(run)


def test_a_sign_of_life_from_the_future_is_watched_and_not_believed(run, monkeypatch):
    monkeypatch.setattr(ledger, "SILENT_S", 0.3)
    elsewhere(run, silent=-24 * 3600)
    assert is_alive(run)  # for who only looks
    began = time.monotonic()
    assert Lease.acquire(run).number == 2
    assert time.monotonic() - began >= 0.3


def test_who_gives_another_sign_of_life_after_the_clock_was_set_back_lives(run, monkeypatch):
    monkeypatch.setattr(ledger, "SILENT_S", 20.0)
    elsewhere(run, silent=-24 * 3600)
    beat = threading.Timer(0.3, entry_file(run, 1, "alive").touch)
    beat.start()
    with pytest.raises(RunDirError, match=r"lies 24 h 0 min ahead; nothing was started"):
        Lease.acquire(run)
    beat.join()
