"""Real runs under SLURM and what happens to them. Each is a story that a thread of its own tells
from the beginning of the session on, in chapters; a test waits for the chapter that it looks at."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.run.folder import RunDir
from runner.slurm.client import read_submission

from .cluster import (
    CHECKOUT,
    ENDED,
    Cluster,
    freeze,
    is_alive,
    let_hear,
    signalled,
    thaw,
    until,
    waits,
)

DATA = CHECKOUT / "jobs" / "data"
JOB = """
name = "tiny"
seed = 7
[data]
train = "{data}/product_qa_train.json[:24]"
validation = "{data}/product_qa_validation.json[:10]"
max_length = 128
stride = 32
[model]
name = "{model}"
precision = "fp32"
[train]
epochs = 5
eval_every = 5
batch_size = 4
learning_rate = 1e-3
warmup = 0.1
log_every = 1
[slurm]
cpus_per_task = 1
[slurm.environment]
SPANTUNE_CACHE = "{cache}"
"""
ONE_NODE = ("--set", "slurm.ranks_per_node=2")
GPUS = ("--set", "slurm.gpus_per_node=2")  # of one node; not real ones
TWO_NODES = ("--set", "slurm.nodes=2")
QUEUED = ("--set", "slurm.partition=p2")  # its jobs wait for each other
DISTURBED = ("--set", "slurm.partition=p3")
BROKEN = ("--set", "slurm.partition=p4")


class Story:
    """What a generator of chapters tells, each a name and what was seen: `story["the end"]` waits
    for that chapter."""

    def __init__(self, chapters: Iterator[tuple[Any, Any]]) -> None:
        self._told: dict[Any, Any] = {}
        self._news = threading.Condition()
        self._over, self._error = False, None
        threading.Thread(target=self._tell, args=(chapters,), daemon=True).start()

    def _tell(self, chapters: Iterator[tuple[Any, Any]]) -> None:
        try:
            for name, seen in chapters:
                with self._news:
                    self._told[name] = seen
                    self._news.notify_all()
        except BaseException as error:
            self._error = error
        with self._news:
            self._over = True
            self._news.notify_all()

    def __getitem__(self, name: Any) -> Any:
        with self._news:
            self._news.wait_for(lambda: name in self._told or self._over)
            if name not in self._told:
                raise AssertionError(f"it did not come to {name!r}") from self._error
            return self._told[name]


@dataclass(frozen=True)
class Seen:
    """A run at the end of a chapter.

    Attributes:
        run: the run.
        job: all that SLURM tells of its job.
        ends: exit codes of those of its lives that ended by themselves in this chapter.
        finished: whether it has a result.
        output: what the job has said.
        status: what `spantune status` says.
        said: what the command said that the chapter is about.
        nodes: those that its lives ran on, one after the other, where the chapter is about that.
    """

    run: Run
    job: dict[str, str]
    ends: list[int]
    finished: bool
    output: str
    status: str
    said: str = ""
    nodes: tuple[str, ...] = ()

    @property
    def end(self) -> tuple[str, str, str]:
        """State, exit code and number of requeues of the job."""
        return self.job["JobState"], self.job["ExitCode"], self.job["Restarts"]

    @property
    def stops(self) -> list[str]:
        """What the lives of the job say that they were stopped by."""
        return re.findall(r"stopped by (SIG\w+|a signal to another rank)", self.output)


class Run:
    """A run and the job that it is in now."""

    def __init__(self, cluster: Cluster, job_file: Path, folder: Path) -> None:
        self.cluster, self.folder, self.job = cluster, RunDir(folder), ""
        self._job_file, self._lives = job_file, 0

    def submit(self, *options: str) -> None:
        """Submit it; a run that has begun goes on."""
        said = self.submitted(*options)
        found = re.search(r": job (\d+), ", said)
        assert found, said
        self.job = found[1]

    def submitted(self, *options: str) -> str:
        """What `submit` says of it."""
        words = ("submit", self._job_file, "--run-dir", self.folder.path, *options)
        return self.cluster.spantune(*words).stdout

    def steps(self) -> list[int]:
        return [int(row["step"]) for row in rows(self.folder.train_table)]

    def hold(self, more: int = 3) -> list[int]:
        """Wait until its newest life has trained a few steps more than are in the table now, and
        freeze its ranks there, so that it does not end before something has happened to it; returns
        the process ids of rank 0 and rank 1. Rank 0 is frozen where it waits for rank 1: what it
        has begun to write by then is written."""
        # A life that goes on first drops rows behind its checkpoint, so count what is added.
        enough = max(self.steps(), default=0) + more
        self.cluster.wait(self.job, "RUNNING", *ENDED)
        found: list[int] = []

        def come() -> bool:
            # Asked anew each time: a job that is just being requeued still counts its life before,
            # whose ranks go on where their node is lost.
            restarts = self.cluster.show(self.job)["Restarts"]
            life = {"SLURM_RESTART_COUNT": restarts} if restarts != "0" else {}
            numbers = (self.cluster.ranks(self.job, SLURM_PROCID=n, **life) for n in (0, 1))
            # Held is what is seen here: a rank that starts a program is there twice for a moment.
            found[:] = [pid for pids in numbers for pid in pids]
            return len(found) == 2 or self.is_over()

        until(come, f"job {self.job} has two ranks")
        looked = time.monotonic()
        while max(self.steps(), default=0) < enough:
            time.sleep(0.02)
            if time.monotonic() > looked + 2:
                looked = time.monotonic()
                assert all(map(is_alive, found)), self.output()
        assert len(found) == 2, self.output()
        freeze(found[1:])
        until(lambda: waits(found[0]) or not is_alive(found[0]), "rank 0 waits for rank 1", every=0)
        freeze(found[:1])
        assert [is_alive(pid) for pid in found] == [True, True], self.output()
        return found

    def is_over(self) -> bool:
        return self.cluster.state(self.job) not in ("PENDING", "RUNNING", "COMPLETING")

    def ends(self) -> list[int]:
        """Exit codes of all lives that have ended by themselves, in their order."""
        files = sorted(self.folder.attempts.glob("*.end.json"))
        return [json.loads(path.read_text())["exit_code"] for path in files]

    def goes_on(self, times: int, ends: int) -> None:
        """Wait until SLURM has begun it anew `times` times, after one more end than `ends`. SLURM
        counts a restart at once, while the life before it is still saving."""
        restarts = f"{times}"
        until(lambda: self.cluster.show(self.job)["Restarts"] == restarts, "it is requeued")
        until(lambda: len(self.ends()) > ends, "the life that is requeued ends")

    def result(self) -> dict[str, Any]:
        return json.loads(self.folder.result.read_text())

    def curve(self) -> list[tuple[str, str]]:
        return curve(self.folder)

    def output(self) -> str:
        submission = read_submission(self.folder.slurm)
        assert submission is not None
        path = Path(submission.output)
        return path.read_text() if path.exists() else ""

    def seen(self, *, ends: int = 0, **more: Any) -> Seen:
        """Look at it after a chapter that began when so many of its lives had ended."""
        status = self.cluster.spantune("status", self.folder.path, COLUMNS="200").stdout
        return Seen(
            run=self,
            job=self.cluster.show(self.job),
            ends=self.ends()[ends:],
            finished=self.folder.finished(),
            output=self.output(),
            status=" ".join(status.split()),
            **more,
        )

    def at_the_end(self, *, ends: int = 0, **more: Any) -> Seen:
        """Wait until its job has ended and nothing of it is left, and look at it."""
        self.cluster.wait(self.job)
        self.cluster.leaves_nothing(self.job)
        return self.seen(ends=ends, **more)


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"]]


def curve(folder: RunDir) -> list[tuple[str, str]]:
    """Steps and losses of a run, every digit of them."""
    return [(row["step"], row["loss_nats"]) for row in rows(folder.train_table)]


# ---- undisturbed


def calm(run: Run) -> Iterator[tuple[str, Seen]]:
    """On two nodes, and nobody disturbs it."""
    run.submit(*QUEUED, *TWO_NODES)
    yield "the end", run.at_the_end()


def plain(run: Run, job_file: Path) -> Iterator[tuple[str, Seen]]:
    """The same with srun alone, and no script of ours."""
    main = CHECKOUT / "runner" / "main.py"
    command = f"srun {sys.executable} -u {main} {job_file} --run-dir {run.folder.path} --threads 1"
    run.job = run.cluster.step(
        f"export SPANTUNE_CACHE={job_file.parent}/cache; {command}",
        partition="p2",
        ntasks=2,
        nodes=1,
    )
    end = run.cluster.wait(run.job)
    run.cluster.leaves_nothing(run.job)
    yield "the end", Seen(run, end, run.ends(), run.folder.finished(), output="", status="")


@dataclass(frozen=True)
class Swept:
    """A sweep that has been submitted, at its end.

    Attributes:
        folder: of the sweep.
        said: what `submit` said.
        jobs: what SLURM tells of the trials that were submitted, by their array index.
        results: of all trials that have one, by their names.
        report, status: what these commands say.
    """

    folder: Path
    said: str
    jobs: dict[int, dict[str, str]]
    results: dict[str, dict[str, Any]]
    report: str
    status: str


def sweep(cluster: Cluster, job_file: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """An array of two trials, each on one node with a (fake) GPU for each rank; then one of them
    has lost its result."""

    words = ("submit", job_file, "--run-dir", folder, *QUEUED, *GPUS)

    def submit(*indices: int) -> Swept:
        said = cluster.spantune(*words).stdout
        found = re.search(r"job (\d+), an array of", said)
        assert found, said
        jobs = {}
        for index in indices:
            name = f"{found[1]}_{index}"
            # What is looked for at the end is found as long as it is there.
            until(lambda name=name: len(cluster.ranks(name)) == 2, f"trial {name} has two ranks")
        for index in indices:
            name = f"{found[1]}_{index}"
            jobs[index] = cluster.wait(name)
            cluster.leaves_nothing(name)
        return Swept(
            folder=folder,
            said=said,
            jobs=jobs,
            results={
                path.parent.name: json.loads(path.read_text())
                for path in folder.glob("*/result.json")
            },
            report=cluster.spantune("report", "--sweep", folder).stdout,
            status=cluster.spantune("status", folder, COLUMNS="200").stdout,
        )

    yield "both", submit(0, 1)
    names = [entry["name"] for entry in json.loads((folder / "sweep.json").read_text())["trials"]]
    (folder / names[1] / "result.json").unlink()
    yield "one again", submit(1)
    yield "nothing left", cluster.spantune(*words).stdout


# ---- disturbed again and again


def preempt(cluster: Cluster, ranks: list[int], number: int) -> None:
    """Let a job of a higher tier take both nodes, which the ranks hear of by this signal."""
    urgent = cluster.step("sleep 1", partition="urgent3", nodes=2, ntasks_per_node=32)
    let_hear(ranks, number)
    cluster.wait(urgent, "COMPLETED")


def disturbed(run: Run) -> Iterator[tuple[str, Seen]]:
    """On two nodes; what SLURM and people do to running jobs, and still the same bits."""
    cluster, options = run.cluster, (*DISTURBED, *TWO_NODES)
    run.submit(*options)
    ranks = run.hold()
    said = cluster.spantune("cancel", run.folder.path).stdout
    let_hear(ranks, signal.SIGTERM)
    yield "cancelled", run.at_the_end(said=said)

    ends = len(run.ends())
    run.submit(*options)
    ranks = run.hold()
    os.kill(ranks[1], signal.SIGKILL)
    thaw(ranks)
    yield "a rank is killed", run.at_the_end(ends=ends)

    ends = len(run.ends())
    run.submit(*TWO_NODES, "--set", "slurm.partition=cancel3")
    ranks = run.hold()
    preempt(cluster, ranks, signal.SIGTERM)
    run.goes_on(1, ends)
    yield "preempted by CANCEL", run.seen(ends=ends)

    ends = len(run.ends())
    ranks = run.hold()
    cluster.do("scancel", run.job)
    let_hear(ranks, signal.SIGTERM)
    yield "cancelled after it was preempted", run.at_the_end(ends=ends)

    # Later in this job SLURM warns of a time limit.
    ends = len(run.ends())
    run.submit(*options, "--set", "slurm.time=60", "--set", "slurm.signal_seconds=600")
    ranks = run.hold()
    cluster.do("scontrol", "requeue", run.job)
    let_hear(ranks, signal.SIGTERM)
    run.goes_on(1, ends)
    yield "requeued", run.seen(ends=ends)

    ends = len(run.ends())
    ranks = run.hold()
    preempt(cluster, ranks, signal.SIGUSR2)
    run.goes_on(2, ends)
    yield "preempted", run.seen(ends=ends)

    ends = len(run.ends())
    ranks = run.hold()
    # SLURM looks at time limits every 30 s, and warns at a look too early rather than too late: at
    # the next one, ten minutes before it would kill the run.
    cluster.do("scontrol", "update", f"JobId={run.job}", "EndTime=now+620")
    signalled(ranks, signal.SIGUSR2)
    cluster.do("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")  # one warning is enough
    thaw(ranks)
    run.goes_on(3, ends)
    yield "warned of its time limit", run.seen(ends=ends)

    ends = len(run.ends())
    yield "the end", run.at_the_end(ends=ends)


# ---- killed, and given to another node


def broken(run: Run) -> Iterator[tuple[str, Seen]]:
    """On one node, with a (fake) GPU for each rank: what ends it without a chance to save."""
    cluster = run.cluster

    # It has a checkpoint, and stands still past its time limit whatever it is sent.
    run.submit(*BROKEN, *GPUS, "--set", "train.checkpoint_minutes=0.01")
    until(lambda: any(run.folder.checkpoints.glob("step-*")) or run.is_over(), "it has saved")
    ranks = run.hold()
    cluster.do("scontrol", "update", f"JobId={run.job}", "EndTime=now+5")
    while alive := [pid for pid in ranks if is_alive(pid)]:
        freeze(alive)  # again and again: SLURM lets go on what it is about to kill
        time.sleep(0.002)
    yield "killed at its time limit", run.at_the_end()

    ends = len(run.ends())
    run.submit(*BROKEN, *TWO_NODES)
    ranks = run.hold()
    cluster.kill(run.job, "srun ")
    thaw(ranks)
    yield "its launcher is killed", run.at_the_end(ends=ends)

    ends = len(run.ends())
    run.submit(*BROKEN, *GPUS)
    ranks = run.hold()
    node = cluster.show(run.job)["BatchHost"]
    frozen = list(cluster.processes(run.job))
    cluster.lose_node(node)
    freeze(frozen)
    until(lambda: cluster.show(run.job)["Restarts"] == "1", "SLURM gives the node up")
    second = run.hold()
    other = cluster.show(run.job)["BatchHost"]
    # It comes back, and its ranks want to go on. Their srun does not: it would have SLURM end the
    # step that it began, and that of the new life has the same number.
    thaw(ranks)
    until(lambda: len(run.ends()) > ends, "the first life notices that it was succeeded")
    yield "a node is lost", run.seen(ends=ends, nodes=(node, other))

    ends = len(run.ends())
    thaw(second)
    cluster.find_node(node)
    cluster.wait(run.job)
    thaw(frozen)
    yield "the end", run.at_the_end(ends=ends)
