"""The batch script under a real SLURM, with a stand-in for the run: who gets which signal, which
codes and states come out, and when a job is requeued."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from runner.job import Slurm
from runner.slurm import sbatch_script, script_options
from runner.slurm_jobs import sbatch

from .conftest import Cluster, until

STUB = Path(__file__).with_name("stub.py")


class Jobs:
    """Submits the script of a run that does what a plan says."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.count = cluster, folder, 0

    def submit(self, plan: str, *, lives: int = 3, trials: int = 0, **section) -> tuple[str, Path]:
        """Return the job's number and its run folder."""
        self.count += 1
        run = self.folder / f"the run {self.count}"  # spaces are quoted on the way
        run.mkdir()
        names = [f"trial-{number}" for number in range(trials)]
        for name in names:
            (run / name).mkdir()
        settings = {"PLAN": plan, "LIVES": str(lives), "A_SETTING": "a:b"}
        text = sbatch_script(
            Slurm.model_validate({"environment": settings, **section}),
            name="stub",
            folder=run,
            command=[sys.executable, "-u", str(STUB)],
            written_by="test",
            trials=names,
            indices=range(trials),
        )
        (run / "submit.sh").write_text(text)
        return sbatch(run / "submit.sh", script_options(text)), run


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def timed(jobs) -> dict[str, tuple[str, Path]]:
    """Jobs that meet their time limit, SLURM's shortest; they wait while other tests run."""
    limit = {"time": "1", "signal_seconds": 30}
    return {plan: jobs.submit(plan, **limit) for plan in ("deaf", "listens")}


def seen(run: Path, life: int, rank: int) -> dict[str, str]:
    path = run / f"life-{life}-{rank}"
    until(lambda: path.exists() and path.read_text() != "", f"{path} is there")
    return json.loads(path.read_text())


