"""The batch script under a real SLURM, with a stand-in for the run: who gets which signal, which
codes and states come out, and when a job is requeued."""

from __future__ import annotations

import pytest

from runner.slurm.client import job_states

from .cluster import until
from .scenes import CODES, first_signal, outcome, seen


def test_what_a_rank_gets(cluster, jobs):
    job, run = jobs.submit("finish", nodes=2, cpus_per_task=1, gpus_per_node=1)
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "0")
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
    assert f"job {job}, start 1 on n[1-2]" in (run / f"slurm-{job}.out").read_text()


def test_ranks_get_all_variables_whatever_the_submitter_exports(cluster, jobs, monkeypatch):
    monkeypatch.setenv("SBATCH_EXPORT", "SLURM_CONF,PATH,HOME")
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    job, run = jobs.submit("finish")
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "0")
    rank = seen(run, 0, 0)
    assert rank["MASTER_ADDR"] == "127.0.0.1"
    assert (rank["OMP_NUM_THREADS"], rank["A_SETTING"]) == ("1", "a:b")
    assert cluster.show(job)["Requeue"] == "1"


def test_jobs_meet_at_different_ports(scenes):
    ports = {seen(scenes[code][1], 0, 0)["MASTER_PORT"] for code in CODES}
    assert len(ports) == len(CODES)


@pytest.mark.parametrize("code", CODES)
def test_codes_are_the_jobs_and_never_requeued(cluster, scenes, code):
    # The ranks end a second apart: the first must not kill the other.
    job, run = scenes[code]
    assert outcome(cluster, job) == ("FAILED", f"{code}:0", "0")
    assert not list(run.glob("life-1-*"))


def test_success_needs_a_result(cluster, scenes):
    job, run = scenes["no result"]
    assert outcome(cluster, job) == ("FAILED", "70:0", "0")
    assert "there is no result.json" in (run / f"slurm-{job}.out").read_text()


@pytest.mark.parametrize("scene", ["warned", "warned early"])
def test_a_warning_saves_and_requeues(cluster, scenes, scene):
    job, run = scenes[scene]
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    for rank in (0, 1):
        assert first_signal(run, rank) == "SIGUSR2"
        assert seen(run, 1, rank)
    output = (run / f"slurm-{job}.out").read_text()
    assert "start 1 on" in output
    assert "start 2 on" in output


def test_no_requeue_without_progress(cluster, scenes):
    job, run = scenes["idle"]
    assert outcome(cluster, job) == ("FAILED", "75:0", "2")
    assert len(list(run.glob("life-*-0"))) == 3


def test_no_requeue_where_the_job_does_not_want_it(cluster, scenes):
    job, run = scenes["no requeue"]
    assert outcome(cluster, job) == ("FAILED", "75:0", "0")
    assert "to go on: spantune submit " in (run / f"slurm-{job}.out").read_text()


def test_scancel_saves_and_never_requeues(cluster, scenes):
    job, run = scenes["cancelled"]
    assert outcome(cluster, job) == ("CANCELLED", "75:0", "0")
    for rank in (0, 1):
        assert first_signal(run, rank) == "SIGTERM"
    assert not list(run.glob("life-1-*"))


def test_a_cancel_after_a_warning_is_a_cancel(cluster, scenes):
    job, run = scenes["warned, then cancelled"]
    until(lambda: (run / "signals-0-0").exists(), "the warning has come")
    cluster.do("scancel", job)
    assert outcome(cluster, job) == ("CANCELLED", "75:0", "0")


def test_scontrol_requeue(cluster, scenes):
    job, run = scenes["requeued"]
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    for rank in (0, 1):
        assert first_signal(run, rank) == "SIGTERM"


def test_preemption_by_cancel_saves_requeues_and_goes_on(cluster, scenes):
    job, run = scenes["killed by preemption"]
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    for rank in range(4):
        assert first_signal(run, rank) == "SIGTERM"
    output = (run / f"slurm-{job}.out").read_text()
    assert "DUE TO PREEMPTION" in output
    assert "go on with" not in output


def test_preemption_by_cancel_requeues_one_trial_of_an_array(cluster, scenes):
    job, run = scenes["killed by preemption, array"]
    assert outcome(cluster, f"{job}_0") == ("COMPLETED", "0:0", "1")
    assert first_signal(run / "trial-0", 0) == "SIGTERM"


def test_scancel_of_a_job_that_is_about_to_be_preempted_is_a_cancel(cluster, scenes):
    job, run = scenes["cancelled in its grace"]
    assert outcome(cluster, job) == ("CANCELLED", "75:0", "0")
    assert cluster.show(job)["PreemptTime"] != "None"
    assert "go on with" not in (run / f"slurm-{job}.out").read_text()


@pytest.mark.parametrize("why", ["no requeue", "refused"])
def test_preemption_by_cancel_says_how_to_go_on_where_it_must_not_requeue(cluster, scenes, why):
    job, run = scenes[f"killed by preemption, {why}"]
    assert outcome(cluster, job) == ("PREEMPTED", "75:0", "0")
    assert job_states([job])[job].state == "PREEMPTED"  # which `status` tells
    for log in (f"slurm-{job}.out", "log.txt"):
        assert (run / log).read_text().count("preempted; go on with: spantune submit ") == 1


def test_a_killed_srun_leaves_no_rank(cluster, scenes):
    assert outcome(cluster, scenes["killed srun"][0]) == ("FAILED", "137:0", "0")


def test_one_trial_of_an_array_is_requeued_alone(cluster, scenes):
    job, run = scenes["array"]
    names = [f"{job}_{index}" for index in (0, 1)]
    until(lambda: (run / "trial-1" / "result.json").exists(), "the second trial has gone on")
    assert cluster.state(names[0]) == "RUNNING"
    assert cluster.ranks(names[0])  # what is looked for is found as long as it is there
    assert not (run / "trial-0" / "signals-0-0").exists()
    cluster.do("scancel", names[0])
    assert outcome(cluster, names[1]) == ("COMPLETED", "0:0", "1")
    assert outcome(cluster, names[0]) == ("CANCELLED", "75:0", "0")
    assert (run / f"slurm-{job}_1.out").read_text().count(", start ") == 2
