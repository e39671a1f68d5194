"""Real training under a real SLURM: every end a job can come to, and the same weights to the bit
wherever it finishes. What happens to the runs stands in `stories`."""

from __future__ import annotations

import json
import re

import pytest

from runner.run.folder import RunDir

from .cluster import until
from .stories import ONE_NODE, Run, Seen, curve


def of(name: str) -> set[str]:
    """What a run can say of a stop by this signal: another rank may have heard it first."""
    return {name, "a signal to another rank"}


def is_same(run: Run, calm: Seen) -> None:
    """Assert that a finished run has come to the very end that the undisturbed one has."""
    assert run.result()["weights_sha256"] == calm.run.result()["weights_sha256"]
    assert run.folder.predictions.read_bytes() == calm.run.folder.predictions.read_bytes()
    assert run.curve() == calm.run.curve()  # no row twice, none missing, each digit the same


# ---- undisturbed


def test_two_nodes(calm, cluster):
    seen = calm["the end"]
    run = seen.run
    assert seen.end == ("COMPLETED", "0:0", "0")
    assert seen.job["NumNodes"] == "2"
    assert seen.finished, seen.output
    assert seen.ends == [0]
    assert run.steps() == list(range(1, run.result()["step"] + 1))
    assert "finished" in seen.status
    said = cluster.spantune("logs", run.folder.path).stdout
    assert f"job {run.job}, start 1 on {seen.job['NodeList']}" in said
    assert "Exact match" in said
    assert "slurm" not in (run.folder.model / "README.md").read_text()
    assert json.loads(run.folder.slurm.read_text())["options"]["nodes"] == 2
    assert run.submitted() == f"tiny: finished already, {run.folder.path}\n"


def test_plain_srun_needs_no_script_of_ours(plain, calm):
    seen = plain["the end"]
    assert (seen.job["JobState"], seen.job["ExitCode"]) == ("COMPLETED", "0:0")
    is_same(seen.run, calm["the end"])


def test_a_sweep_is_an_array_and_ends_in_a_table(sweep, cluster):
    both = sweep["both"]
    assert "an array of 2 trials" in both.said
    assert list(both.jobs) == [0, 1]
    for end in both.jobs.values():
        assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "0")
        assert end["NumNodes"] == "1"
    for trial in both.results:
        record = json.loads((both.folder / trial / "slurm.json").read_text())
        assert record["options"]["gpus_per_node"] == 2
    assert "2/2" in both.report
    assert both.status.count("finished") == 2


def test_one_node_takes_the_same_steps_as_two(sweep, calm):
    both, calm = sweep["both"], calm["the end"]
    [seventh] = [name for name in both.results if name.startswith("seed-7")]
    curves = zip(curve(RunDir(both.folder / seventh)), calm.run.curve(), strict=True)
    losses = [(float(a[1]), float(b[1])) for a, b in curves]
    assert all(abs(a - b) <= 1e-6 * abs(b) for a, b in losses)
    # Here, where both "nodes" have the same processor, it is even the same bits.
    assert both.results[seventh]["weights_sha256"] == calm.run.result()["weights_sha256"]


def test_a_trial_that_has_lost_its_result_is_run_again_alone(sweep):
    both, again = sweep["both"], sweep["one again"]
    assert "an array of 1 trials" in again.said
    assert {index: end["JobState"] for index, end in again.jobs.items()} == {1: "COMPLETED"}
    assert again.results.keys() == both.results.keys()
    for name, result in again.results.items():
        assert result["weights_sha256"] == both.results[name]["weights_sha256"]
    assert "finished already" in sweep["nothing left"]


# ---- disturbed again and again


def test_scancel_saves_ends_and_never_requeues(disturbed):
    seen = disturbed["cancelled"]
    job = seen.job["JobId"]
    assert f"job {job} is cancelled: it saves, ends, and is not requeued" in seen.said
    assert seen.end == ("CANCELLED", "75:0", "0")
    assert seen.ends == [75]
    assert not seen.finished
    assert "cancelled" in seen.status
    [stop] = seen.stops
    assert stop in of("SIGTERM")


def test_a_killed_rank_ends_the_job(disturbed):
    seen = disturbed["a rank is killed"]
    assert seen.end == ("FAILED", "137:0", "0")
    assert not seen.finished
    assert seen.ends == [71]  # by rank 0, which has noticed
    assert "failed (71)" in seen.status


def test_preemption_by_cancel_goes_on(disturbed):
    seen = disturbed["preempted by CANCEL"]
    assert seen.ends == [75]
    assert not seen.finished
    assert len(seen.stops) == 1
    assert seen.stops[-1] in of("SIGTERM")


def test_scancel_is_no_preemption_even_after_one(disturbed):
    seen = disturbed["cancelled after it was preempted"]
    assert seen.end == ("CANCELLED", "75:0", "1"), seen.output
    assert seen.ends == [75]


def test_requeue_goes_on(disturbed):
    seen = disturbed["requeued"]
    assert seen.ends == [75]
    assert not seen.finished
    assert len(seen.stops) == 1
    assert seen.stops[-1] in of("SIGTERM")


def test_preemption_goes_on(disturbed):
    seen = disturbed["preempted"]
    assert seen.ends == [75]
    assert not seen.finished
    assert len(seen.stops) == 2
    assert seen.stops[-1] in of("SIGUSR2")