def test_two_nodes(cluster, jobs, timed):
    job, run = jobs.submit("finish", nodes=2, cpus_per_task=1, gpus_per_node=1)
    end = cluster.wait(job, "COMPLETED", "FAILED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "0")
    ranks = [seen(run, 0, rank) for rank in (0, 1)]
    assert [rank["SLURMD_NODENAME"] for rank in ranks] == ["n1", "n2"]
    for number, rank in enumerate(ranks):
        assert (rank["SLURM_PROCID"], rank["SLURM_NTASKS"]) == (str(number), "2")
        assert rank["MASTER_ADDR"] == "127.0.0.1"  # what scontrol says of node n1
        assert 10000 <= int(rank["MASTER_PORT"]) < 30100
        assert rank["CUDA_VISIBLE_DEVICES"] == "0"
        assert (rank["OMP_NUM_THREADS"], rank["RANK"], rank["A_SETTING"]) == ("1", None, "a:b")
        assert rank["cwd"] == str(run)
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    output = (run / f"slurm-{job}.out").read_text()
    assert f"job {job}, start 1 on n[1-2]" in output
    cluster.leaves_nothing(job)


def test_two_jobs_meet_at_different_ports(cluster, jobs):
    made = [jobs.submit("finish") for _ in range(2)]
    for job, _ in made:
        cluster.wait(job, "COMPLETED")
    ports = {seen(run, 0, 0)["MASTER_PORT"] for _, run in made}
    assert len(ports) == 2


@pytest.mark.parametrize("code", [64, 65, 69, 70, 73, 78])
def test_codes_are_the_jobs_and_never_requeued(cluster, jobs, code):
    # The ranks end a second apart: the first must not kill the other.
    job, run = jobs.submit(str(code), ranks_per_node=2)
    end = cluster.wait(job, "FAILED", "COMPLETED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert not list(run.glob("life-1-*"))


def test_success_needs_a_result(cluster, jobs):
    job, run = jobs.submit("0")
    assert cluster.wait(job, "FAILED", "COMPLETED")["ExitCode"] == "70:0"
    assert "there is no result.json" in (run / f"slurm-{job}.out").read_text()


@pytest.mark.parametrize("plan", ["listens", "late"])
def test_a_warning_saves_and_requeues(cluster, jobs, plan):
    job, run = jobs.submit(plan, nodes=2)
    seen(run, 0, 1)
    cluster.do("scancel", "--batch", "--signal=USR2", job)  # as --signal=B:USR2@... delivers it
    end = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1")
    for rank in (0, 1):
        assert (run / f"signals-0-{rank}").read_text().split()[0] == "SIGUSR2"
        assert seen(run, 1, rank)
    output = (run / f"slurm-{job}.out").read_text()
    assert "start 1 on" in output
    assert "start 2 on" in output


def test_no_requeue_without_progress(cluster, jobs):
    job, run = jobs.submit("idle", lives=3)
    end = cluster.wait(job, "FAILED", "COMPLETED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "75:0", "2")
    assert len(list(run.glob("life-*-0"))) == 3


def test_no_requeue_where_the_job_does_not_want_it(cluster, jobs):
    job, run = jobs.submit("75", requeue=False)
    end = cluster.wait(job, "FAILED", "COMPLETED")
    assert (end["JobState"], end["ExitCode"], end["Requeue"]) == ("FAILED", "75:0", "0")
    assert "to go on: sbatch" in (run / f"slurm-{job}.out").read_text()


def test_scancel_saves_and_never_requeues(cluster, jobs):
    job, run = jobs.submit("listens", nodes=2)
    seen(run, 0, 1)
    cluster.do("scancel", job)
    cluster.wait(job, "CANCELLED")
    cluster.leaves_nothing(job)
    for rank in (0, 1):
        assert (run / f"signals-0-{rank}").read_text().split()[0] == "SIGTERM"
    end = cluster.show(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    assert not list(run.glob("life-1-*"))


def test_a_cancelled_warning_is_a_cancel(cluster, jobs):
    job, run = jobs.submit("deaf")
    seen(run, 0, 0)
    cluster.do("scancel", "--batch", "--signal=USR2", job)
    until(lambda: (run / "signals-0-0").exists(), "the warning has come")
    cluster.do("scancel", job)
    cluster.wait(job, "CANCELLED")
    cluster.leaves_nothing(job)
    assert cluster.show(job)["Restarts"] == "0"


def test_scontrol_requeue(cluster, jobs):
    job, run = jobs.submit("listens", ranks_per_node=2)
    seen(run, 0, 1)
    cluster.do("scontrol", "requeue", job)
    end = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert (run / "signals-0-1").read_text().split()[0] == "SIGTERM"


def test_a_killed_srun_ends_the_job(cluster, jobs):
    job, run = jobs.submit("listens", ranks_per_node=2, nodes=2)
    seen(run, 0, 3)
    cluster.kill(job, "srun ")
    end = cluster.wait(job, "FAILED", "COMPLETED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "137:0", "0")
    cluster.leaves_nothing(job)


def test_a_killed_rank_takes_the_others_with_it(cluster, jobs):
    job, run = jobs.submit("listens", ranks_per_node=2, nodes=2)
    seen(run, 0, 3)
    began = time.monotonic()
    cluster.kill(job, sys.executable)
    end = cluster.wait(job, "FAILED", "COMPLETED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "137:0", "0")
    assert time.monotonic() - began > 30  # the others had their minute: these do not notice
    cluster.leaves_nothing(job)


def test_one_trial_of_an_array_is_requeued_alone(cluster, jobs):
    job, run = jobs.submit("listens", trials=2)
    names = [f"{job}_{index}" for index in (0, 1)]
    for index in (0, 1):
        seen(run / f"trial-{index}", 0, 0)
    cluster.do("scancel", "--batch", "--signal=USR2", names[1])
    until(lambda: (run / "trial-1" / "result.json").exists(), "the second trial has gone on")
    assert cluster.state(names[0]) == "RUNNING"
    assert not (run / "trial-0" / "signals-0-0").exists()
    cluster.do("scancel", names[0])
    cluster.wait(names[1], "COMPLETED")
    assert (cluster.show(names[1])["Restarts"], cluster.show(names[0])["Restarts"]) == ("1", "0")
    assert (run / f"slurm-{job}_1.out").read_text().count("start") == 2


def test_the_time_limit(cluster, timed):
    job, run = timed["deaf"]  # is still busy saving when its time is over
    end = cluster.wait(job, "TIMEOUT", "FAILED", "COMPLETED")
    assert (end["JobState"], end["Restarts"]) == ("TIMEOUT", "0")
    signals = (run / "signals-0-0").read_text().split()
    assert signals[0] == "SIGUSR2"
    assert signals[-1] == "SIGTERM"
    cluster.leaves_nothing(job)


def test_the_warning_before_the_time_limit(cluster, timed):
    job, run = timed["listens"]
    end = cluster.wait(job, "COMPLETED", "TIMEOUT", "FAILED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert (run / "signals-0-0").read_text().split()[0] == "SIGUSR2"


def test_preemption_saves_requeues_and_goes_on(cluster, jobs):
    job, run = jobs.submit("listens", nodes=2, ranks_per_node=2)
    seen(run, 0, 3)
    urgent = cluster.step("sleep 1", partition="high", nodes=2, ntasks_per_node=4)
    cluster.wait(urgent, "COMPLETED")
    end = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1")
    for rank in range(4):
        assert (run / f"signals-0-{rank}").read_text().split()[0] == "SIGUSR2"
