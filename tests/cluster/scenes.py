"""Batch scripts with a stand-in for the run, and what happens to them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from runner.job.schema import Slurm
from runner.slurm.client import sbatch
from runner.slurm.script import sbatch_script, script_options

from .cluster import Cluster, until

STUB = Path(__file__).with_name("stub.py")


class Jobs:
    """Submits the script of a run that does what a plan says."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.count = cluster, folder, 0

    def submit(self, plan: str, *, lives: int = 3, trials: int = 0, **section) -> Scene:
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


def seen(run: Path, life: int, rank: int) -> dict[str, str]:
    path = run / f"life-{life}-{rank}"
    until(lambda: path.exists() and path.read_text() != "", f"{path} is there", every=0.1)
    return json.loads(path.read_text())


Scene = tuple[str, Path]  # a job's number, and its run folder
CODES = (64, 65, 69, 70, 71, 73, 76, 78)
PAIR = {"ranks_per_node": 2}
LIMIT = {"time": "1", "signal_seconds": 30}  # SLURM's shortest
EARLY = {"time": "10", "signal_seconds": 590}  # at SLURM's first look, long before the limit


def submit_all(jobs: Jobs) -> dict[str | int, Scene]:
    """Submit the jobs that something happens to. SLURM takes its time over each, so all of them are
    submitted at once; `test_batch` looks at how they end, `test_waits` at those that take
    minutes."""
    return {
        "busy at the limit": jobs.submit("deaf", **LIMIT),
        "warned of the limit": jobs.submit("listens", **EARLY),
        "killed rank": jobs.submit("listens", nodes=2, **PAIR),
        "preempted": jobs.submit("listens", nodes=2, partition="p5", **PAIR),
        "killed by preemption": jobs.submit("listens", nodes=2, partition="cancel5", **PAIR),
        "killed by preemption, no requeue": jobs.submit(
            "listens", partition="cancel5", requeue=False
        ),
        "killed by preemption, refused": jobs.submit("listens", partition="cancel5"),
        "killed by preemption, array": jobs.submit("listens", partition="cancel5", trials=1),
        "grace runs out": jobs.submit("deaf", partition="cancel6"),
        "cancelled in its grace": jobs.submit("deaf", partition="cancel6"),
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


def disturb(cluster: Cluster, made: dict[str | int, Scene]) -> Iterator[tuple[str | int, Scene]]:
    """Let it happen; tells of each scene that its end can be waited for."""

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
    up("preempted", 4)
    up("killed by preemption", 4)
    up("killed by preemption, no requeue", 1)
    cluster.do("scontrol", "update", f"JobId={up('killed by preemption, refused', 1)}", "Requeue=0")
    seen(made["killed by preemption, array"][1] / "trial-0", 0, 0)
    cluster.step("sleep 1", partition="urgent5", nodes=2, ntasks_per_node=32)
    up("grace runs out", 1)
    up("cancelled in its grace", 1)
    cluster.step("sleep 1", partition="urgent6", nodes=2, ntasks_per_node=32)
    job, run = made["cancelled in its grace"]
    until(lambda: (run / "signals-0-0").exists(), "it has been told that it is preempted")
    cluster.do("scancel", job)
    job, run = made["array"]
    for index in (0, 1):
        seen(run / f"trial-{index}", 0, 0)
    warn(f"{job}_1")
    yield from made.items()


def outcome(cluster: Cluster, job: str) -> tuple[str, str, str]:
    """State, exit code and number of requeues of a job, once it has ended."""
    end = cluster.wait(job)
    cluster.leaves_nothing(job)
    return end["JobState"], end["ExitCode"], end["Restarts"]


def first_signal(run: Path, rank: int) -> str:
    return (run / f"signals-0-{rank}").read_text().split()[0]