def test_the_warning_before_the_time_limit_saves_and_goes_on(disturbed):
    seen = disturbed["warned of its time limit"]
    assert seen.ends == [75]
    assert not seen.finished
    assert len(seen.stops) == 3
    assert seen.stops[-1] in of("SIGUSR2")


def test_after_all_this_it_has_the_same_weights(disturbed, calm):
    seen = disturbed["the end"]
    assert seen.end == ("COMPLETED", "0:0", "3"), seen.output
    assert seen.ends == [0]
    assert len(seen.stops) == 3
    assert seen.finished
    assert "finished" in seen.status
    is_same(seen.run, calm["the end"])


# ---- without a chance to save


def test_a_run_is_killed_at_its_time_limit(broken):
    seen = broken["killed at its time limit"]
    assert (seen.job["JobState"], seen.job["Restarts"]) == ("TIMEOUT", "0"), seen.output
    assert seen.ends == []  # no life of it could tell its end
    assert not seen.finished


def test_a_killed_launcher_leaves_no_rank(broken):
    seen = broken["its launcher is killed"]
    assert re.search(r"goes on after step [1-9]", seen.output)  # what it had saved before the limit
    assert seen.end == ("FAILED", "137:0", "0")
    assert not seen.finished
    # SLURM ends the ranks, at once or after a TERM that they have heard: then they have saved.
    assert seen.ends in ([], [75])
    assert ("interrupted" if seen.ends else "lost: it was killed") in seen.status


def test_a_lost_node_gives_the_run_to_another(broken):
    seen = broken["a node is lost"]
    assert seen.nodes[0] != seen.nodes[1]
    assert seen.ends == [73]  # the first life, when it came back


def test_what_could_not_save_ends_with_the_same_weights_when_asked(broken, calm):
    seen = broken["the end"]
    assert seen.end == ("COMPLETED", "0:0", "1"), seen.output
    assert seen.job["NumNodes"] == "1"
    assert seen.ends == [0]
    assert seen.finished
    assert json.loads(seen.run.folder.slurm.read_text())["options"]["gpus_per_node"] == 2
    is_same(seen.run, calm["the end"])


# ---- refusals, nodes without a network


def test_a_node_without_network_names_what_is_missing(cluster, job_file):
    path = job_file.with_name("offline.toml")
    text = re.sub(r'(?m)^name = "/.*"$', 'name = "o/nowhere"', job_file.read_text())
    variables = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": "/nowhere",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPROFILEIMPORTTIME": "1",  # tells each module that is imported
    }
    path.write_text(text + "".join(f'{name} = "{value}"\n' for name, value in variables.items()))
    run = Run(cluster, path, job_file.with_name("offline"))
    run.submit(*ONE_NODE)
    seen = run.at_the_end()
    assert seen.end == ("FAILED", "69:0", "0")
    assert "127.0.0.1 cannot be reached: o/nowhere; on a machine with network run:" in seen.output
    imported = set(re.findall(r"^import time: .*\|\s*([\w.]+)$", seen.output, re.MULTILINE))
    assert "runner.job.assets" in imported
    # It ends within seconds, because it does not load the libraries first.
    assert not imported & {"torch", "transformers", "deepspeed", "datasets", "evaluate"}
    told = cluster.spantune("status", run.folder.path, COLUMNS="80").stdout
    assert "failed (69)" in told
    assert "127.0.0.1 cannot be reached: o/nowhere; on a machine with network run:" in (
        " ".join(told.split())
    )


def test_a_start_that_never_came_to_its_run_is_told_by_its_output(cluster, job_file):
    run = Run(cluster, job_file, job_file.with_name("refused-late"))
    run.submit(*ONE_NODE, "--set", 'slurm.sbatch.begin="now+1hour"')
    text = run.folder.job.read_text()
    run.folder.job.write_text(text.replace("epochs", "epoch", 1))
    cluster.do("scontrol", "update", f"JobId={run.job}", "StartTime=now")
    assert run.at_the_end().end == ("FAILED", "64:0", "0")
    assert not run.folder.log.exists()
    told = cluster.spantune("status", run.folder.path, COLUMNS="80").stdout
    assert "ended before it began" in told
    assert "unknown key; did you mean epochs?" in " ".join(told.split())
    assert "unknown key; did you mean" in cluster.spantune("logs", run.folder.path).stdout


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
    done = cluster.spantune(
        "submit", job_file, "--runs", runs, "--set", setting, *sized, check=False
    )
    assert done.returncode == 72
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(runs.glob("*"))


def test_what_could_never_start_is_doubted(cluster, job_file):
    runs = job_file.parent / "doubted"
    done = cluster.spantune("submit", job_file, "--runs", runs, "--set", "slurm.nodes=4")
    assert "SLURM could not start it on the nodes as they are now: Requested node" in done.stdout
    [folder] = runs.glob("*/*")
    job = json.loads((folder / "slurm.json").read_text())["job_id"]

    def words() -> str:
        # The scheduler gives a reason when it has looked at the job: PartitionConfig alone, and
        # another or none after other jobs (in one whole run it was not PartitionConfig for 180 s).
        reason = cluster.do("squeue", "--noheader", "--format=%r", f"--jobs={job}")
        return "pending" if reason == "None" else f"pending ({reason})"

    until(
        lambda: words() in cluster.spantune("status", folder, COLUMNS="200").stdout,
        "status says what SLURM says",
        every=1,
    )
    assert "is cancelled" in cluster.spantune("cancel", folder).stdout
