"""How ranks are started, signalled and brought to an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.errors import MachineError
from runner.run import launch as module
from runner.run.launch import MAIN, launch, visible_gpus
from runner.utils.signals import LAUNCHER as LAUNCHER_VARIABLE

ROOT = Path(__file__).parents[2]
# A rank that says who it is, then does what its argument says.
RANK = """
import json, os, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
me = {name: os.environ[name] for name in names} | {"arguments": sys.argv[1:], "pid": os.getpid()}
heard = []
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, _: heard.append(signal.Signals(n).name))
rank = int(me["RANK"])
path = os.path.join(os.path.dirname(__file__), f"rank-{rank}")
open(path + ".new", "w").write(json.dumps(me))
os.rename(path + ".new", path)
def say_heard():
    open(path + ".heard", "w").close()
exec(sys.argv[1])
"""
# Rank 1 is killed; rank 0 ends by itself once the launcher has told it of that, by a SIGTERM.
OTHER_IS_KILLED = """
if rank: os.kill(os.getpid(), 9)
while not heard: time.sleep(0.02)
sys.exit(71)
"""
LAUNCHER = """
import sys
from pathlib import Path
from runner.run import launch
launch.GRACE_S = 1.0
sys.exit(launch.launch(sys.argv[2:], int(sys.argv[1]), Path({script!r})))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


def ranks_of(script: Path, count: int) -> list[dict]:
    """Wait until all ranks have said who they are."""
    deadline = time.monotonic() + 60
    paths = [script.with_name(f"rank-{rank}") for rank in range(count)]
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [json.loads(path.read_text()) for path in paths]


def heard_by(script: Path, count: int) -> None:
    """Wait until all ranks say that they have heard a signal."""
    deadline = time.monotonic() + 60
    while len(list(script.parent.glob("rank-*.heard"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launched(script: Path, count: int, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(script=str(script)), str(count), code],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_rank_is_told_who_it_is(script):
    assert launch(["pass", "--set", "a b"], 3, script) == 0
    ranks = ranks_of(script, 3)
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2"]
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "2"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {rank["LOCAL_WORLD_SIZE"] for rank in ranks}
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"3"}
    assert {(rank["MASTER_ADDR"], len(rank["MASTER_PORT"]) > 3) for rank in ranks} == {
        ("127.0.0.1", True)
    }
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert all(rank["arguments"] == ["pass", "--set", "a b"] for rank in ranks)
    assert MAIN.is_file()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(65)", 65),
        ("sys.exit(75)", 75),
        ("sys.exit(0 if rank else 74)", 74),
        ("sys.exit(76 if rank else 0)", 76),
        # One is killed; the other finds out, and says so.
        pytest.param(OTHER_IS_KILLED, 71, id="one is killed and the other says so"),
    ],
)
def test_the_exit_code_is_the_ranks(script, code, expected):
    assert launch([code], 2, script) == expected


def test_all_ranks_killed_is_said(script):
    with pytest.raises(MachineError, match=r"killed by SIGKILL \(out of memory\?\); the same"):
        launch(["os.kill(os.getpid(), 9)"], 2, script)
    with pytest.raises(MachineError, match=r"killed by SIGSEGV; the same"):
        launch(["signal.signal(11, signal.SIG_DFL), os.kill(os.getpid(), 11)"], 1, script)


