"""What a comparison of a run with its repetition says, and what it accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.errors import DataError, ExpectationError, MachineError, RunDirError
from runner.job.load import dump_job
from runner.job.schema import Job
from runner.run.folder import RunDir
from runner.run.provenance import differing_fields, differing_results, is_time, read_record
from runner.run.reproduce import check_reproduction, compare_runs, reproduce

TABLE = {
    "name": "n",
    "data": {"train": "o/n", "validation": "o/n"},
    "model": {"name": "o/n"},
    "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-4},
}
JOB = Job.model_validate(TABLE)
METRICS = {"exact_match": 40.0, "f1": 50.0, "span_accuracy": 30.0, "loss": 1.25}
PROVENANCE = {
    "command": ["main.py"],
    "git": {"commit": "abc", "diff_sha256": None},
    "versions": {"torch": "2.13.0", "numpy": "2.0"},
    "machine": {"processor": "EPYC", "devices": ["EPYC", "EPYC"]},
    "ranks": 2,
    "threads_per_rank": 1,
    "seed": 42,
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return finished(tmp_path / "run")


def finished(path: Path, *, provenance=None, job: Job = JOB, **changes) -> RunDir:
    """A run that has finished, with some numbers."""
    path.mkdir()
    run = RunDir(path)
    run.job.write_text(dump_job(job))
    run.provenance.write_text(json.dumps(PROVENANCE | (provenance or {})))
    result = {"metrics": METRICS, "epoch": 2, "step": 40, "weights_sha256": "aa", "seconds": {}}
    run.result.write_text(json.dumps(result | changes))
    run.predictions.write_text('{"id": "q1"}\n{"id": "q2"}\n')
    run.train_table.write_text("step,loss_nats,examples_per_second\n1,2.5,30.0\n2,1.5,31.0\n")
    run.eval_table.write_text("epoch,f1_percent,train_seconds\n1,50.0,3.0\n")
    return run


def test_a_repetition_is_the_same_whatever_its_speed(tmp_path, run):
    again = finished(tmp_path / "again", seconds={"total": 5})
    again.train_table.write_text(run.train_table.read_text().replace("31.0", "9.0"))
    again.eval_table.write_text(run.eval_table.read_text().replace("3.0", "4.0"))
    again.provenance.write_text(json.dumps(PROVENANCE | {"command": ["other"]}))
    found = compare_runs(run, again, JOB)
    assert found.holds
    assert list(found.lines()) == [
        "the environment is the run's",
        "result, weights, answers and tables are the same, bit for bit",
    ]
    check_reproduction(found)


def test_in_the_same_environment_every_bit_counts(tmp_path, run):
    again = finished(tmp_path / "again", weights_sha256="ab")
    again.train_table.write_text(run.train_table.read_text().replace("1.5", "1.500001"))
    again.predictions.write_text('{"id": "q1"}\n{"id": "q3"}\n')
    found = compare_runs(run, again, JOB)
    assert found.results == [
        'result.json: weights_sha256 is "aa", now "ab"',
        "predictions.jsonl: line 2 is another",
        "train.csv: row 2, loss_nats is 1.5, now 1.500001",
    ]
    assert not found.outside
    with pytest.raises(ExpectationError, match="does not come out again to the bit"):
        check_reproduction(found)


@pytest.mark.parametrize(("f1", "holds"), [(50.4, True), (49.5, True), (50.6, False)])
def test_elsewhere_scores_have_a_tolerance(tmp_path, run, f1, holds):
    again = finished(
        tmp_path / "again",
        provenance={"versions": {"torch": "2.14.0", "numpy": "2.0"}, "ranks": 1},
        metrics=METRICS | {"f1": f1},
    )
    found = compare_runs(run, again, JOB)
    assert found.environment == [
        'versions.torch: "2.13.0", now "2.14.0"',
        "ranks: 2, now 1",
    ]
    assert found.holds is holds
    lines = list(found.lines())
    assert lines[0] == "the environment is another than the run's, so bits may differ:"
    assert ("all scores lie within the tolerance" in lines) is holds
    if not holds:
        assert "  f1 is 50.00, now 50.60 (tolerance 0.5)" in lines
        with pytest.raises(ExpectationError, match="within the tolerance"):
            check_reproduction(found)


def test_the_jobs_own_tolerance_counts(tmp_path, run):
    job = Job.model_validate(TABLE | {"expect": {"f1": 50.0, "tolerance": 2.0}})
    again = finished(tmp_path / "a", provenance={"ranks": 1}, metrics=METRICS | {"f1": 48.5})
    assert compare_runs(run, again, job).holds
    assert not compare_runs(run, again, JOB).holds
    lost = finished(
        tmp_path / "b", provenance={"ranks": 1}, metrics=METRICS | {"loss": float("nan")}
    )
    assert not compare_runs(run, lost, job).holds


@pytest.mark.parametrize(
    ("device", "deterministic", "f1", "holds"),
    [
        ("H100", False, 50.0, True),
        ("H100", False, 60.0, False),
        ("H100", True, 50.0, False),
        ("EPYC", False, 50.0, False),
    ],
)
def test_bits_count_only_where_they_are_promised(tmp_path, device, deterministic, f1, holds):
    """On a GPU they are not, unless the job asks for it."""
    job = Job.model_validate(TABLE | {"train": TABLE["train"] | {"deterministic": deterministic}})
    machine = {"machine": {"processor": "EPYC", "devices": [device]}}
    run = finished(tmp_path / "run", provenance=machine, job=job)
    again = finished(
        tmp_path / "again",
        provenance=machine,
        job=job,
        weights_sha256="ab",
        metrics=METRICS | {"f1": f1},
    )
    found = compare_runs(run, again, job)
    assert found.holds is holds
    told = "on a GPU, and without train.deterministic, so bits may differ" in found.lines()
    assert told is (device == "H100" and not deterministic)
    if not holds:
        words = "within the tolerance" if told else "to the bit"
        with pytest.raises(ExpectationError, match=words):
            check_reproduction(found)


def test_a_run_that_is_there_already_is_no_repetition(tmp_path, run):
    other = finished(tmp_path / "other")
    with pytest.raises(RunDirError, match="holds a run that is finished already"):
        reproduce(run.path, into=other.path, ranks=None, start=lambda *_: 0)


def test_missing_rows_and_fields_are_differences(tmp_path, run):
    again = finished(tmp_path / "again", metrics=METRICS | {"best_f1": 51.0})
    again.train_table.write_text("step,loss_nats,examples_per_second\n1,2.5,30.0\n")
    again.predictions.write_text('{"id": "q1"}\n')
    assert differing_results(run, again) == [
        "result.json: metrics.best_f1 is absent, now 51.0",
        "predictions.jsonl: 2 lines, now 1",
        "train.csv: 2 rows, now 1",
    ]
    assert differing_fields({"a": {"b": 1}}, {"a": {"c": [1]}}) == [
        "a.b: 1, now absent",
        "a.c: absent, now [1]",
    ]


def test_what_tells_of_time():
    assert [is_time(c) for c in ("train_seconds", "tokens_per_second", "loss_nats", "step")] == [
        *(True, True, False, False)
    ]


def test_it_starts_as_many_ranks_and_threads(tmp_path, run):
    started = []

    def start(arguments: list[str], ranks: int) -> int:
        started.append((arguments, ranks))
        finished(Path(arguments[arguments.index("--run-dir") + 1]))
        return 78  # a missed [expect] is for the comparison to tell

    found = reproduce(run.path, into=tmp_path / "new", ranks=None, start=start)
    arguments = ["rank", str(run.job), "--run-dir", str(tmp_path / "new"), "--threads", "1"]
    assert started == [(arguments, 2)]
    assert found.holds
    beside = reproduce(run.path, into=None, ranks=3, start=start)
    assert started[1][1] == 3
    assert beside.again.path.parent == run.path.parent


def test_what_cannot_be_reproduced_is_said(tmp_path, run):
    def fail(arguments: list[str], ranks: int) -> int:
        return 69

    with pytest.raises(MachineError, match=r"has not finished \(exit code 69\)"):
        reproduce(run.path, into=tmp_path / "new", ranks=None, start=fail)
    with pytest.raises(RunDirError, match="needs another folder"):
        reproduce(run.path, into=run.path, ranks=None, start=fail)
    run.provenance.write_text("{}")
    with pytest.raises(DataError, match="does not say ranks"):
        reproduce(run.path, into=tmp_path / "new", ranks=None, start=fail)
    run.result.unlink()
    with pytest.raises(RunDirError, match="has not finished"):
        reproduce(run.path, into=None, ranks=None, start=fail)
    with pytest.raises(RunDirError, match="is no run folder"):
        reproduce(tmp_path, into=None, ranks=None, start=fail)


@pytest.mark.parametrize("text", ["", "{", "[]", "5"])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"result\.json"):
        read_record(tmp_path / "result.json")
