"""Real training under a real SLURM: every end a job can come to, and the same weights to the bit
wherever it finishes. The tests of one run follow each other in the order of this file."""

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
from contextlib import suppress
from pathlib import Path

import pytest

from runner.rundir import RunDir
from runner.slurm_jobs import read_submission

from .cluster import CHECKOUT, Cluster, freeze, is_alive, is_pending, spantune, thaw, until

DATA = CHECKOUT / "jobs" / "data"
JOB = """
name = "tiny"
seed = 7
[data]
train = "{data}/product_qa_train.json[:60]"
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
TWO_NODES = ("--set", "slurm.nodes=2")


class Run:
    """A run and the job that it is in now."""

    def __init__(self, cluster: Cluster, job_file: Path, folder: Path, *options: str) -> None:
        self.cluster, self.folder = cluster, RunDir(folder)
        self._command = ("submit", job_file, "--run-dir", folder, *options)
        self.job = ""

    def submit(self) -> None:
        """Submit it; a run that has begun goes on."""
        said = spantune(*self._command).stdout
        found = re.search(r": job (\d+), ", said)
        assert found, said
        self.job = found[1]

    def steps(self) -> list[int]:
        return [int(row["step"]) for row in rows(self.folder.train_table)]

    def get_going(self, more: int = 3) -> None:
        """Wait until the newest life has trained a few steps more than are in the table now."""
        before = max(self.steps(), default=0)
        # A life that goes on first drops rows behind its checkpoint, so count what is added.
        until(lambda: max(self.steps(), default=0) >= before + more or self.is_over(), "it trains")
        assert not self.is_over(), self.output()

    def is_over(self) -> bool:
        return self.cluster.state(self.job) not in ("PENDING", "RUNNING", "COMPLETING")

    def ends(self) -> list[int]:
        """Exit codes of all lives that have ended by themselves, in their order."""
        files = sorted(self.folder.attempts.glob("*.end.json"))
        return [json.loads(path.read_text())["exit_code"] for path in files]

    def saved_and_requeued(self, times: int, ends: int) -> bool:
        """Whether SLURM has begun it anew `times` times, after one more end than `ends`, by 75.
        SLURM counts a restart at once, while the life before it is still saving."""
        until(lambda: self.cluster.show(self.job)["Restarts"] == f"{times}", "it is requeued")
        until(lambda: len(self.ends()) > ends, "the life that is requeued ends")
        return self.ends()[ends:] == [75]

    def stops(self, count: int) -> list[str]:
        """What the job says its lives were stopped by, once it says so of `count` of them."""
        words = r"stopped by (SIG\w+|a signal to another rank)"
        until(lambda: len(re.findall(words, self.output())) == count, f"{count} stops are told")
        return re.findall(words, self.output())

    def result(self) -> dict:
        return json.loads(self.folder.result.read_text())

    def output(self) -> str:
        submission = read_submission(self.folder.slurm)
        assert submission is not None
        path = Path(submission.output)
        return path.read_text() if path.exists() else ""

    def status(self) -> str:
        return " ".join(spantune("status", self.folder.path, COLUMNS="200").stdout.split())


def of(name: str) -> set[str]:
    """What a run can say of a stop by this signal: another rank may have heard it first."""
    return {name, "a signal to another rank"}


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"]]


def curve(run: Run) -> list[tuple[str, str]]:
    """Steps and losses, every digit of them."""
    return [(row["step"], row["loss_nats"]) for row in rows(run.folder.train_table)]


@pytest.fixture(scope="module")
def job_file(tmp_path_factory, tiny) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    path = folder / "tiny.toml"
    path.write_text(JOB.format(data=DATA, model=tiny("bert"), cache=folder / "cache"))
    return path


@pytest.fixture(scope="module")
def make(cluster, scenes, job_file, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return lambda name, *options: Run(cluster, job_file, runs / name, *options)


# ---- undisturbed


@pytest.fixture(scope="module")
def calm(make, cluster) -> Run:
    """The run that nobody disturbs, on one node, with a (fake) GPU for each rank."""
    run = make("calm", "--set", "slurm.gpus_per_node=2")
    run.submit()
    cluster.wait(run.job, "COMPLETED", "FAILED")
    return run


def test_one_node(calm, cluster):
    end = cluster.show(calm.job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert calm.folder.finished(), calm.output()
    assert calm.ends() == [0]
    assert calm.steps() == list(range(1, calm.result()["step"] + 1))
    assert "finished" in calm.status()
    said = spantune("logs", calm.folder.path).stdout
    assert f"job {calm.job}, start 1 on {end['BatchHost']}" in said
    assert "Exact match" in said
    cluster.leaves_nothing(calm.job)
    assert "slurm" not in (calm.folder.model / "README.md").read_text()
    record = json.loads(calm.folder.slurm.read_text())
    assert record["options"]["gpus_per_node"] == 2
    again = spantune(*calm._command)
    assert again.stdout == f"tiny: finished already, {calm.folder.path}\n"


def test_two_nodes_take_the_same_steps_as_one(calm, make, cluster):
    run = make("two-nodes", *TWO_NODES)
    run.submit()
    end = cluster.wait(run.job, "COMPLETED", "FAILED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert end["NumNodes"] == "2"
    assert run.ends() == [0]
    losses = [(float(a[1]), float(b[1])) for a, b in zip(curve(run), curve(calm), strict=True)]
    assert all(abs(a - b) <= 1e-6 * abs(b) for a, b in losses)
    # Here, where both "nodes" have the same processor, it is even the same bits.
    assert run.result()["weights_sha256"] == calm.result()["weights_sha256"]
    cluster.leaves_nothing(run.job)


def test_plain_srun_needs_no_script_of_ours(calm, make, cluster, job_file):
    folder = calm.folder.path.parent / "plain"
    main = CHECKOUT / "runner" / "main.py"
    command = f"srun {sys.executable} -u {main} {job_file} --run-dir {folder} --threads 1"
    job = cluster.step(
        f"export SPANTUNE_CACHE={job_file.parent}/cache; {command}", ntasks=2, nodes=1
    )
    end = cluster.wait(job, "COMPLETED", "FAILED")
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0")
    cluster.leaves_nothing(job)
    found = json.loads((folder / "result.json").read_text())
    assert found["weights_sha256"] == calm.result()["weights_sha256"]


# ---- one run, disturbed again and again


@pytest.fixture(scope="module")
def story(make, calm) -> Run:
    """The same job on two nodes; each of the tests below is a chapter of it."""
    return make("story", *TWO_NODES)


def test_scancel_saves_ends_and_never_requeues(story, cluster):
    story.submit()
    story.get_going()
    said = spantune("cancel", story.folder.path).stdout
    assert f"job {story.job} is cancelled: it saves, ends, and is not requeued" in said
    cluster.wait(story.job, "CANCELLED")
    cluster.leaves_nothing(story.job)
    end = cluster.show(story.job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("CANCELLED", "75:0", "0")
    assert story.ends() == [75]
    assert not story.folder.finished()
    assert "cancelled" in story.status()
    assert story.stops(1)[-1] in of("SIGTERM")


def test_a_killed_rank_ends_the_job(story, cluster):
    before = len(story.ends())
    story.submit()
    story.get_going()
    [second] = cluster.ranks(story.job, 1)
    os.kill(second, signal.SIGKILL)
    end = cluster.wait(story.job, "FAILED", "COMPLETED", "CANCELLED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "137:0", "0")
    cluster.leaves_nothing(story.job)
    assert not story.folder.finished()
    assert story.ends()[before:] == [71]  # by rank 0, which has noticed
    assert "failed (71)" in story.status()


def test_a_killed_launcher_leaves_no_rank(story, cluster):
    before = len(story.ends())
    story.submit()
    story.get_going()
    cluster.kill(story.job, "srun ")
    end = cluster.wait(story.job, "FAILED", "COMPLETED", "CANCELLED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "137:0", "0")
    cluster.leaves_nothing(story.job)
    assert not story.folder.finished()
    # SLURM ends the ranks, at once or after a TERM that they have heard: then they have saved.
    ends = story.ends()[before:]
    assert ends in ([], [75])
    assert ("interrupted" if ends else "lost: it was killed") in story.status()


def test_requeue_goes_on(story, cluster):
    before = len(story.ends())
    story.submit()
    story.get_going()
    cluster.do("scontrol", "requeue", story.job)
    assert story.saved_and_requeued(1, before)
    assert story.stops(1)[-1] in of("SIGTERM")
    cluster.wait(story.job, "RUNNING")
    story.get_going()


def test_a_warning_saves_and_goes_on(story, cluster):
    before = len(story.ends())
    cluster.do("scancel", "--batch", "--signal=USR2", story.job)  # as --signal=B:USR2@... does
    assert story.saved_and_requeued(2, before)
    assert story.stops(2)[-1] in of("SIGUSR2")
    cluster.wait(story.job, "RUNNING")
    story.get_going()


def test_preemption_goes_on(story, cluster):
    before = len(story.ends())
    urgent = cluster.step("sleep 1", partition="high", nodes=2, ntasks_per_node=16)
    cluster.wait(urgent, "COMPLETED")
    assert story.saved_and_requeued(3, before)
    assert story.stops(3)[-1] in of("SIGUSR2")
    assert cluster.wait(story.job, "RUNNING")["Restarts"] == "3"


def test_after_all_this_it_has_the_same_weights(story, calm, cluster):
    end = cluster.wait(story.job, "COMPLETED", "FAILED", "CANCELLED")
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), story.output()
    assert story.folder.finished()
    assert story.result()["weights_sha256"] == calm.result()["weights_sha256"]
    assert story.folder.predictions.read_bytes() == calm.folder.predictions.read_bytes()
    assert curve(story) == curve(calm)  # no row twice, none missing, each digit the same
    assert "finished" in story.status()
    cluster.leaves_nothing(story.job)


# ---- a node that fails


def test_a_lost_node_gives_the_run_to_another(calm, make, cluster):
    run = make("lost", *ONE_NODE)
    run.submit()
    run.get_going()
    first = cluster.show(run.job)["BatchHost"]
    frozen, ranks = list(cluster.processes(run.job)), cluster.ranks(run.job)
    cluster.lose_node(first)
    freeze(frozen)
    until(lambda: cluster.show(run.job)["Restarts"] == "1", "SLURM gives the node up")
    cluster.wait(run.job, "RUNNING")
    assert cluster.show(run.job)["BatchHost"] != first
    run.get_going()
    # It comes back, and its ranks want to go on. Their srun does not: it would have SLURM end the
    # step that it began, and that of the new life has the same number.
    thaw(ranks)
    until(lambda: run.ends()[:1] == [73], "the first life notices that it was succeeded")
    cluster.find_node(first)
    end = cluster.wait(run.job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
    thaw(frozen)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert run.ends() == [73, 0]
    assert run.result()["weights_sha256"] == calm.result()["weights_sha256"]
    assert curve(run) == curve(calm)
    cluster.leaves_nothing(run.job)


# ---- the time limit


@pytest.fixture(scope="module")
def limited(make, cluster) -> Iterator[Run]:
    """A run that SLURM's own timer warns in the midst of training, however fast the machine is: it
    is frozen there until the warning has come, while the next tests run."""
    run = make("limited", *ONE_NODE, "--set", "slurm.time=1", "--set", "slurm.signal_seconds=10")
    run.submit()
    run.get_going()
    ranks = cluster.ranks(run.job)
    assert len(ranks) == 2
    freeze(ranks)

    def go_on() -> None:
        until(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in ranks), "all are warned")
        cluster.do("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")  # once is enough
        thaw(ranks)

    thread = threading.Thread(target=go_on)
    thread.start()
    yield run
    thread.join()


@pytest.fixture(scope="module")
def overrun(make, cluster) -> Iterator[Run]:
    """A run that has a checkpoint, and then stands still past its time limit, whatever it is sent:
    SLURM has to kill it, while the next tests run."""
    soon = ("--set", "train.checkpoint_minutes=0.01")
    limits = ("--set", "slurm.time=1", "--set", "slurm.signal_seconds=10")
    run = make("overrun", *ONE_NODE, *soon, *limits)
    run.submit()
    until(lambda: any(run.folder.checkpoints.glob("step-*")) or run.is_over(), "it has saved")
    run.get_going()
    ranks = cluster.ranks(run.job)
    assert len(ranks) == 2

    def hold() -> None:
        while alive := [pid for pid in ranks if is_alive(pid)]:
            with suppress(ProcessLookupError):
                freeze(alive)  # again and again: SLURM lets go on what it is about to kill
            time.sleep(0.001)

    thread = threading.Thread(target=hold)
    thread.start()
    yield run
    thread.join()


def test_training_stands_still_before_its_time_limit(limited, overrun, cluster):
    for run in (limited, overrun):
        assert cluster.state(run.job) == "RUNNING"
        assert not run.folder.finished()


# ---- sweeps, refusals, nodes without a network


def test_a_sweep_is_an_array_and_ends_in_a_table(calm, cluster, job_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    sweep = job_file.with_name("sweep.toml")
    sweep.write_text(f"{job_file.read_text()}\n[sweep]\nseeds = [7, 8]\n")
    said = spantune("submit", sweep, "--run-dir", folder, *ONE_NODE).stdout
    found = re.search(r"job (\d+), an array of 2 trials", said)
    assert found, said
    names = [f"{found[1]}_{index}" for index in (0, 1)]
    until(lambda: all(len(cluster.ranks(name)) == 2 for name in names), "all ranks are there")
    for name in names:
        end = cluster.wait(name, "COMPLETED", "FAILED")
        assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "0")
        cluster.leaves_nothing(name)
    results = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")
    }
    [seventh] = [result for name, result in results.items() if name.startswith("seed-7")]
    assert seventh["weights_sha256"] == calm.result()["weights_sha256"]
    table = spantune("report", "--sweep", folder).stdout
    assert "2/2" in table
    assert spantune("status", folder, COLUMNS="200").stdout.count("finished") == 2
    # One trial is lost: it alone is run again.
    trials = sorted(path.parent for path in folder.glob("*/result.json"))
    (trials[1] / "result.json").unlink()
    said = spantune("submit", sweep, "--run-dir", folder, *ONE_NODE).stdout
    found = re.search(r"job (\d+), an array of 1 trials", said)
    assert found, said
    names = json.loads((folder / "sweep.json").read_text())["trials"]
    index = [entry["name"] for entry in names].index(trials[1].name)
    assert cluster.wait(f"{found[1]}_{index}", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    again = json.loads((trials[1] / "result.json").read_text())
    assert again["weights_sha256"] == results[trials[1].name]["weights_sha256"]
    assert "finished already" in spantune("submit", sweep, "--run-dir", folder, *ONE_NODE).stdout


def test_a_node_without_network_names_what_is_missing(cluster, job_file, make):
    path = job_file.with_name("offline.toml")
    text = re.sub(r'(?m)^name = "/.*"$', 'name = "o/nowhere"', job_file.read_text())
    path.write_text(
        text + 'HF_ENDPOINT = "http://127.0.0.1:9"\nHF_HOME = "/nowhere"\nHF_HUB_OFFLINE = "0"\n'
    )
    run = Run(cluster, path, job_file.parent / "offline", *ONE_NODE)
    run.submit()
    end = cluster.wait(run.job, "COMPLETED", "FAILED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "69:0", "0")
    assert end["RunTime"] < "00:00:15"  # without the libraries, which take longer to load
    assert "127.0.0.1 cannot be reached: o/nowhere; on a machine with network run:" in run.output()
    cluster.leaves_nothing(run.job)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("slurm.partition=nowhere", "Invalid partition name specified"),
        ("slurm.gpus_per_node=3", "Requested node configuration is not available"),
        ("slurm.mem=9000G", "Requested node configuration is not available"),
        ("slurm.constraint=a100", "Invalid feature specification"),
    ],
)
def test_what_slurm_refuses_is_one_line(cluster, job_file, setting, words):
    runs = job_file.parent / "refused"
    sized = ("--set", "train.batch_size=6") if "=3" in setting else ()
    done = spantune("submit", job_file, "--runs", runs, "--set", setting, *sized, check=False)
    assert done.returncode == 72
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(runs.glob("*"))


def test_what_could_never_start_is_doubted(cluster, job_file):
    runs = job_file.parent / "doubted"
    done = spantune("submit", job_file, "--runs", runs, "--set", "slurm.nodes=4")
    assert "SLURM could not start it on the nodes as they are now: Requested node" in done.stdout
    [folder] = runs.glob("*/*")
    job = json.loads((folder / "slurm.json").read_text())["job_id"]

    def words() -> str:
        # The scheduler gives a reason when it has looked at the job: PartitionConfig alone, and
        # another or none after other jobs (in one whole run it was not PartitionConfig for 180 s).
        reason = cluster.do("squeue", "--noheader", "--format=%r", f"--jobs={job}")
        return "pending" if reason == "None" else f"pending ({reason})"

    until(
        lambda: words() in spantune("status", folder, COLUMNS="200").stdout,
        "status says what SLURM says",
    )
    assert "is cancelled" in spantune("cancel", folder).stdout


# ---- what has taken its time


def test_the_warning_before_the_time_limit(limited, calm, cluster):
    end = cluster.wait(limited.job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    *warned, last = limited.ends()
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), limited.output()
    assert (set(warned), last, end["Restarts"]) == ({75}, 0, f"{len(warned)}")
    assert set(limited.stops(len(warned))) <= of("SIGUSR2")
    assert limited.result()["weights_sha256"] == calm.result()["weights_sha256"]
    assert curve(limited) == curve(calm)
    cluster.leaves_nothing(limited.job)


def test_a_run_that_is_killed_at_its_time_limit_goes_on_when_asked(
    overrun, calm, cluster, job_file
):
    end = cluster.wait(overrun.job, "TIMEOUT", "COMPLETED", "FAILED", "CANCELLED")
    assert (end["JobState"], end["Restarts"]) == ("TIMEOUT", "0"), overrun.output()
    assert overrun.ends() == []  # no life of it could tell its end
    assert not overrun.folder.finished()
    cluster.leaves_nothing(overrun.job)

    again = Run(cluster, job_file, overrun.folder.path, *ONE_NODE)
    again.submit()
    end = cluster.wait(again.job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), again.output()
    assert re.search(r"goes on after step [1-9]", again.output())
    assert again.result()["weights_sha256"] == calm.result()["weights_sha256"]
    assert curve(again) == curve(calm)
    cluster.leaves_nothing(again.job)
