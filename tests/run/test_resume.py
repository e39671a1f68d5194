"""Which folder a start belongs to, and what is refused there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from runner.errors import DataError, ExpectationError, RunDirError, StorageError
from runner.job.load import dump_job
from runner.job.schema import Job
from runner.run.attempts import attempt_numbers, sealed
from runner.run.folder import RunDir
from runner.run.lease import Lease
from runner.run.ownership import prepare
from runner.run.resume import StartOptions, acquire_run, check_finished, finished_run
from runner.utils.files import write_atomic

TABLE = {
    "name": "n",
    "data": {"train": "o/n", "validation": "o/n"},
    "model": {"name": "o/n"},
    "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-4},
}
JOB = Job.model_validate(TABLE)
OTHER = Job.model_validate(TABLE | {"train": TABLE["train"] | {"epochs": 3}})
EXPECTING = Job.model_validate(TABLE | {"expect": {"f1": 50.0}})


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def begin(where: StartOptions, job: Job = JOB) -> Lease:
    opened = acquire_run(job, where)
    assert isinstance(opened, Lease)
    return opened


def finish(run: RunDir, f1: float = 50.0) -> None:
    write_atomic(run.result, json.dumps({"metrics": {"f1": f1}}))


def test_without_a_folder_each_start_is_a_new_run(tmp_path):
    runs = [begin(StartOptions(tmp_path)).run for _ in range(2)]
    assert len({run.path for run in runs}) == 2
    assert all(run.path.parent == tmp_path / "n" for run in runs)
    assert all(run.job.is_file() for run in runs)


def test_the_same_command_goes_on_where_a_run_ended(tmp_path):
    where = StartOptions(run_dir=tmp_path / "a" / "run")
    first = begin(where)
    assert first.number == 1
    with pytest.raises(RunDirError, match="is being run by"):
        acquire_run(JOB, where)
    first.release(75)
    assert begin(where).number == 2
    assert begin(StartOptions(run_dir=tmp_path / "other")).number == 1


def test_a_folder_prepared_for_a_run_is_no_run_yet(tmp_path):
    # What `submit` does beforehand.
    folder = tmp_path / "run"
    prepare(RunDir(folder), JOB)
    (folder / "submit.sh").write_text("#!/bin/bash\n")
    attempt = begin(StartOptions(run_dir=folder))
    assert attempt.number == 1
    assert (folder / "submit.sh").is_file()


def test_a_run_of_another_job_is_refused_by_the_first_differing_key(tmp_path):
    where = StartOptions(run_dir=tmp_path)
    begin(where).release(75)
    record = RunDir(tmp_path).job.read_text()
    with pytest.raises(DataError) as caught:
        acquire_run(OTHER, where)
    assert "another job: train.epochs is 2 there and 3 now; give another folder" in str(
        caught.value
    )
    assert RunDir(tmp_path).job.read_text() == record
    assert attempt_numbers(RunDir(tmp_path)) == [1]


def test_what_decides_no_number_may_differ(tmp_path):
    where = StartOptions(run_dir=tmp_path)
    begin(where).release(75)
    often = TABLE["train"] | {"checkpoint_minutes": 1.0, "timeout_minutes": 2.0}
    job = Job.model_validate(TABLE | {"train": often, "expect": {"f1": 50.0}})
    assert begin(where, job).number == 2
    assert "checkpoint_minutes = 1.0" in RunDir(tmp_path).job.read_text()


def test_a_finished_run_is_told_and_not_claimed(tmp_path):
    where = StartOptions(run_dir=tmp_path)
    attempt = begin(where)
    assert finished_run(JOB, where) is None
    finish(attempt.run)
    attempt.release(0)
    opened = acquire_run(JOB, where)
    assert isinstance(opened, RunDir)
    found = finished_run(JOB, where)
    assert found is not None
    assert opened.path == found.path == tmp_path
    assert attempt_numbers(opened) == [1]
    check_finished(JOB, opened)
    check_finished(EXPECTING, opened)
    finish(opened, f1=40.0)
    with pytest.raises(ExpectationError, match=r"already, but f1 is 40.00, 10.00 from"):
        check_finished(EXPECTING, opened)
    for ask in (acquire_run, finished_run):
        with pytest.raises(DataError, match=r"train\.epochs"):
            ask(OTHER, where)


def test_resume_names_a_run_that_must_be_there(tmp_path):
    with pytest.raises(RunDirError, match="no run folder"):
        acquire_run(JOB, StartOptions(resume=tmp_path))
    begin(StartOptions(run_dir=tmp_path)).release(75)
    attempt = begin(StartOptions(resume=tmp_path))
    assert (attempt.run.path, attempt.number) == (tmp_path, 2)


def test_restart_begins_anew_and_loses_nothing(tmp_path):
    where = StartOptions(run_dir=tmp_path)
    first = begin(where)
    first.seal([])
    for path in first.run.written:
        if path.suffix and not path.exists():
            path.write_text("old")
    (first.run.checkpoints / "step-000010-a0001").mkdir(parents=True)
    first.run.model.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirError):
        acquire_run(OTHER, StartOptions(run_dir=tmp_path, restart=True))  # it is still running
    first.release(0)
    second = begin(StartOptions(run_dir=tmp_path, restart=True), OTHER)
    assert second.number == 2
    assert sealed(second.run) == (2, [])
    assert "epochs = 3" in second.run.job.read_text()
    aside = tmp_path / "before-0002"
    assert {path.name for path in aside.iterdir()} == {
        *(path.name for path in first.run.written if path.suffix),
        *("checkpoints", "model"),
    }
    assert (aside / "checkpoints" / "step-000010-a0001").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("attempts", "before-0002", "job.toml", "notes.txt")
    }


def test_a_requeued_job_never_begins_anew(tmp_path, monkeypatch):
    # The same command line, --restart included, runs again in each life of the job.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    where = StartOptions(run_dir=tmp_path, restart=True)
    first = begin(where)
    first.run.train_table.write_text("rows")
    first.release(75)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = begin(where)
    assert second.run.train_table.read_text() == "rows"
    assert sealed(second.run) == (1, [])


def test_a_requeued_job_finds_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    where = StartOptions(tmp_path)
    mine = begin(where)
    mine.release(75)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    newer = begin(where)
    newer.release(75)
    other_job = begin(where, OTHER)
    other_job.release(75)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert begin(where).run.path == mine.run.path
    # Not its own: the newest unfinished run of the same job that nobody runs.
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    again = begin(where)
    assert again.run.path == newer.run.path
    monkeypatch.setenv("SLURM_JOB_ID", "10")
    assert begin(where).run.path not in (mine.run.path, newer.run.path, other_job.run.path)


def test_an_unfinished_run_without_a_ledger_is_refused(tmp_path):
    run = begin(StartOptions(run_dir=tmp_path / "made")).run
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "job.toml").write_text(run.job.read_text())
    (folder / "train.csv").write_text("step\n1\n")
    with pytest.raises(DataError, match="older spantune"):
        acquire_run(JOB, StartOptions(run_dir=folder))
    assert (folder / "train.csv").read_text() == "step\n1\n"


@pytest.mark.parametrize("text", ["", "name = ", "name = 5\n", "\0", "a = " + "[" * 100_000])
def test_a_record_that_is_none_is_refused(tmp_path, text):
    prepare(RunDir(tmp_path), JOB)
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(DataError, match=r"job\.toml: is not the record of a run"):
        acquire_run(JOB, StartOptions(run_dir=tmp_path))


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="File exists"):
        acquire_run(JOB, StartOptions(run_dir=tmp_path / "file"))


def a_users_folder(folder: Path) -> dict[str, str]:
    """What a person may keep beside a job: names of ours, none of it made by us."""
    for name in ("model/notes.txt", "attempts/0001.json", "report.md", "train.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"tries": 3}')
    (folder / "job.toml").write_text(dump_job(JOB) + "# mine\n")
    return contents(folder)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("result", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        lambda folder: StartOptions(run_dir=folder),
        lambda folder: StartOptions(resume=folder),
        lambda folder: StartOptions(run_dir=folder, restart=True),
    ],
)
def test_a_folder_that_we_did_not_make_is_refused_and_stays(tmp_path, options, result):
    if result:
        (tmp_path / "result.json").write_text("{}")
    before = a_users_folder(tmp_path)
    with pytest.raises(DataError, match=r"is not a run that spantune made.*nothing was touched"):
        acquire_run(JOB, options(tmp_path))
    if result and not options(tmp_path).restart:
        with pytest.raises(DataError, match="nothing was touched"):
            finished_run(JOB, options(tmp_path))
    assert contents(tmp_path) == before


def test_a_job_file_alone_makes_no_run(tmp_path):
    (tmp_path / "job.toml").write_text("# mine\n" + dump_job(JOB))
    with pytest.raises(DataError, match=r"holds job\.toml and is not a run"):
        acquire_run(JOB, StartOptions(run_dir=tmp_path))
    assert contents(tmp_path) == {"job.toml": "# mine\n" + dump_job(JOB)}


def test_a_run_that_an_older_version_has_submitted_starts(tmp_path):
    (tmp_path / "job.toml").write_text(dump_job(JOB))
    (tmp_path / "slurm.json").write_text('{"job_id": "7", "output": "o", "submitted": "s"}')
    assert begin(StartOptions(run_dir=tmp_path)).number == 1


def test_a_start_beside_one_that_is_making_its_entry_is_no_stranger(tmp_path):
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / ".0001.json.here.1.2").touch()
    assert begin(StartOptions(run_dir=tmp_path)).number == 1


def test_a_restart_that_was_succeeded_puts_nothing_aside(tmp_path, monkeypatch):
    """It is frozen just before, and another start finishes the run meanwhile."""
    begin(StartOptions(run_dir=tmp_path)).release(75)
    acquire = Lease.acquire.__func__

    def overtaken(cls, run, *, anew=False):
        lease = acquire(cls, run, anew=anew)
        shutil.copy(run.attempts / "0001.json", run.attempts / "0003.json")
        finish(run)
        return lease

    monkeypatch.setattr(Lease, "acquire", classmethod(overtaken))
    with pytest.raises(RunDirError, match="was taken over"):
        acquire_run(JOB, StartOptions(run_dir=tmp_path, restart=True))
    assert RunDir(tmp_path).finished()
    assert not (tmp_path / "before-0002").exists()
