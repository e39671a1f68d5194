"""The long trials count what they say: tests/soak does the trials, this its bookkeeping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.soak import soak as module
from tests.soak.soak import Soak, is_promised, kills, read_done, results


@pytest.fixture
def soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Soak:
    monkeypatch.setattr(module, "commit_now", lambda: "aaaa")
    return Soak(tmp_path, 1)


def test_a_line_that_was_cut_short_is_no_trial(soak, capsys):
    soak.note("store 0", "store", held=True, count=100, seconds=1.0)
    log = soak.folder / "done.jsonl"
    log.write_bytes(log.read_bytes() + b'{"key": "store 1", "he')
    again = Soak(soak.folder, 1)
    assert list(again.done) == ["store 0"]
    assert "is left out" in capsys.readouterr().err
    again.note("store 2", "store", held=True, count=100, seconds=1.0)
    assert [json.loads(line)["key"] for line in log.read_text().splitlines()] == [
        "store 0",
        "store 2",
    ]
    assert list(read_done(log)) == ["store 0", "store 2"]


def test_trials_of_several_commits_are_told_apart(soak, monkeypatch, capsys):
    soak.note("store 0", "store", held=True, count=100, seconds=1.0)
    assert "commit aaaa." in results(soak)
    monkeypatch.setattr(module, "commit_now", lambda: "bbbb")
    later = Soak(soak.folder, 1)
    assert "holds trials of aaaa, this is bbbb" in capsys.readouterr().err
    later.note("store 1", "store", held=True, count=100, seconds=1.0)
    assert "MIXED commits: aaaa (1 entries), bbbb (1 entries)" in results(later)


@pytest.mark.parametrize(
    ("line", "promised"),
    [
        ("mutated.toml: has no [train]", True),
        ("mutated.toml:12: train.epochs: expected a whole number", True),
        ("mutated.toml:0: x", False),
        ("mutated.toml:12:", False),
        ("train.epochs: expected a whole number", False),
        ("mutated.toml:12: \x1b[31m", False),
    ],
)
def test_the_promised_form_of_a_problem(line, promised):
    assert is_promised(line, Path("mutated.toml")) is promised


class Early:
    """A run that has ended before the first kills reach it, as far as `ends` says."""

    def __init__(self, folder: Path, ends: list[bool]) -> None:
        self.folder, self.ends, self.victims = folder, ends, []

    def start(self, *_, **__):
        return self

    def kill(self, victim) -> None:
        self.victims.append(victim)
        self.folder.mkdir(exist_ok=True)
        if self.ends.pop(0):
            (self.folder / "result.json").touch()

    def wait(self, _) -> list[int]:
        return [0, 0]

    def text(self) -> str:
        return ""

    def run(self, *_, **__):
        return [0, 0], ""


def test_a_kill_that_comes_too_late_is_made_again(soak, monkeypatch):
    monkeypatch.setattr(module.random.Random, "uniform", lambda *_: 0.0)
    monkeypatch.setattr(module, "outcome", lambda _: {"step": 0})
    soak.job = lambda: soak.folder / "job.toml"
    soak._zygote = early = Early(soak.folder / "run", [False, True, True, False, False, False])
    next(kills(soak))
    (entry,) = soak.done.values()
    assert (entry["held"], entry["count"], early.ends) == (True, 3, [])
    assert early.victims[-3:] == [0, 1, "launcher"]
    soak._zygote = Early(soak.folder / "run", [True] * 99)
    soak.done.clear()
    next(kills(soak))
    (entry,) = soak.done.values()
    assert not entry["held"]
    assert "only 0 of 3 kills" in entry["what"]
