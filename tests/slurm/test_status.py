"""Where runs stand, from what is in their folders and what SLURM says."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pytest

from runner.cli import slurm as slurm_verbs
from runner.cli.command import main
from runner.errors import Interrupted, RunDirError
from runner.run.attempts import AttemptRecord, check_budget, entry_file
from runner.run.folder import RunDir
from runner.slurm.client import Submission, write_submission
from runner.slurm.starts import newest_start
from runner.slurm.status import find_runs, run_statuses
from runner.utils.tables import append_row

UNKNOWN = {"squeue": "echo 'error: Invalid job id specified' >&2; exit 1", "sacct": "exit 1"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(name: str = "n/1") -> RunDir:
    run = RunDir(Path("runs") / name)
    run.attempts.mkdir(parents=True)
    run.job.write_text("[train]\nepochs = 4\n")
    return run


def start(
    run: RunDir,
    number: int = 1,
    *,
    code: int | None = None,
    step: int | None = 0,
    age=0.0,
    job: str | None = None,
    **said: object,
):
    """Note a start in the ledger: of this process, or of another machine `age` seconds ago."""
    owner = asdict(AttemptRecord.here(number, anew=False)) | {
        "from_step": step,
        "slurm_job_id": job,
    }
    if age:
        owner |= {"machine": "another", "host": "node7"}
    files = [entry_file(run, number, kind) for kind in ("json", "alive")]
    files[0].write_text(json.dumps(owner))
    files[1].touch()
    for path in files:
        os.utime(path, (time.time() - age, time.time() - age))
    if code is not None:
        entry_file(run, number, "end.json").write_text(
            json.dumps({"exit_code": code, "step": 8, "ended": 9.0} | said)
        )


def submit(run: RunDir, job: str = "17", *, index: int | None = None, age: float = 0) -> None:
    when = datetime.fromtimestamp(time.time() - age, UTC).isoformat(timespec="seconds")
    output = f"{run.path}/slurm-{job}.out"
    write_submission(run.slurm, Submission(job, index, output, when, "", {}, None, []))


def state(run: RunDir) -> str:
    [found], _ = run_statuses([run])
    return found.state


# ---- without SLURM


@pytest.mark.parametrize(
    ("code", "expected"),
    [(75, "interrupted"), (65, "failed (65)"), (78, "failed (78)"), (None, "running")],
)
def test_from_the_ledger(code, expected):
    run = make_run()
    assert state(run) == "not started"
    start(run, code=code)
    assert state(run) == expected


def test_a_silent_start_on_another_machine_is_lost():
    run = make_run()
    start(run, age=60)
    [found], _ = run_statuses([run])
    assert (found.state, found.over, found.place) == ("running", False, "node7")
    start(run, age=600)
    [found], _ = run_statuses([run])
    assert (found.state, found.over, found.place) == ("lost: it was killed", True, "")


def test_the_newest_start_counts():
    run = make_run()
    start(run, 1, code=65)
    start(run, 2, code=75)
    assert state(run) == "interrupted"
    (run.attempts / "0003.json").write_text("{")  # is being written
    assert state(run) == "interrupted"


def test_a_result_is_the_end(fake_slurm):
    calls = fake_slurm()
    run = make_run()
    submit(run)
    run.result.write_text("{}")
    assert state(run) == "finished"
    start(run, code=78)
    assert state(run) == "finished, [expect] missed"
    assert calls.read_text() == ""  # SLURM need not be asked


def test_a_folder_that_may_only_be_read(monkeypatch):
    run = make_run()
    start(run, age=60)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("runner.slurm.starts.describe_if_alive", refuse)
    found = newest_start(run)
    assert found is not None
    assert found.alive
    start(run, age=600)
    found = newest_start(run)
    assert found is not None
    assert not found.alive


# ---- with SLURM


@pytest.mark.parametrize(
    ("line", "before", "after"),
    [
        ("17|PENDING|Resources|1:00|", "pending (Resources)", "requeued (Resources)"),
        ("17|PENDING|None|1:00|", "pending", "requeued"),
        ("17|RUNNING|None|1:00|n1", "starting", "starting"),
        ("17|COMPLETING|None|1:00|n1", "ending", "ending"),
        ("17|SUSPENDED|None|1:00|n1", "suspended", "suspended"),
        ("17|CANCELLED|None|1:00|n1", "cancelled", "cancelled"),
        ("17|PREEMPTED|None|1:00|n1", "preempted", "preempted"),
        ("17|TIMEOUT|TimeLimit|1:00|n1", "timeout", "timeout"),
        ("17|NODE_FAIL|None|1:00|n1", "node fail", "node fail"),
        ("17|FAILED|NonZeroExitCode|1:00|n1", "ended before it began", "interrupted"),
    ],
)
def test_from_the_queue(fake_slurm, line, before, after):
    fake_slurm(squeue=f"echo '{line}'")
    run = make_run()
    submit(run)
    assert state(run) == before
    start(run, code=75, job="17")
    assert state(run) == after


@pytest.mark.parametrize("ended", ["CANCELLED", "TIMEOUT"])
def test_an_old_job_says_nothing_of_a_newer_start(fake_slurm, ended):
    fake_slurm(squeue=f"echo '17|{ended}|None|0:00|n1'; echo '18_3|{ended}|None|0:00|n1'")
    run = make_run()
    submit(run, age=60)
    start(run, 1, code=75, job="17")
    assert state(run) == ended.lower()
    start(run, 2, code=65)  # on this machine, later
    [found], _ = run_statuses([run])
    assert (found.state, found.over, found.job) == ("failed (65)", True, None)
    submit(run, age=-60)  # submitted again since
    assert state(run) == ended.lower()
    submit(run, "18", index=3, age=60)
    start(run, 3, code=75, job="21")  # as SLURM_JOB_ID of a trial is
    assert state(run) == ended.lower()


def test_a_start_here_while_a_job_waits(fake_slurm):
    fake_slurm(squeue="echo '17|PENDING|Priority|1:00|'")
    run = make_run()
    submit(run, age=60)
    start(run)
    assert state(run) == "running"
    start(run, code=65)
    assert state(run) == "requeued (Priority)"


def test_a_running_job(fake_slurm):
    fake_slurm(squeue="echo '17|RUNNING|None|1:02:03|n[1-2]'")
    run = make_run()
    submit(run)
    start(run, job="17")
    for number in range(1, 9):
        # The clock begins anew at row 5, where the run was resumed.
        seconds = 100.0 * number if number < 5 else 10.0 * (number - 4)
        row = {"step": number, "epoch": number * 0.25, "elapsed_seconds": seconds}
        append_row(run.train_table, row)
    append_row(run.eval_table, {"epoch": 1, "exact_match_percent": 20.5, "f1_percent": 31.25})
    [found], silence = run_statuses([run])
    assert silence is None
    assert (found.state, found.over, found.job, found.limit) == ("running", False, "17", "1:02:03")
    assert (found.epoch, found.epochs, found.f1, found.place) == (2.0, 4, 31.25, "n[1-2]")
    assert found.left == pytest.approx(2 / (0.25 / 10))
    assert found.row(Path("runs")) == {
        "run": "n/1",
        "state": "running",
        "job": "17",
        "epoch": "2/4",
        "F1 %": 31.25,
        "left": "1 min 20 s",
        "limit": "1:02:03",
        "on": "n[1-2]",
    }


def test_a_job_that_slurm_has_forgotten(fake_slurm):
    fake_slurm(**UNKNOWN)
    run = make_run()
    submit(run)
    assert state(run) == "ended before it began"
    start(run, code=70)
    assert state(run) == "failed (70)"


def test_the_accounting_remembers(fake_slurm):
    fake_slurm(**UNKNOWN | {"sacct": "echo '17|NODE_FAIL'"})
    run = make_run()
    submit(run)
    assert state(run) == "node fail"


def test_without_an_answer_the_folders_speak(fake_slurm):
    fake_slurm(squeue="echo 'error: Unable to contact slurm controller' >&2; exit 1")
    run = make_run()
    submit(run)
    start(run, code=75)
    [found], silence = run_statuses([run])
    assert found.state == "interrupted"
    assert silence is not None
    assert silence.startswith("squeue: error: Unable to contact slurm controller; what follows")


def test_all_jobs_are_asked_for_at_once(fake_slurm):
    calls = fake_slurm(squeue="echo '17|RUNNING|x|1|n'; echo '18|PENDING|y|1|'", sacct="exit 1")
    runs = [make_run(f"n/{number}") for number in (1, 2)]
    for run, job in zip(runs, ("17", "18"), strict=True):
        submit(run, job)
    assert [found.state for found in run_statuses(runs)[0]] == ["starting", "pending (y)"]
    assert len(calls.read_text().splitlines()) == 1


# ---- why they are over


def message(run: RunDir) -> str:
    [found], _ = run_statuses([run])
    return found.message


def test_a_message_is_told_of_a_run_that_is_over():
    run = make_run()
    start(run, code=75, message=f"{run.path}: stopped by SIGTERM; step 8 of 9 is saved")
    assert message(run) == "stopped by SIGTERM; step 8 of 9 is saved"
    start(run, code=75, message="runs/n/1: stopped by SIGTERM; step 8 of 9 is saved")
    assert message(run) == "stopped by SIGTERM; step 8 of 9 is saved"
    start(run, 2)
    assert message(run) == ""  # it goes on
    start(run, 2, code=71, message="rank 1 died")
    assert message(run) == "rank 1 died"
    run.result.write_text("{}")
    assert message(run) == ""
    start(run, 2, code=78, message="the run finished, but f1 is 3")
    assert message(run) == "the run finished, but f1 is 3"


def test_what_left_no_message_has_the_last_line_of_its_log():
    run = make_run()
    start(run, age=600)
    assert message(run) == ""
    run.log.write_bytes(b"x" * 9000 + b"\n12:00:00 epoch 1/4\r12:00:01 rank 0 died \xff\n\n")
    assert message(run) == "log.txt ends with: 12:00:01 rank 0 died \\xff"
    run.log.unlink()
    os.mkfifo(run.log)
    assert message(run) == ""
    run.log.unlink()
    run.log.symlink_to(run.job)
    assert message(run) == ""


def test_a_job_that_failed_before_its_run_began_is_told_by_its_output(fake_slurm):
    fake_slurm(squeue="echo '18|FAILED|NonZeroExitCode|1:00|n1'; echo '19|CANCELLED|None|1:00|'")
    run = make_run()
    start(run, code=75, job="17", message="stopped by SIGTERM")
    submit(run, "18", age=-60)  # since
    said = "job.toml:4: train.epoch: unknown key\n"
    srun = "srun: error: n1: tasks 0-1: Exited with exit code 64\n"
    (run.path / "slurm-18.out").write_text(f"job 18, start 1\n{said}{srun}")
    [found], _ = run_statuses([run])
    assert found.state == "ended before it began"
    assert found.message == f"slurm-18.out ends with: {said.strip()}"
    start(run, 2, code=65, job="18", message="another model")
    [found], _ = run_statuses([run])
    assert (found.state, found.message) == ("failed (65)", "another model")
    submit(run, "19", age=-60)  # and cancelled while it waits
    [found], _ = run_statuses([run])
    assert (found.state, found.message) == ("cancelled", "")


# ---- which runs


def test_find_runs(tmp_path):
    runs = [make_run(f"n/{number}") for number in (1, 2)]
    (runs[0].path / "before-0002").mkdir()  # an earlier run, put aside
    (runs[0].path / "before-0002" / "job.toml").touch()
    sweep = Path("runs/s/1")
    trial = make_run("s/1/a_1")
    (sweep / "sweep.json").write_text(
        json.dumps({"name": "s", "trials": [{"name": n, "values": {}} for n in ("a_1", "b_2")]})
    )
    every = [runs[0].path, runs[1].path, trial.path]
    for age, path in enumerate(reversed(every)):
        os.utime(path / "job.toml", (1e9 - age, 1e9 - age))
    assert [run.path for run in find_runs([], Path("runs"))] == every
    assert [run.path for run in find_runs([sweep], Path())] == [trial.path]
    assert [run.path for run in find_runs([Path("runs/n")], Path())] == every[:2]
    assert [run.path for run in find_runs([Path("runs/n/2"), sweep], Path())] == every[1:]
    with pytest.raises(RunDirError, match="is no run folder"):
        find_runs([tmp_path / "nowhere"], Path())


def test_a_run_is_found_wherever_run_dir_put_it_below_the_runs():
    runs = [make_run("mine"), make_run("n/1"), make_run("swept/a_1"), make_run("n/s/b_2")]
    for trial in runs[2:]:
        entry = {"name": trial.path.name, "values": {}}
        manifest = {"name": "s", "trials": [entry]}
        (trial.path.parent / "sweep.json").write_text(json.dumps(manifest))
    aside = runs[0].path / "before-0002"  # what --restart has put aside
    aside.mkdir()
    (aside / "job.toml").touch()
    for age, run in enumerate(reversed(runs)):
        os.utime(run.job, (1e9 - age, 1e9 - age))
        os.utime(run.path.parent, (1e9, 1e9))
    for manifest in Path("runs").rglob("sweep.json"):
        os.utime(manifest, (1e9 - 9, 1e9 - 9))
    every = [run.path for run in runs]
    assert [run.path for run in find_runs([], Path("runs"))] == every
    assert sorted(run.path for run in find_runs([Path("runs")], Path())) == sorted(every)
    Path("job.toml").touch()  # the user's, in the folder of all runs
    make_run("../mine")
    assert RunDir("mine").path in [run.path for run in find_runs([], Path())]


def test_the_newest_are_listed():
    for number in range(30):
        run = make_run(f"n/{number}")
        os.utime(run.job, (1e9 + number, 1e9 + number))
    assert [run.path.name for run in find_runs([], Path("runs"))] == [str(n) for n in range(10, 30)]


# ---- may it be requeued?


def checkpoint(run: RunDir, step: int) -> None:
    (run.checkpoints / f"step-{step:06d}-a0001").mkdir(parents=True)


def test_three_starts_without_progress_are_enough():
    run = make_run()
    check_budget(run)
    for number in (1, 2):
        start(run, number, code=75)
        check_budget(run)
    start(run, 3, code=75)
    with pytest.raises(Interrupted, match="the last 3 starts have saved nothing new") as caught:
        check_budget(run)
    assert caught.value.exit_code == 75
    checkpoint(run, 10)
    check_budget(run)


def test_progress_is_counted_from_the_newest_checkpoint():
    run = make_run()
    for number, step in enumerate([0, 10, 20, 20, 20], 1):
        start(run, number, code=75, step=step)
    checkpoint(run, 20)
    with pytest.raises(Interrupted):
        check_budget(run)
    checkpoint(run, 21)
    check_budget(run)


def test_there_is_an_end_to_everything():
    run = make_run()
    for number in range(1, 51):
        start(run, number, code=75, step=number)
    checkpoint(run, 99)
    with pytest.raises(Interrupted, match="50 starts are too many"):
        check_budget(run)


def test_the_batch_script_is_told(capsys):
    run = make_run()
    assert main(["may-requeue", str(run.path)]) == 0
    for number in (1, 2, 3):
        start(run, number, code=75)
    assert main(["may-requeue", str(run.path)]) == 75
    assert capsys.readouterr().err.count("\n") == 1


# ---- the command


def test_a_preempted_run_says_how_it_goes_on(fake_slurm, capsys):
    fake_slurm(squeue="echo '17|PREEMPTED|None|1:00|n1'; echo '18|CANCELLED|None|1:00|n1'")
    for number in (17, 18):
        run = make_run(f"n/the run {number}")
        submit(run, str(number))
        start(run, code=75, job=str(number))
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    folder = "runs/n/the run 17"
    said = f"preempted; go on with: spantune submit '{folder}/job.toml' --run-dir '{folder}'"
    assert said in [line.rstrip() for line in out.splitlines()]
    assert out.count("go on with") == 1


def test_the_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"
    start(make_run("bert-squad/20261125-120000"), code=75)
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "bert-squad/20261125-120000" in out
    assert "interrupted" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_run_tells_all_that_it_says_and_several_a_line_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = f"data.train: {'o/n ' * 30}is missing\nmodel.name: \x1b[31mtoo\u202e"
    start(make_run("n/1"), code=69, message=said)
    start(make_run("n/2"), code=75, message="stopped by SIGTERM")
    assert main(["status"]) == 0
    several = capsys.readouterr().out.splitlines()
    assert several[-2].startswith("n/1: data.train: o/n o/n ")
    assert several[-2].endswith("…")
    assert several[-1] == "n/2: stopped by SIGTERM"
    assert main(["status", "runs/n/1"]) == 0
    one = capsys.readouterr().out.splitlines()
    assert " ".join("".join(one[-3:-1]).split()).endswith("o/n is missing")
    assert one[-1] == "model.name: \\x1b[31mtoo\\u202e"
    assert max(map(len, several + one)) <= 80


def test_watching_goes_on_until_all_is_over(capsys, monkeypatch):
    run, looks = make_run(), []
    start(run)

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            start(run, code=65)

    monkeypatch.setattr(slurm_verbs.time, "sleep", sleep)
    assert main(["status", "--watch", "7"]) == 0
    assert looks == [7, 7]
    assert "failed (65)" in capsys.readouterr().out


def test_watching_ends_when_all_is_over(capsys):
    start(make_run(), code=65)
    assert main(["status", "--watch"]) == 0
    assert "failed (65)" in capsys.readouterr().out


# ---- folders that anybody may have filled


def damage_ledger(run: RunDir, kind: str = "json", **changes: object) -> None:
    start(run, code=75)
    path = entry_file(run, 1, kind)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_submission(run: RunDir, **changes: object) -> None:
    submit(run)
    run.slurm.write_text(json.dumps(json.loads(run.slurm.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda run: damage_submission(run, job_id=17), "slurm.json"),
        (lambda run: damage_submission(run, job_id="--user=root"), "slurm.json"),
        (lambda run: damage_submission(run, earlier=7), "slurm.json"),
        (lambda run: run.slurm.mkdir(), "slurm.json"),
        (lambda run: os.mkfifo(run.slurm), "slurm.json"),
        (lambda run: damage_ledger(run, started="x"), "0001.json"),
        (lambda run: damage_ledger(run, pid=-1), "0001.json"),
        (lambda run: damage_ledger(run, pid=2**70), "0001.json"),
        (lambda run: damage_ledger(run, "end.json", exit_code="0"), "0001.end.json"),
        (lambda run: damage_ledger(run, "end.json", message=["x"]), "0001.end.json"),
    ],
)
def test_a_damaged_run_is_a_row_among_others(fake_slurm, capsys, damage, where):
    calls = fake_slurm(**UNKNOWN)
    start(make_run("n/good"), code=65)
    bad = make_run("n/bad")
    damage(bad)
    by_name = {
        status.run.path.name: status for status in run_statuses(find_runs([], Path("runs")))[0]
    }
    assert by_name["good"].state == "failed (65)"
    assert by_name["bad"].state.startswith("damaged: ")
    assert where in by_name["bad"].state
    assert by_name["bad"].over
    assert "root" not in calls.read_text()
    assert main(["cancel", "runs/n/bad", "runs/n/good"]) in (0, 65, 74)
    assert "good: is not running" in capsys.readouterr().out
    assert "root" not in calls.read_text()


def test_values_that_no_run_writes(fake_slurm):
    fake_slurm(**UNKNOWN)
    run = make_run()
    start(run)
    submit(run)
    run.job.write_text("[train]\nepochs = inf\n")
    run.train_table.write_text("epoch,elapsed_seconds\nnan,1\ninf,2\n\0,3\n")
    [found], _ = run_statuses([run])
    assert found.state  # whatever it is


def test_pipes_are_passed_over():
    for name in ("n/1/job.toml", "n/2/job.toml"):
        (Path("runs") / name).parent.mkdir(parents=True)
        os.mkfifo(Path("runs") / name)
    run = make_run("n/3")
    start(run, code=75)
    entry_file(run, 1, "alive").unlink()
    for path in (entry_file(run, 1, "alive"), entry_file(run, 2, "json"), run.train_table):
        os.mkfifo(path)
    found, _ = run_statuses(find_runs([], Path("runs")))
    assert [status.run.path.name for status in found] == ["3"]


@pytest.mark.parametrize("name", ["../victim", "/abs", "a/b", "..", "", "a\x1b"])
def test_a_manifest_leads_nowhere_else(name, capsys):
    make_run("n/victim")
    sweep = Path("runs/n/s")
    sweep.mkdir()
    trial = {"name": name, "values": {}}
    (sweep / "sweep.json").write_text(json.dumps({"name": "n", "trials": [trial]}))
    assert main(["cancel", str(sweep)]) == 65
    assert "sweep.json: cannot be read: trials.0.name" in capsys.readouterr().err
    states = {
        status.run.path.name: status.state
        for status in run_statuses(find_runs([], Path("runs")))[0]
    }
    assert states["victim"] == "not started"
    assert states["s"].startswith("damaged: ")


def test_no_name_steers_the_terminal(capsys):
    run = make_run("n/\x1b[2Jx\u202e")
    start(run, age=60)
    entry = entry_file(run, 1, "json")
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"host": "a\nb\x1b[31m"}))
    os.utime(entry, (time.time() - 60,) * 2)
    assert main(["status"]) == 0
    assert main(["cancel", str(run.path)]) == 73
    found = capsys.readouterr()
    assert not [c for c in found.out + found.err if not c.isprintable() and c != "\n"]
    assert run_statuses([run])[0][0].place == "a\\nb\\x1b[31m"  # one line of the table
    assert found.err.count("\n") == 1
    assert "a\\nb\\x1b[31m" in found.err


def test_a_link_among_the_trials_is_none_of_them(capsys):
    make_run("n/victim")
    sweep = Path("runs/n/s")
    sweep.mkdir()
    (sweep / "trial").symlink_to("../victim")
    trial = {"name": "trial", "values": {}}
    (sweep / "sweep.json").write_text(json.dumps({"name": "n", "trials": [trial]}))
    assert find_runs([sweep], Path("runs")) == []
    assert main(["cancel", str(sweep)]) == 0
    assert capsys.readouterr().out == ""
