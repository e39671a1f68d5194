"""Talking to SLURM's commands: what is asked, what comes back, and what if nothing does."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from runner.errors import DataError, SlurmError, SlurmTimeout
from runner.slurm import client as slurm_jobs
from runner.slurm.client import (
    Submission,
    job_states,
    never_starts,
    read_submission,
    sbatch,
    scancel,
    write_submission,
)

SUBMISSION = Submission("17", 3, "/r/slurm-17_3.out", "2026-11-25", "login", {"nodes": 1}, None, [])


def test_sbatch_returns_the_number(fake_slurm, tmp_path):
    calls = fake_slurm(sbatch="echo '17;cluster'")
    assert sbatch(tmp_path / "submit.sh", []) == "17"
    assert calls.read_text() == f"sbatch --parsable {tmp_path}/submit.sh\n"


def test_a_refusal_is_slurms_own_words_in_one_line(fake_slurm, tmp_path):
    words = r"sbatch: error: invalid partition: x\nsbatch: error: No \033[1m way\n"
    fake_slurm(sbatch=f"printf '{words}' >&2; exit 1")
    with pytest.raises(SlurmError) as caught:
        sbatch(tmp_path, [])
    assert str(caught.value) == "SLURM refuses the job: invalid partition: x; No \\x1b[1m way"
    assert caught.value.exit_code == 72


def test_no_slurm_here(fake_slurm, tmp_path):
    fake_slurm()
    for ask in (lambda: sbatch(tmp_path, []), lambda: job_states(["1"]), lambda: scancel("1")):
        with pytest.raises(SlurmError, match="is not on the path: this machine is no login node"):
            ask()


def test_a_silent_controller_is_not_waited_for(fake_slurm, monkeypatch):
    monkeypatch.setattr(slurm_jobs, "SLURM_ANSWER_S", 0.2)
    fake_slurm(squeue="exec sleep 5")
    with pytest.raises(SlurmError, match="squeue has not answered"):
        job_states(["17"])


def test_variables_that_would_make_another_job_are_not_passed_on(fake_slurm, tmp_path, monkeypatch):
    kept = {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/h", "SBATCH_EXPORT": "ALL"}
    names = (
        *("SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SLURM_NTASKS", "SLURM_MEM_PER_CPU"),
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS"),
    )
    dropped = dict.fromkeys(names, "7")
    for name, value in (kept | dropped).items():
        monkeypatch.setenv(name, value)
    fake_slurm(sbatch="env >&2; exit 1")
    with pytest.raises(SlurmError) as caught:
        sbatch(tmp_path, ["partition", "time", "job-name"])
    for name, value in kept.items():
        assert f"{name}={value}" in str(caught.value)
    for name in dropped:
        assert f"{name}=" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "variables"),
    [
        ("requeue", ["SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"]),
        ("no-requeue", ["SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"]),
        ("mem", ["SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"]),
    ],
)
def test_the_opposite_of_an_option_is_not_passed_on(
    fake_slurm, tmp_path, monkeypatch, option, variables
):
    for name in variables:
        monkeypatch.setenv(name, "1")
    fake_slurm(sbatch="env >&2; exit 1")
    with pytest.raises(SlurmError) as caught:
        sbatch(tmp_path, [option])
    assert "SBATCH_" not in str(caught.value)
    with pytest.raises(SlurmError) as caught:
        sbatch(tmp_path, ["partition"])
    assert all(f"{name}=1" in str(caught.value) for name in variables)


@pytest.mark.parametrize(
    "answer",
    [
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv' >&2",
        "exec sleep 5",
    ],
)
def test_a_job_that_slurm_may_have_taken_is_not_called_refused(
    fake_slurm, tmp_path, monkeypatch, answer
):
    monkeypatch.setattr(slurm_jobs, "SBATCH_ANSWER_S", 0.2)
    fake_slurm(sbatch=f"{answer}; exit 1")
    with pytest.raises(SlurmTimeout, match="squeue --me") as caught:
        sbatch(tmp_path, [])
    assert caught.value.exit_code == 72


def test_what_could_not_start_now(fake_slurm, tmp_path):
    calls = fake_slurm(sbatch="echo 'allocation failure: Requested node' >&2; exit 1")
    assert never_starts(tmp_path, []) == "Requested node"
    assert "--test-only" in calls.read_text()
    fake_slurm(sbatch="echo 'sbatch: Job 18 to start at noon' >&2")
    assert never_starts(tmp_path, []) is None


def test_states_of_jobs(fake_slurm):
    calls = fake_slurm(
        squeue="echo '17|RUNNING|None|1:02:03|n[1-2]'; echo '18_3|PENDING|Resources|10:00|';"
        " echo '19|COMPLETED|None|0:00|n1'; echo '18_4|PENDING|x|1|'",
        sacct="echo '20|CANCELLED by 1000'; echo '20.batch|FAILED'; echo '18_4|FAILED'",
    )
    jobs = job_states(["17", "18_3", "19", "20", "21"])
    assert {name: job.state for name, job in jobs.items()} == {
        "17": "RUNNING",
        "18_3": "PENDING",
        "19": "COMPLETED",
        "20": "CANCELLED",
    }
    assert (jobs["17"].time_left, jobs["17"].nodes) == ("1:02:03", "n[1-2]")
    assert [name for name, job in jobs.items() if job.ended] == ["19", "20"]
    assert [name for name, job in jobs.items() if job.waits] == ["18_3"]
    assert "--jobs=20,21" in calls.read_text().splitlines()[1]  # only the others are looked up


@pytest.mark.parametrize(
    "sacct", ["echo 'Slurm accounting storage is disabled' >&2; exit 1", "exec sleep 5", None]
)
def test_no_accounting_is_no_error(fake_slurm, sacct, monkeypatch):
    monkeypatch.setattr(slurm_jobs, "SLURM_ANSWER_S", 0.3)
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    fake_slurm(squeue=unknown, **({"sacct": sacct} if sacct else {}))
    assert job_states(["17"]) == {}
    assert job_states([]) == {}


def test_another_error_of_squeue_is_one(fake_slurm):
    words = "slurm_load_jobs error: Unable to contact slurm controller"
    fake_slurm(squeue=f"echo '{words}' >&2; exit 1")
    with pytest.raises(SlurmError) as caught:
        job_states(["17"])
    assert str(caught.value) == f"squeue: {words}"


def test_scancel(fake_slurm):
    calls = fake_slurm(scancel="exit 0")
    scancel("17_3")
    assert calls.read_text() == "scancel 17_3\n"
    fake_slurm(scancel="echo 'scancel: error: Kill job error: Access denied' >&2; exit 1")
    with pytest.raises(SlurmError, match="does not cancel job 17: Kill job error: Access denied"):
        scancel("17")


def test_the_record_of_a_submission(tmp_path):
    path = tmp_path / "slurm.json"
    assert read_submission(path) is None
    write_submission(path, SUBMISSION)
    assert read_submission(path) == SUBMISSION
    assert SUBMISSION.name == "17_3"
    bad_ids = [{"job_id": name} for name in (17, "--user=root", "17;x", "", "17\n")]
    wrong = [asdict(SUBMISSION) | change for change in (*bad_ids, {"index": -1})]
    for text in ("{", "[]", json.dumps({"job_id": "1"}), *map(json.dumps, wrong)):
        path.write_text(text)
        with pytest.raises(DataError, match=r"slurm\.json: is damaged: "):
            read_submission(path)
