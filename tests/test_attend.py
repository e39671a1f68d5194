"""Following what a run says, and telling one to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from runner import attend
from runner.attempts import Owner, entry_file
from runner.attend import cancel, follow, log_file
from runner.cli import main
from runner.errors import RunDirError, SlurmError
from runner.rundir import RunDir
from runner.slurm_jobs import Submission, write_submission


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    monkeypatch.setattr(attend, "LOOK", 0.02)
    monkeypatch.setattr(attend, "ASK", 0.05)
    found = RunDir(tmp_path / "run")
    found.attempts.mkdir(parents=True)
    found.job.write_text("")
    return found


def start(run: RunDir, **changes) -> None:
    owner = asdict(Owner.here(1, anew=False)) | changes
    entry_file(run, 1, "json").write_text(json.dumps(owner))
    entry_file(run, 1, "alive").touch()


def submit(run: RunDir) -> Path:
    output = run.path / "slurm-17.out"
    write_submission(run.slurm, Submission("17", None, str(output), "", "", {}, None, []))
    return output


def end(run: RunDir, code: int = 0) -> None:
    entry_file(run, 1, "end.json").write_text(json.dumps({"exit_code": code}))


# ---- logs


def test_what_was_said(run, capsys):
    run.log.write_text("one\ntwo [CLS]\n")
    assert "".join(follow(run, forever=False)) == "one\ntwo [CLS]\n"
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == "one\ntwo [CLS]\n"


def test_the_output_of_the_job_comes_first(run):
    run.log.write_text("log")
    assert log_file(run) == run.log
    output = submit(run)
    assert log_file(run) == output


def test_nothing_yet(run):
    with pytest.raises(RunDirError, match=r"has said nothing yet: there is no log\.txt"):
        list(follow(run, forever=False))


def test_bytes_that_are_no_text(run):
    run.log.write_bytes(b"a\xff\n")
    assert "".join(follow(run, forever=False)) == "a\\xff\n"


def test_a_letter_in_two_parts(run):
    first, second = "café\n".encode()[:4], "café\n".encode()[4:]
    run.log.write_bytes(first)
    start(run)

    def live() -> None:
        time.sleep(0.2)
        with run.log.open("ab") as file:
            file.write(second)
        end(run)

    thread = threading.Thread(target=live)
    thread.start()
    assert "".join(follow(run, forever=True)) == "café\n"
    thread.join()


def test_following_to_the_end(run):
    run.log.write_text("one\n")
    start(run)

    def live() -> None:
        for word in ("two", "three"):
            time.sleep(0.15)
            with run.log.open("a") as file:
                file.write(f"{word}\n")
        end(run, 75)

    thread = threading.Thread(target=live)
    thread.start()
    assert "".join(follow(run, forever=True)) == "one\ntwo\nthree\n"
    thread.join()


def test_waiting_for_a_job_to_begin(run, fake_slurm):
    output = submit(run)
    state = run.path / "state"
    state.write_text("17|PENDING|Resources|1:00|")
    fake_slurm(squeue=f"cat {state}", sacct="exit 1")

    def live() -> None:
        time.sleep(0.2)
        output.write_text("it begins\n")
        time.sleep(0.2)
        state.write_text("17|FAILED|NonZeroExitCode|1:00|n1")

    thread = threading.Thread(target=live)
    thread.start()
    assert "".join(follow(run, forever=True)) == "pending (Resources)\nit begins\n"
    thread.join()


# ---- cancel


def test_a_job_in_the_queue(run, fake_slurm):
    submit(run)
    calls = fake_slurm(squeue="echo '17|RUNNING|None|1:00|n1'", scancel="exit 0")
    assert cancel(run) == "job 17 is cancelled: it saves, ends, and is not requeued"
    assert calls.read_text().splitlines()[-1] == "scancel 17"
    fake_slurm(squeue="echo '17|RUNNING|None|1:00|n1'", scancel="echo no >&2; exit 1")
    with pytest.raises(SlurmError):
        cancel(run)


def test_a_process_of_this_machine(run):
    program = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print(flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        import psutil

        start(run, pid=process.pid, born=psutil.Process(process.pid).create_time())
        assert cancel(run) == f"process {process.pid} is told to save and end"
        assert process.wait(10) == 75
    end(run, 75)
    assert cancel(run) == "is not running"


def test_a_process_of_another_machine(run, monkeypatch):
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("killed something here"))
    start(run, machine="another", host="node7")
    with pytest.raises(RunDirError, match=r"is being run by node7 .*: cancel it there"):
        cancel(run)


def test_what_is_over(run, fake_slurm, capsys):
    assert cancel(run) == "is not running"
    run.result.write_text("{}")
    assert cancel(run) == "finished already"
    assert main(["cancel", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path}: finished already\n"