def test_a_rank_that_does_not_notice_a_failure_is_ended(script, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    assert launch(["sys.exit(65) if rank else time.sleep(600)"], 2, script) == 65
    for rank in ranks_of(script, 2):
        with pytest.raises(ProcessLookupError):
            os.kill(rank["pid"], 0)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_signals_reach_every_rank_and_the_launcher_stays(script, name):
    code = f"\nwhile not heard: time.sleep(0.02)\nsys.exit(75 if heard == [{name!r}] else 1)"
    process = launched(script, 2, code)
    ranks_of(script, 2)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 75


def test_a_second_interrupt_ends_at_once(script):
    code = "\nwhile not heard: time.sleep(0.02)\nsignal.signal(2, signal.SIG_DFL)"
    process = launched(script, 2, f"{code}\nsay_heard()\ntime.sleep(600)")
    ranks_of(script, 2)
    process.send_signal(signal.SIGINT)
    heard_by(script, 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_a_keyboard_interrupt_comes_once(script):
    """Ctrl-C goes to every process of the terminal's foreground group: ranks are not of it."""
    code = "\nwhile not heard: time.sleep(0.02)\ntime.sleep(0.5)\nsys.exit(70 + len(heard))"
    process = launched(script, 2, code)
    for rank in ranks_of(script, 2):
        assert os.getpgid(rank["pid"]) != os.getpgid(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 71


def state_of(pid: int) -> str:
    """What a process does by /proc: R or S, T where it is stopped, Z where it has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for_state(pids: list[int], *, stopped: bool) -> None:
    deadline = time.monotonic() + 60
    while any((state_of(pid) == "T") is not stopped for pid in pids):
        assert time.monotonic() < deadline, [state_of(pid) for pid in pids]
        time.sleep(0.02)


def test_ctrl_z_stops_the_ranks_too_until_the_run_goes_on(script):
    process = launched(script, 2, "\nwhile not heard: time.sleep(0.02)\nsys.exit(75)")
    pids = [process.pid, *(rank["pid"] for rank in ranks_of(script, 2))]
    for _ in range(2):
        process.send_signal(signal.SIGTSTP)
        wait_for_state(pids, stopped=True)
        process.send_signal(signal.SIGCONT)
        wait_for_state(pids, stopped=False)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_time_in_which_the_launcher_is_stopped_is_no_grace(script):
    """One rank has failed and the other is coming to its end, as Ctrl-Z is pressed."""
    code = (
        "\nif rank: sys.exit(71)\nwhile not heard: time.sleep(0.02)\nsay_heard()"
        "\ntime.sleep(0.5)\nopen(path + '.saved', 'w').close()\nsys.exit(71)"
    )
    process = launched(script, 2, code)  # which gives a second
    heard_by(script, 1)
    pids = [process.pid, ranks_of(script, 2)[0]["pid"]]
    process.send_signal(signal.SIGTSTP)
    wait_for_state(pids, stopped=True)
    time.sleep(1.2)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 71
    assert script.with_name("rank-0.saved").exists()


def test_ranks_ended_by_a_signal_before_they_listen_have_stopped(script):
    code = "\nsignal.signal(15, signal.SIG_DFL)\nsay_heard()\ntime.sleep(600)"
    process = launched(script, 2, code)
    heard_by(script, 2)
    process.send_signal(signal.SIGTERM)
    assert "Interrupted: stopped by SIGTERM before training began; the" in process.communicate()[1]


REFUSED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from runner.cli import command
from runner.run.launch import launch
start = lambda _: launch(["sys.exit(65)"], 2, Path({script!r}))
command._parse = lambda _: SimpleNamespace(verb=start)
sys.exit(command.main([]))
"""


def test_a_failure_is_seen_whatever_the_parent_does_with_its_children(script):
    """With SIGCHLD ignored, which is inherited, the system throws exit codes away."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED.format(script=str(script))],
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        timeout=60,
        check=False,
    )
    assert done.returncode == 65


def test_a_rank_whose_launcher_is_gone_already_ends_before_it_imports_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, MAIN, "job.toml"],
        cwd=tmp_path,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", LAUNCHER_VARIABLE: "999999999"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (75, b"")


@pytest.mark.parametrize(
    ("value", "count"),
    [("0", 1), ("0,1,3", 3), ("GPU-a,GPU-b", 2), ("", 0), ("-1", 0), (" ", 0)],
)
def test_visible_gpus_are_counted(monkeypatch, value, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == count


def test_without_a_word_gpus_are_counted_by_their_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"]
    monkeypatch.setattr(os, "listdir", lambda _: names)
    assert visible_gpus() == 2


def test_a_later_run_of_a_launcher_is_told_when_its_own_start_began(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os; open('told', 'a').write(os.environ.get('SPANTUNE_STARTED', '-') + ' ')"
    )
    code = (
        "import sys; from pathlib import Path; from runner.run.launch import launch\n"
        f"for since in (None, 17.5): launch([], 1, Path({str(script)!r}), since=since)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "told").read_text() == "- 17.5 "
