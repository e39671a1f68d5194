"""What a finished run keeps: whole runs whose ends are killed, and `spantune prune`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cli.command import main
from runner.run.folder import RunDir, checkpoint_place
from runner.run.lease import Lease
from runner.utils.files import file_sha256
from tests.interruptions import DATA, SIX

JOB = (
    SIX
    + """\
[train]
epochs = 3
batch_size = 8
learning_rate = 1e-2
"""
)
# Ends this process as a power cut does, at the file operation that `{at}` names.
KILL = """
import os
import runner.train.finish
from runner.checkpoint.files import Files
def kill_at(owner, name, wanted):
    original = getattr(owner, name)
    def method(*arguments):
        if wanted(arguments):
            os.kill(os.getpid(), 9)
        return original(*arguments)
    setattr(owner, name, method)
{at}
"""
MOMENTS = {
    "before result.json": "kill_at(runner.train.finish, 'write_json',"
    " lambda given: given[0].name == 'result.json')",
    "before anything is removed": "kill_at(runner.train.finish, 'remove_superfluous',"
    " lambda given: True)",
    "in the midst": "kill_at(Files, 'remove', lambda given: '.trash-' in str(given[1])"
    " and given[1].name == 'kept.json' and (given[1].parents[3] / 'result.json').exists())",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Path:
    path = tmp_path_factory.mktemp("job") / "kept.toml"
    path.write_text(JOB.format(data=DATA, model=tiny("bert")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(job: Path, zygote: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has kept all that it may."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    keep = ("--set", "train.keep_checkpoints=all")
    codes, text = zygote.run(job, "--run-dir", folder, *keep)
    assert codes == [0], text
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """A copy of it, in which `model/` shares its files with the best checkpoint too."""
    subprocess.run(["cp", "-a", finished, tmp_path / "run"], check=True)
    return RunDir(tmp_path / "run")


def steps(run: RunDir) -> list[int]:
    found = [checkpoint_place(path.name) for path in run.checkpoints.glob("*")]
    assert None not in found
    return sorted(place[0] for place in found if place)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def outside(run: RunDir) -> set[str]:
    """Names of the files of a run that are not in its checkpoints."""
    names = set(contents(run.path))
    return {name for name in names if not name.startswith(("checkpoints/", "attempts/"))}


def size(folder: Path) -> int:
    """Bytes on the disk, each file once whatever number of names it has."""
    files = {s.st_ino: s.st_size for p in folder.rglob("*") if (s := p.lstat()) and p.is_file()}
    return sum(files.values())


def check_model(run: RunDir) -> None:
    weights = json.loads(run.result.read_text())["weights_sha256"]
    assert file_sha256(run.model / "model.safetensors") == weights
    assert {"config.json", "tokenizer.json", "README.md"} <= {p.name for p in run.model.iterdir()}


def test_a_finished_run_keeps_what_it_was_told_to(zygote, job, finished, tmp_path):
    kept = RunDir(finished)
    best = json.loads(kept.result.read_text())["step"]
    assert len(steps(kept)) >= 2
    check_model(kept)
    for keep, expected in ((None, []), ("best", [best])):
        run = RunDir(tmp_path / str(keep))
        option = ("--set", f"train.keep_checkpoints={keep}") if keep else ()
        codes, text = zygote.run(job, "--run-dir", run.path, *option)
        assert codes == [0], text
        assert steps(run) == expected
        assert run.checkpoints.exists() == bool(expected)
        check_model(run)
        (said,) = [line for line in text.splitlines() if line.startswith("Removed")]
        assert f'MB (train.keep_checkpoints = "{keep or "none"}")' in said
        assert (
            json.loads(run.result.read_text())["metrics"]
            == json.loads(kept.result.read_text())["metrics"]
        )
        # The rest is there, as ever.
        assert outside(run) == outside(kept)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_the_end_leaves_a_run_that_the_next_start_ends(zygote, job, tmp_path, moment):
    run = RunDir(tmp_path / "run")
    codes, text = zygote.run(job, "--run-dir", run.path, code=KILL.format(at=MOMENTS[moment]))
    assert codes == [-9], text
    assert run.result.exists() == (moment != "before result.json")
    if moment == "in the midst":
        assert list(run.checkpoints.glob(".trash-*"))
        check_model(run)
    else:
        assert len(steps(run)) >= 2
    codes, text = zygote.run(job, "--run-dir", run.path)
    assert codes == [0], text
    assert ("finished already" in text) == (moment != "before result.json")
    assert "emoved " in text
    assert not run.checkpoints.exists()
    check_model(run)


def test_prune_says_what_it_frees_and_frees_it(run, capsys):
    before, whole = contents(run.path), size(run.path)
    assert main(["prune", str(run.path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert contents(run.path) == before
    assert main(["prune", str(run.path), "--keep", "best"]) == 0
    assert steps(run) == [json.loads(run.result.read_text())["step"]]
    assert main(["prune", str(run.path)]) == 0
    assert not run.checkpoints.exists()
    after = contents(run.path)
    assert {k: v for k, v in before.items() if not k.startswith("checkpoints/")} == {
        k: v for k, v in after.items() if k in before
    }
    freed = (whole - size(run.path)) / 1e6
    assert float(said.split()[-2]) == pytest.approx(freed, abs=0.06)
    capsys.readouterr()
    assert main(["prune", str(run.path)]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_prune_refuses_what_is_not_finished_not_ours_or_run_by_somebody(run, tmp_path, capsys):
    before = contents(run.path)
    lease = Lease.acquire(run)
    assert main(["prune", str(run.path)]) == 73
    assert "is being run by" in capsys.readouterr().err
    lease.release(0)
    run.result.rename(run.path / "aside.json")
    assert main(["prune", str(run.path)]) == 73
    assert "is not finished and goes on" in capsys.readouterr().err
    (run.path / "aside.json").rename(run.result)
    theirs = tmp_path / "theirs"
    subprocess.run(["cp", "-a", run.path, theirs], check=True)
    subprocess.run(["rm", "-r", theirs / "attempts"], check=True)
    assert main(["prune", str(theirs)]) == 65
    assert "is not a run that spantune made" in capsys.readouterr().err
    assert steps(RunDir(theirs)) == steps(run)
    assert contents(run.path).items() >= before.items()
    # One that may not be pruned keeps no other from it.
    assert main(["prune", str(theirs), str(run.path)]) == 65
    assert not run.checkpoints.exists()
    assert "removed 0.0 MB in all" not in capsys.readouterr().out


def test_links_are_not_followed(run, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    for name in ("step-000001-a0001", ".trash-step-000001-a0001", ".stage-x", "notes"):
        (run.checkpoints / name).symlink_to(mine)
    (run.checkpoints / "notes.txt").write_text("mine too")
    assert main(["prune", str(run.path)]) == 0
    assert (mine / "notes").read_text() == "mine"
    left = {path.name for path in run.checkpoints.iterdir()}
    assert left >= {"notes", "notes.txt", "step-000001-a0001"}
    assert not [
        path for path in run.checkpoints.iterdir() if path.is_dir() and not path.is_symlink()
    ]
    elsewhere = tmp_path / "elsewhere"
    run.checkpoints.rename(elsewhere)
    (elsewhere / "step-000002-a0001").mkdir()
    run.checkpoints.symlink_to(elsewhere)
    assert main(["prune", str(run.path)]) == 65
    assert "is a link, which is not followed" in capsys.readouterr().err
    assert (elsewhere / "step-000002-a0001").is_dir()


def test_the_finished_trials_of_a_sweep_are_pruned(run, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    run.path.rename(sweep / "one")
    trials = [{"name": name, "values": {}} for name in ("one", "never-ran")]
    (sweep / "sweep.json").write_text(json.dumps({"name": "kept", "trials": trials}))
    assert main(["prune", str(sweep)]) == 0
    assert not (sweep / "one" / "checkpoints").exists()
    assert not (sweep / "never-ran").exists()


@pytest.mark.parametrize("how", ["lost", "other"])
def test_checkpoints_that_may_be_all_that_is_left_of_the_weights_stay(run, capsys, how):
    weights = run.model / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if how == "other":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = sorted(run.checkpoints.rglob("*"))
    assert main(["prune", str(run.path)]) == 65
    assert "may be all that is left of them; none was removed" in capsys.readouterr().err
    assert sorted(run.checkpoints.rglob("*")) == before
