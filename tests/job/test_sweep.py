"""The trials of a sweep: which there are, what they are called, what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.errors import DataError, JobError
from runner.job.load import dump_job, load_job
from runner.job.schema import Sweep
from runner.job.sweep import load_trials
from runner.run.folder import RunDir
from runner.run.sweep import open_trials, read_manifest, write_manifest

JOB = """\
name = "n"
[data]
train = "questions.json"
validation = "questions.json"
[model]
name = "o/n"
[train]
epochs = 1
batch_size = 8
learning_rate = 1e-4
"""
LAST = JOB.count("\n")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("questions.json").write_text("[]")


def trials(sweep: str, *overrides: str):
    Path("job.toml").write_text(f"{JOB}[sweep]\n{sweep}\n")
    return load_trials("job.toml", overrides)[1]


def problems(sweep: str, *overrides: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        trials(sweep, *overrides)
    return list(caught.value.problems)


GRID = """\
seeds = [1, 2]
[sweep.over]
train.learning_rate = [1e-5, 3e-5]
train.epochs = [1, 2, 3]
"""


def test_a_grid_has_every_combination():
    found = trials(GRID)
    assert len(found) == 12
    assert found[0].values == {"train.learning_rate": 1e-5, "train.epochs": 1, "seed": 1}
    assert found[1].values == {"train.learning_rate": 1e-5, "train.epochs": 1, "seed": 2}
    assert found[-1].values == {"train.learning_rate": 3e-5, "train.epochs": 3, "seed": 2}
    for trial in found:
        job = trial.job
        of_job = (job.train.learning_rate, job.train.epochs, job.seed)
        assert of_job == tuple(trial.values.values())
        assert job.sweep is None
        assert (job.name, job.train.batch_size) == ("n", 8)


def test_zip_takes_values_together():
    found = trials('mode = "zip"\nover = {train.epochs = [1, 2], train.batch_size = [8, 16]}')
    assert [(t.job.train.epochs, t.job.train.batch_size) for t in found] == [(1, 8), (2, 16)]
    assert all(t.job.seed == 42 for t in found)


def test_seeds_alone():
    assert [trial.job.seed for trial in trials("seeds = [3, 1]")] == [3, 1]


def test_values_may_be_lists_and_tables():
    found = trials(
        "[sweep.over]\nmodel.freeze = [[], ['embeddings']]\n"
        "zero.deepspeed.zero_optimization.overlap_comm = [true, false]"
    )
    assert [trial.job.model.freeze for trial in found] == [(), (), *[("embeddings",)] * 2]
    assert [trial.job.zero.deepspeed for trial in found[:2]] == [
        {"zero_optimization": {"overlap_comm": overlap}} for overlap in (True, False)
    ]


def test_a_job_without_a_sweep_has_no_trials():
    Path("job.toml").write_text(JOB)
    job, found = load_trials("job.toml")
    assert (job, found) == (load_job("job.toml"), [])


# ---- names


def test_names_tell_the_values_and_fit_a_file_system():
    names = [trial.name for trial in trials(GRID)]
    assert len(set(names)) == 12
    assert re.fullmatch(r"learning_rate-1e-05_epochs-1_seed-1_[0-9a-f]{8}", names[0])
    for trial in trials(f"over = {{ model.name = ['o/{'m' * 90}', 'p/n'] }}"):
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", trial.name)


def test_names_stay_whatever_does_not_change_the_trial():
    names = {trial.name for trial in trials(GRID)}
    for same in (
        *("slurm.partition=gpu", "sweep.max_parallel=1", "track.wait=3", "expect.f1=50.0"),
        *("train.checkpoint_minutes=3", "train.timeout_minutes=7"),
        *("zero.stage=2", "score.n_best=20"),  # as they are if nothing is said of them
    ):
        assert {trial.name for trial in trials(GRID, same)} == names, same
    # Values that are already there do not become other trials when some are added.
    more = {trial.name for trial in trials(GRID.replace("[1e-5, 3e-5]", "[1e-5, 3e-5, 5e-5]"))}
    assert names < more
    assert not names & {trial.name for trial in trials(GRID, "train.batch_size=16")}


def test_names_are_the_same_in_another_checkout(tmp_path, monkeypatch):
    v2 = ("data.unanswerable=true", "data.tuning=tuning.json")
    Path("tuning.json").write_text("[]")
    names = [trial.name for trial in trials(GRID, *v2)]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for name in ("questions.json", "tuning.json"):
        Path(name).write_text("[]")
    assert [trial.name for trial in trials(GRID, *v2)] == names
    assert not {trial.name for trial in trials(GRID)} & set(names)


# ---- problems


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        (
            "over = {train.epochs = [1, 0, 'x']}",
            [
                ":{}: sweep.over.train.epochs.2: must be at least 1, found 0",
                ':{}: sweep.over.train.epochs.3: expected a whole number, found "x"',
            ],
        ),
        (
            "over = {train.epoch = [1, 2]}",
            [
                ":{}: sweep.over.train.epoch.1: unknown key; did you mean epochs?",
                ":{}: sweep.over.train.epoch.2: unknown key; did you mean epochs?",
            ],
        ),
        (
            "over = {train.epochs = 3}",
            [":{}: sweep.over.train.epochs: expected a list of values in brackets"],
        ),
        (
            "over = {train.epochs = []}",
            [":{}: sweep.over.train.epochs: expected a list of values in brackets"],
        ),
        (
            "over = {seed = [1]}",
            [":{}: sweep.over.seed: seed has an axis of its own; write sweep.seeds = [1, 2, 3]"],
        ),
        (
            "over = {slurm.nodes = [1, 2]}",
            [":{}: sweep.over.slurm: slurm is the same for all trials of an array"],
        ),
        ("over = {name = ['a']}", [":{}: sweep.over.name: name names the folder of all trials"]),
        (
            "over = {train.epochs = [1, 2], train.batch_size = [8]}\nmode = 'zip'",
            [":{}: sweep.over: zip takes lists of one length, these have [1, 2]"],
        ),
        (
            "over = {train.epochs = [1, 2, 1]}",
            [":{}: sweep: gives the same job twice: train.epochs = 1"],
        ),
        ("seeds = [1, 1]", [":{}: sweep: gives the same job twice: seed = 1"]),
        ("seeds = [1, -1]", [":{}: sweep.seeds: must be at least 0, found -1"]),
        (
            "over = {data.train = ['questions.json', 'none.json']}",
            [
                ':{}: sweep.over.data.train.2: no file "none.json" beside the job file or in the'
                " current folder"
            ],
        ),
        ("", [":{}: sweep: varies nothing; give lists of values under [sweep.over], or seeds"]),
    ],
)
def test_what_is_wrong_is_said_at_its_line(sweep, expected):
    lines = [re.sub(r"^job\.toml:\d+", "", problem) for problem in problems(sweep)]
    assert lines == [line.replace(":{}", "", 1) for line in expected]


def test_lines_are_those_of_the_values():
    found = problems("seeds = [1]\n[sweep.over]\ntrain.epochs = [1, 0]\nmodel.dropout = [2.0]")
    assert [line.split(": ")[0] for line in found] == [
        f"job.toml:{LAST + 4}",
        f"job.toml:{LAST + 5}",
    ]


def test_what_a_value_breaks_elsewhere_is_said_once():
    assert problems("seeds = [1, 2]\nover = {train.micro_batch_size = [3, 4]}") == [
        "job.toml:7: train: batch_size 8 is not a multiple of micro_batch_size 3;"
        " micro_batch_size may be 1, 2, 4 or 8"
    ]


def test_a_sweep_without_end_is_refused():
    [line] = problems(f"seeds = {list(range(40))}\nover = {{train.epochs = {list(range(1, 31))}}}")
    assert line.endswith("sweep: 1200 trials are more than 1000")


def test_a_sweep_is_counted_before_it_is_made():
    names = ("epochs", "batch_size", "micro_batch_size", "log_every", "warmup", "patience")
    axes = ", ".join(f"train.{name} = {list(range(1, 1001))}" for name in names)
    [line] = problems(f"over = {{{axes}}}")
    assert line.endswith(f"sweep: {1000**6} trials are more than 1000")


# ---- the manifest


def test_the_manifest_keeps_the_places_of_trials(tmp_path):
    folder = tmp_path / "sweep"
    first = trials("over = {train.epochs = [1, 2]}")
    job = load_trials("job.toml")[0]
    assert write_manifest(folder, job, first) == [trial.name for trial in first]
    assert load_job(folder / "sweep.toml") == job
    more = trials("over = {train.epochs = [3, 2]}")
    names = write_manifest(folder, load_trials("job.toml")[0], more)
    assert names == [first[0].name, first[1].name, more[0].name]
    manifest = read_manifest(folder)
    assert manifest.name == "n"
    assert [entry.values["train.epochs"] for entry in manifest.trials] == [1, 2, 3]


def test_what_is_left_to_do(tmp_path):
    found = trials("seeds = [1, 2, 3]")
    (tmp_path / found[1].name).mkdir()
    RunDir(tmp_path / found[1].name).result.write_text("{}")
    (tmp_path / found[2].name).mkdir()  # has run, and has no result
    assert open_trials(tmp_path, found) == [found[0], found[2]]


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    found = trials("seeds = [1]")
    job = load_trials("job.toml")[0]
    write_manifest(tmp_path / "s", job, found)
    with pytest.raises(DataError, match="holds the sweep of another job, n"):
        write_manifest(tmp_path / "s", job.model_copy(update={"name": "m"}), found)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"name": "n", "trials": [1]}', '{"name": "n"}'])
def test_manifests_that_are_none(tmp_path, text):
    if text is not None:
        (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path)
    assert "sweep.json" in str(caught.value)


def test_a_sweep_survives_its_own_file(tmp_path):
    trials(GRID)
    job = load_trials("job.toml")[0]
    Path("again.toml").write_text(dump_job(job))
    assert load_job("again.toml") == job
    assert isinstance(job.sweep, Sweep)
    assert job.sweep.over == {"train": {"learning_rate": [1e-5, 3e-5], "epochs": [1, 2, 3]}}
