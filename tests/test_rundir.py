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
from runner.rundir import RunDir, storage_errors, write_atomic, write_json

NAMES = {
    *("job.toml", "provenance.json", "deepspeed.json", "train.csv", "eval.csv", "probes.csv"),
    *("predictions.jsonl", "curves.svg", "curves.png", "report.md", "checkpoints", "model"),
    *("log.txt", "result.json"),
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


def test_a_given_folder_is_taken_once(tmp_path):
    def take(_):
        try:
            return RunDir.create(tmp_path, "job", exact=tmp_path / "a" / "b")
        except RunDirError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(take, range(8)))
    refused = [text for text in taken if isinstance(text, str)]
    assert len(refused) == 7
    assert all("b already holds a run; give another folder to --run-dir" in r for r in refused)
    assert RunDir.open(tmp_path / "a" / "b").job.read_text() == ""


def test_a_given_folder_may_hold_other_files_but_be_no_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert RunDir.create(tmp_path, "job", exact=tmp_path).path == tmp_path
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(StorageError, match=r"notes\.txt: File exists$"):
        RunDir.create(tmp_path, "job", exact=tmp_path / "notes.txt")


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


def test_names_of_checkpoints_sort_by_step(tmp_path):
    names = [RunDir(tmp_path).checkpoint(step) for step in (0, 9, 10, 500, 123456)]
    assert names == sorted(names)
    assert names[3] == "step-000500"


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
