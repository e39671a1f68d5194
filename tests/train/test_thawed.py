"""A start that is frozen, succeeded, and thaws after its heir has finished: whatever it was about
to do, nothing of the finished run changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.run.folder import RunDir
from tests.interruptions import DATA, FAULT_JOB, at_step, sets
from tests.workers.zygote import Running, Zygote

FREEZE = """
import functools, importlib, os, signal
def freeze_before(place):
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    *above, name = name.split(".")
    for part in above:
        owner = getattr(owner, part)
    does = getattr(owner, name)
    @functools.wraps(does)
    def frozen(*arguments, **options):
        setattr(owner, name, does)
        os.kill(os.getpid(), signal.SIGSTOP)
        return does(*arguments, **options)
    setattr(owner, name, frozen)
freeze_before({place!r})
"""
# What a start is about to do when it is frozen, and whether it begins, goes on or begins anew.
PLACES = [
    ("runner.train.trainer:publish_model", "new"),
    ("runner.checkpoint.manager:CheckpointManager._begin_tables", "resumed"),
    ("runner.run.resume:_put_aside", "--restart"),
    *(
        pytest.param(place, start, marks=pytest.mark.slow)
        for place, start in [
            ("runner.run.resume:write_atomic", "resumed"),
            ("runner.run.lease:Lease.seal", "resumed"),
            ("runner.run.lease:Lease.note_resumed_step", "resumed"),
            ("runner.checkpoint.commit:rotate", "new"),
            ("runner.checkpoint.store:CheckpointStore.clean", "resumed"),
            ("runner.checkpoint.store:CheckpointStore.begin", "new"),
            ("runner.checkpoint.store:CheckpointStore.commit", "new"),
            ("runner.export.save:shutil.copytree", "new"),
            ("runner.export.save:shutil.copytree", "new, all kept"),
            ("runner.utils.tables:_cell", "resumed"),
            ("runner.train.run_log:write_json", "resumed"),
            ("runner.train.run_log:append_row", "new"),
            ("runner.train.run_log:draw_curves", "new"),
            ("runner.train.finish:write_predictions", "new"),
            ("runner.train.finish:write_report", "new"),
            ("runner.train.finish:write_json", "new"),
        ]
    ),
]


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[[str], Path]) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(FAULT_JOB.format(data=DATA, model=tiny("bert")))
    return path


def frozen(process: Running) -> None:
    """Wait until the rank stands still."""
    deadline = time.monotonic() + 60
    while "State:\tT" not in Path(f"/proc/{process.ranks[0]}/status").read_text():
        assert time.monotonic() < deadline, process.text()
        time.sleep(0.02)


def seem_dead(run: RunDir) -> None:
    """Let the newest start be one of another machine that has been silent for long."""
    entry = max(run.attempts.glob("????.json"))
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"machine": "another"}))
    for path in (entry, entry.with_suffix(".alive")):
        os.utime(path, (1, 1))


def contents(run: RunDir) -> dict[str, str]:
    """Every file but the log, in which a start may say that it ends, and its own of the ledger."""
    return {
        str(path.relative_to(run.path)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.path.rglob("*"))
        if path.is_file() and path != run.log and path.parent != run.attempts
    }


@pytest.mark.parametrize(("place", "start"), PLACES)
def test_a_start_that_thaws_changes_nothing_of_its_heirs_run(
    zygote: Zygote, job_file: Path, tmp_path: Path, place: str, start: str
) -> None:
    run = RunDir(tmp_path / "run")
    # Where all is kept, what the first start was about to copy is there still.
    keep = "all" if start.endswith("all kept") else "none"
    options = ("train.epochs=2", f"train.keep_checkpoints={keep}")
    arguments = [job_file, "--run-dir", run.path, *sets(*options)]
    if not start.startswith("new"):
        stop = "import runner.utils.signals; runner.utils.signals.request_stop('SIGUSR2')"
        codes, text = zygote.run(*arguments, code=at_step(2, 0, stop))
        assert codes == [75], text
    restart = ["--restart"] if start == "--restart" else []
    first = zygote.start(*arguments, *restart, code=FREEZE.format(place=place))
    try:
        frozen(first)
        seem_dead(run)
        # A restart that was frozen before it put anything aside is succeeded by another one.
        codes, text = zygote.run(*arguments, *restart)
        assert codes == [0], text
        before = contents(run)
        assert "result.json" in before
    finally:
        first.kill(0, signal.SIGCONT)
    codes = first.wait()
    assert contents(run) == before, first.text()
    assert codes == [73], first.text()
    assert "was taken over by" in first.text()
    # And who asks for the run finds it finished.
    codes, text = zygote.run(*arguments)
    assert codes == [0], text
    assert "finished already" in text


@pytest.mark.parametrize(("other", "code"), [(False, 0), (True, 65)])
def test_a_start_that_comes_late_looks_again_at_what_is_there(
    zygote: Zygote, job_file: Path, tmp_path: Path, other: bool, code: int
) -> None:
    """It found an empty folder, is frozen before it takes the lease, and finds a run when it has
    it: its own job's, finished meanwhile, or another's."""
    run, options = RunDir(tmp_path / "run"), ["--set", "train.epochs=1"]
    place = "runner.run.lease:_create_entry"
    first = zygote.start(job_file, "--run-dir", run.path, *options, code=FREEZE.format(place=place))
    try:
        frozen(first)
        changed = ["--set", "train.learning_rate=1e-4"] if other else []
        codes, text = zygote.run(job_file, "--run-dir", run.path, *options, *changed)
        assert codes == [0], text
        before = contents(run)
    finally:
        first.kill(0, signal.SIGCONT)
    assert first.wait() == [code], first.text()
    assert ("holds a run of another job" if other else "finished already") in first.text()
    assert contents(run) == before


@pytest.mark.parametrize(
    "place",
    [
        "runner.train.trainer:publish_model",
        pytest.param("runner.train.run_log:append_row", marks=pytest.mark.slow),
        pytest.param("runner.checkpoint.store:CheckpointStore.commit", marks=pytest.mark.slow),
    ],
)
def test_a_folder_that_was_removed_and_made_anew_is_another_runs(
    zygote: Zygote, job_file: Path, tmp_path: Path, place: str
) -> None:
    """Both runs are the first start of their folder; the second has another job."""
    run = RunDir(tmp_path / "run")
    first = zygote.start(job_file, "--run-dir", run.path, code=FREEZE.format(place=place))
    try:
        frozen(first)
        shutil.rmtree(run.path)
        options = ("--set", "train.epochs=1", "--set", "train.learning_rate=1e-4")
        codes, text = zygote.run(job_file, "--run-dir", run.path, *options)
        assert codes == [0], text
        before, ledger = contents(run), sorted(path.name for path in run.attempts.iterdir())
    finally:
        first.kill(0, signal.SIGCONT)
    codes = first.wait()
    assert codes == [73], first.text()
    assert "was removed while this start ran, and made anew" in first.text()
    assert contents(run) == before
    assert sorted(path.name for path in run.attempts.iterdir()) == ledger


def test_ranks_that_are_suspended_together_go_on(
    zygote: Zygote, job_file: Path, tmp_path: Path
) -> None:
    """By a scheduler, a container or Ctrl-Z, for longer than a rank may stand still."""
    run = RunDir(tmp_path / "run")
    arguments = [job_file, "--run-dir", run.path, "--set", "train.timeout_minutes=0.05"]
    here = tmp_path / "here"
    pause = f"import time; open({str(here)!r}, 'w').close(); time.sleep(1)"
    running = zygote.start(*arguments, ranks=2, code=at_step(6, 0, pause))
    while not here.exists():
        time.sleep(0.02)
    running.kill("all", signal.SIGSTOP)
    time.sleep(5)
    running.kill("all", signal.SIGCONT)
    assert running.wait() == [0, 0], running.text()
