"""The run folder: its names, who gets it, and files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runner.errors import RunDirError, StorageError
from runner.run.folder import RunDir, checkpoint_name, checkpoint_place, committed_steps
from runner.utils.files import storage_errors, write_atomic, write_json

NAMES = {
    *("job.toml", "provenance.json", "deepspeed.json", "train.csv", "eval.csv", "probes.csv"),
    *(
        "predictions.jsonl",
        "repairs.jsonl",
        "curves.svg",
        "curves.png",
        "report.md",
        "checkpoints",
        "model",
    ),
    *(
        "log.txt",
        "result.json",
        "attempts",
        "submit.sh",
        "slurm.json",
        ".prepared.json",
        "trackers",
        "report.html",
        "evaluations",
        "model/model.safetensors",
    ),
}


def failing(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_the_names_of_a_run(tmp_path):
    run = RunDir(tmp_path)
    paths = {value for value in vars(run).values() if value != tmp_path}
    assert paths == {tmp_path / name for name in NAMES}


def test_new_runs_of_a_job_stand_side_by_side(tmp_path):
    runs = [RunDir.create(tmp_path / "runs", "my-job") for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    for run in runs:
        assert run.path.parent == tmp_path / "runs" / "my-job"
        assert re.fullmatch(r"\d{8}-\d{6}(-\d+)?", run.path.name)
        assert list(run.path.iterdir()) == []


def test_runs_started_at_once_never_share_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunDir.create(tmp_path, "job").path, range(40)))
    assert len(set(runs)) == 40


def test_runs_are_listed_in_the_order_of_their_start(tmp_path):
    names = ["20261125-000000", "20261125-000000-2", "20261125-000000-10", "20261126-000000"]
    for name in ("notes", *reversed(names)):
        folder = tmp_path / "job" / name
        folder.mkdir(parents=True)
        if name != "notes":
            (folder / "job.toml").touch()
    assert [run.path.name for run in RunDir.all(tmp_path, "job")] == names
    assert RunDir.all(tmp_path, "other") == []


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt"):
        RunDir.create(tmp_path / "notes.txt", "job")


def test_only_a_folder_with_a_job_is_a_run(tmp_path):
    with pytest.raises(RunDirError, match=re.escape(f"{tmp_path} is no run folder")):
        RunDir.open(tmp_path)
    (tmp_path / "job.toml").touch()
    assert RunDir.open(str(tmp_path)).path == tmp_path


def test_a_run_succeeded_if_and_only_if_its_result_is_there(tmp_path):
    run = RunDir(tmp_path)
    assert not run.finished()
    write_json(run.result, {"f1": 1.0})
    assert run.finished()


def test_names_of_checkpoints_tell_their_order(tmp_path):
    places = [(9, False, 2), (9, True, 1), (10, False, 1), (500, True, 1), (1234567, False, 10001)]
    names = [checkpoint_name(step, attempt, scored=scored) for step, scored, attempt in places]
    assert names[:2] == ["step-000009-a0002", "step-000009-scored-a0001"]
    assert [checkpoint_place(name) for name in names] == places == sorted(places)
    run = RunDir(tmp_path)
    assert committed_steps(run) == []
    for name in (*names, ".stage-step-000600-a0001", "step-000700", "step-٤٤٤٤٤٤-a0001"):
        (run.checkpoints / name).mkdir(parents=True)
    assert sorted(committed_steps(run)) == [9, 9, 10, 500, 1234567]


def test_a_file_is_whole_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []
    path.write_text("old")
    replace = Path.replace

    def watched(aside, target):
        seen.append((aside.parent, aside.read_text(), target.read_text()))
        return replace(aside, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_atomic(path, "n\u00e9w\n" * 10_000)
    assert seen == [(tmp_path, "n\u00e9w\n" * 10_000, "old")]
    assert path.read_bytes() == "n\u00e9w\n".encode() * 10_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "full"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.EACCES, False)],
)
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, step, number, full):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, step, failing(number))
    with pytest.raises(StorageError) as caught:
        write_atomic(path, "new")
    assert str(caught.value).startswith(f"{path}: {os.strerror(number)}")
    assert ("free some space" in str(caught.value)) is full
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_into_no_folder_names_the_file(tmp_path):
    path = tmp_path / "none" / "a.txt"
    with pytest.raises(StorageError, match=f"^{re.escape(str(path))}: No such file or directory$"):
        write_atomic(path, "new")


def test_errors_of_other_kinds_pass(tmp_path):
    with pytest.raises(KeyError), storage_errors(tmp_path):
        raise KeyError("a")
    with pytest.raises(StorageError, match=r"^a file: something$"), storage_errors():
        raise OSError("something")


def test_json_keeps_what_is_written(tmp_path):
    # \udcff: how Python spells a byte of a command line that is no UTF-8.
    value = {"f1": 0.1 + 0.2, "name": "\u00e4\u4e2d\n\udcff", "none": None, "list": [1, True]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert "\u00e4\u4e2d" in text
