"""Following what a run says, and telling one to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.cli.command import main
from runner.errors import RunDirError, RunnerError, SlurmError
from runner.run.attempts import AttemptRecord, entry_file
from runner.run.folder import RunDir
from runner.slurm import control
from runner.slurm.client import Submission, write_submission
from runner.slurm.control import follow_log
from runner.slurm.starts import log_file


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    found = RunDir(tmp_path / "run")
    found.attempts.mkdir(parents=True)
    found.job.write_text("")
    return found


@pytest.fixture
def meanwhile(monkeypatch):
    """`meanwhile(first, second, ...)`: what happens while `follow` naps, something at each nap."""

    def arrange(*events) -> None:
        left = list(events)
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: left.pop(0)())
        monkeypatch.setattr(control, "time", clock)
        monkeypatch.setattr(control, "STATE_POLL_S", -1.0)  # asks SLURM at each look

    return arrange


def start(run: RunDir, **changes) -> None:
    owner = asdict(AttemptRecord.here(1, anew=False)) | changes
    entry_file(run, 1, "json").write_text(json.dumps(owner))
    entry_file(run, 1, "alive").touch()


def submit(run: RunDir, job: str = "17", when: str = "") -> Path:
    output = run.path / f"slurm-{job}.out"
    write_submission(run.slurm, Submission(job, None, str(output), when, "", {}, None, []))
    return output


def cancel(run: RunDir) -> str:
    [(_, outcome)] = control.cancel_runs([run])
    if isinstance(outcome, RunnerError):
        raise outcome
    return outcome


def end(run: RunDir, code: int = 0, **said: str) -> None:
    entry_file(run, 1, "end.json").write_text(
        json.dumps({"exit_code": code, "step": 8, "ended": 9.0} | said)
    )


# ---- logs


def test_what_was_said(run, capsys):
    run.log.write_text("one\ntwo [CLS]\n")
    assert "".join(follow_log(run, forever=False)) == "one\ntwo [CLS]\n"
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == "one\ntwo [CLS]\n"


def test_the_output_of_the_job_comes_first(run):
    run.log.write_text("log")
    assert log_file(run) == run.log
    output = submit(run)
    assert log_file(run) == output


def test_a_newer_start_outside_of_the_job_speaks_for_itself(run):
    run.log.write_text("log")
    output = submit(run, when="2026-11-25T12:00:00+00:00")
    at = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
    start(run, started=at + 60, slurm_job_id="17")
    assert log_file(run) == output
    start(run, started=at - 60, slurm_job_id=None)
    assert log_file(run) == output
    start(run, started=at + 60, slurm_job_id=None)
    assert log_file(run) == run.log


def test_nothing_yet(run):
    with pytest.raises(
        RunDirError, match=r"has said nothing yet: there is no log\.txt; not started$"
    ):
        list(follow_log(run, forever=False))
    start(run)
    end(run, 74)
    with pytest.raises(RunDirError, match=r"no log\.txt; failed \(74\)$"):
        list(follow_log(run, forever=False))
    end(run, 74, message="log.txt: disk full")
    assert list(follow_log(run, forever=True)) == ["failed (74): log.txt: disk full\n", ""]


def test_bytes_that_are_no_text(run):
    run.log.write_bytes(b"a\xff\n")
    assert "".join(follow_log(run, forever=False)) == "a\\xff\n"


def test_a_letter_in_two_parts(run, meanwhile):
    first, second = "café\n".encode()[:4], "café\n".encode()[4:]
    run.log.write_bytes(first)
    start(run)

    def go_on() -> None:
        with run.log.open("ab") as file:
            file.write(second)
        end(run)

    meanwhile(go_on)
    assert "".join(follow_log(run, forever=True)) == "café\n"


def test_following_to_the_end(run, meanwhile):
    run.log.write_text("one\n")
    start(run)

    def say(word: str) -> None:
        with run.log.open("a") as file:
            file.write(f"{word}\n")

    meanwhile(lambda: say("two"), lambda: None, lambda: say("three"), lambda: end(run, 75))
    assert "".join(follow_log(run, forever=True)) == "one\ntwo\nthree\n"


def test_waiting_for_a_job_to_begin(run, fake_slurm, meanwhile):
    output = submit(run)
    state = run.path / "state"
    state.write_text("17|PENDING|Resources|1:00|")
    fake_slurm(squeue=f"cat {state}", sacct="exit 1")

    meanwhile(
        lambda: None,  # what is told once is not told again
        lambda: output.write_text("it begins\n"),
        lambda: state.write_text("17|FAILED|NonZeroExitCode|1:00|n1"),
    )
    assert "".join(follow_log(run, forever=True)) == "pending (Resources)\nit begins\n"


# ---- cancel


def test_a_job_in_the_queue(run, fake_slurm):
    submit(run)
    calls = fake_slurm(squeue="echo '17|RUNNING|None|1:00|n1'", scancel="exit 0")
    assert cancel(run) == "job 17 is cancelled: it saves, ends, and is not requeued"
    assert calls.read_text().splitlines()[-1] == "scancel 17"
    fake_slurm(squeue="echo '17|RUNNING|None|1:00|n1'", scancel="echo no >&2; exit 1")
    with pytest.raises(SlurmError):
        cancel(run)


@pytest.fixture
def sweep(run, tmp_path, monkeypatch) -> list[RunDir]:
    """Three trials, in the queue as jobs 17 to 19."""
    monkeypatch.chdir(tmp_path)
    trials = [RunDir(tmp_path / "s" / name) for name in ("a", "b", "c")]
    for job, trial in enumerate(trials, 17):
        trial.attempts.mkdir(parents=True)
        trial.job.write_text("")
        submit(trial, f"{job}")
    table = {"name": "s", "trials": [{"name": t.path.name, "values": {}} for t in trials]}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(table))
    return trials


QUEUE = 'for job in 17 18 19; do echo "$job|RUNNING|None|1:00|n1"; done'


def test_slurm_is_asked_once_for_a_sweep(sweep, fake_slurm, capsys):
    calls = fake_slurm(squeue=QUEUE, scancel="exit 0")
    assert main(["cancel", "s"]) == 0
    assert capsys.readouterr().out.count("is cancelled") == 3
    verbs = [line.split()[0] for line in calls.read_text().splitlines()]
    assert verbs == ["squeue", "scancel", "scancel", "scancel"]


def test_one_that_cannot_be_cancelled_does_not_keep_the_others_going(sweep, fake_slurm, capsys):
    fake_slurm(squeue=QUEUE, scancel='[ "$1" != 17 ] || { echo "Access denied" >&2; exit 1; }')
    assert main(["cancel", "s"]) == 72
    told = capsys.readouterr()
    assert told.out.count("is cancelled") == 2
    assert told.err == "SLURM does not cancel job 17: Access denied\n"


def test_without_an_answer_of_slurm_other_runs_are_told_all_the_same(
    sweep, run, fake_slurm, capsys
):
    fake_slurm(squeue="echo 'error: Unable to contact slurm controller' >&2; exit 1")
    assert main(["cancel", "s", "run"]) == 72
    told = capsys.readouterr()
    assert told.out == "run: is not running\n"
    assert told.err.count("Unable to contact") == 1  # once for all three


def test_runs_that_were_not_named_are_not_cancelled(sweep, run, fake_slurm, capsys):
    calls = fake_slurm(squeue=QUEUE, scancel="exit 0")
    (run.path.parent / "s" / "sweep.json").unlink()
    assert main(["cancel", "s"]) == 73
    assert capsys.readouterr().err == (
        "s is no run folder: it has no job.toml; name those of the 3 runs below it that are meant\n"
    )
    assert calls.read_text() == ""
    assert main(["cancel", "nowhere"]) == 73


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


def test_no_path_is_taken_from_a_file(run, tmp_path, capsys):
    (tmp_path / "secret").write_text("secret")
    output = submit(run)
    content = json.loads(run.slurm.read_text()) | {"output": str(tmp_path / "secret")}
    run.slurm.write_text(json.dumps(content))
    assert log_file(run) == output
    output.symlink_to(tmp_path / "secret")
    assert main(["logs", str(run.path)]) == 73
    output.unlink()
    os.mkfifo(output)
    assert main(["logs", str(run.path)]) == 74
    found = capsys.readouterr()
    assert "secret" not in found.out
    assert found.err.splitlines() == [
        f"{output} is a link, which is not followed",
        f"{output}: is no regular file",
    ]


def test_a_log_does_not_steer_the_terminal(run, capsys):
    run.log.write_text("a\x1b[2Jb\n\tc\n")
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\tc\n"
