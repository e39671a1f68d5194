"""The batch script under a real SLURM, with a stand-in for the run: who gets which signal, which
codes and states come out, and when a job is requeued."""

from __future__ import annotations

import json
import sys
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


def seen(run: Path, life: int, rank: int) -> dict[str, str]:
    path = run / f"life-{life}-{rank}"
    until(lambda: path.exists() and path.read_text() != "", f"{path} is there")
    return json.loads(path.read_text())


CODES = (64, 65, 69, 70, 71, 73, 76, 78)
PAIR = {"ranks_per_node": 2}
LIMIT = {"time": "1", "signal_seconds": 30}  # SLURM's shortest


@pytest.fixture(scope="module")
def scenes(cluster, jobs) -> dict[str | int, tuple[str, Path]]:
    """Jobs that something happens to. SLURM takes its time over each, so all of them begin at once,
    and the tests below look at how they end."""
    made: dict[str | int, tuple[str, Path]] = {
        "busy at the limit": jobs.submit("deaf", **LIMIT),
        "warned of the limit": jobs.submit("listens", **LIMIT),
        "killed rank": jobs.submit("listens", nodes=2, **PAIR),
        "warned": jobs.submit("listens", nodes=2),
        "warned early": jobs.submit("late", nodes=2),
        "requeued": jobs.submit("listens", **PAIR),
        "cancelled": jobs.submit("listens", nodes=2),
        "warned, then cancelled": jobs.submit("deaf"),
        "killed srun": jobs.submit("listens", nodes=2, **PAIR),
        "idle": jobs.submit("idle", lives=3),
        "no result": jobs.submit("0"),
        "no requeue": jobs.submit("75", requeue=False),
        "array": jobs.submit("listens", trials=2),
        **{code: jobs.submit(str(code), **PAIR) for code in CODES},
    }

    def warn(name: str) -> None:
        cluster.do("scancel", "--batch", "--signal=USR2", name)  # as --signal=B:USR2@... does

    def up(scene: str, ranks: int) -> str:
        for rank in range(ranks):
            seen(made[scene][1], 0, rank)
        return made[scene][0]

    cluster.kill(up("killed rank", 4), sys.executable)
    cluster.kill(up("killed srun", 4), "srun ")
    for scene in ("warned", "warned early"):
        warn(up(scene, 2))
    cluster.do("scontrol", "requeue", up("requeued", 2))
    cluster.do("scancel", up("cancelled", 2))
    warn(up("warned, then cancelled", 1))
    job, run = made["array"]
    for index in (0, 1):
        seen(run / f"trial-{index}", 0, 0)
    warn(f"{job}_1")
    return made


def outcome(cluster: Cluster, job: str) -> tuple[str, str, str]:
    """State, exit code and number of requeues of a job, once it has ended."""
    end = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    cluster.leaves_nothing(job)
    return end["JobState"], end["ExitCode"], end["Restarts"]


def first_signal(run: Path, rank: int) -> str:
    return (run / f"signals-0-{rank}").read_text().split()[0]


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
    assert "to go on: sbatch" in (run / f"slurm-{job}.out").read_text()


def test_scancel_saves_and_never_requeues(cluster, scenes):
    job, run = scenes["cancelled"]
    state, _, restarts = outcome(cluster, job)
    assert (state, restarts) == ("CANCELLED", "0")
    for rank in (0, 1):
        assert first_signal(run, rank) == "SIGTERM"
    assert not list(run.glob("life-1-*"))


def test_a_cancel_after_a_warning_is_a_cancel(cluster, scenes):
    job, run = scenes["warned, then cancelled"]
    until(lambda: (run / "signals-0-0").exists(), "the warning has come")
    cluster.do("scancel", job)
    state, _, restarts = outcome(cluster, job)
    assert (state, restarts) == ("CANCELLED", "0")


def test_scontrol_requeue(cluster, scenes):
    job, run = scenes["requeued"]
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    assert first_signal(run, 1) == "SIGTERM"


def test_a_killed_srun_leaves_no_rank(cluster, scenes):
    assert outcome(cluster, scenes["killed srun"][0]) == ("FAILED", "137:0", "0")


def test_one_trial_of_an_array_is_requeued_alone(cluster, scenes):
    job, run = scenes["array"]
    names = [f"{job}_{index}" for index in (0, 1)]
    until(lambda: (run / "trial-1" / "result.json").exists(), "the second trial has gone on")
    assert cluster.state(names[0]) == "RUNNING"
    assert not (run / "trial-0" / "signals-0-0").exists()
    cluster.do("scancel", names[0])
    assert outcome(cluster, names[1]) == ("COMPLETED", "0:0", "1")
    assert cluster.show(names[0])["Restarts"] == "0"
    assert (run / f"slurm-{job}_1.out").read_text().count(", start ") == 2


def test_a_killed_rank_takes_the_others_with_it(cluster, scenes):
    # These do not notice, as real ones would: after a minute they are killed.
    assert outcome(cluster, scenes["killed rank"][0]) == ("FAILED", "137:0", "0")


def test_the_time_limit(cluster, scenes):
    job, run = scenes["busy at the limit"]
    state, _, restarts = outcome(cluster, job)
    assert (state, restarts) == ("TIMEOUT", "0")
    signals = (run / "signals-0-0").read_text().split()
    assert (signals[0], signals[-1]) == ("SIGUSR2", "SIGTERM")


def test_the_warning_before_the_time_limit(cluster, scenes):
    job, run = scenes["warned of the limit"]
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    assert first_signal(run, 0) == "SIGUSR2"


def test_preemption_saves_requeues_and_goes_on(cluster, jobs, scenes):
    job, run = jobs.submit("listens", nodes=2, **PAIR)
    for rank in range(4):
        seen(run, 0, rank)
    urgent = cluster.step("sleep 1", partition="high", nodes=2, ntasks_per_node=16)
    assert outcome(cluster, urgent)[0] == "COMPLETED"
    assert outcome(cluster, job) == ("COMPLETED", "0:0", "1")
    for rank in range(4):
        assert first_signal(run, rank) == "SIGUSR2"
