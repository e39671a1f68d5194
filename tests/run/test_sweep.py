"""Working through a sweep on this machine: order, failures, interruptions, going on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli import command as cli
from runner.errors import MachineError
from runner.job.load import load_job
from runner.job.sweep import load_trials
from runner.run.folder import RunDir
from runner.run.sweep import run_trials

ROOT = Path(__file__).parents[2]
JOB = """\
name = "n"
data = {train = "o/n", validation = "o/n"}
model = {name = "o/n"}
train = {epochs = 1, batch_size = 8, learning_rate = 1e-4}
sweep = {seeds = [1, 2, 3]}
"""
RESULT = '{"metrics": {"f1": 50.0, "exact_match": 40.0, "loss": 1.0}}'


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(JOB)


class Machine:
    """Stands in for the launcher: ends each run with the code that is planned for its seed."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.seeds = codes, []

    def __call__(self, run: RunDir) -> int:
        job = load_job(run.job)
        assert job.sweep is None
        self.seeds.append(job.seed)
        code = self.codes.get(f"seed{job.seed}", 0)
        if code == 0:
            run.result.write_text(RESULT)
        return code


def work(machine: Machine, folder: Path = Path("sweep")) -> list[tuple[int, int | None]]:
    job, trials = load_trials("job.toml")
    seeds = {trial.name: trial.job.seed for trial in trials}
    return [(seeds[name], code) for name, code in run_trials(folder, job, trials, machine)]


def test_one_after_another():
    assert work(Machine()) == [(1, None), (1, 0), (2, None), (2, 0), (3, None), (3, 0)]


def test_a_failure_does_not_keep_the_others_from_running():
    assert [code for _, code in work(Machine(seed1=65))] == [None, 65, None, 0, None, 0]


@pytest.mark.parametrize("code", [75, 130, 137, 143])
def test_an_interruption_does(code):
    assert work(Machine(seed2=code)) == [(1, None), (1, 0), (2, None), (2, code)]


def test_only_what_is_missing_runs_again():
    work(Machine(seed1=70, seed3=64))
    again = Machine()
    work(again)
    assert again.seeds == [1, 3]
    assert work(Machine()) == []


def test_the_command(monkeypatch, capsys):
    machine = Machine(seed2=65)

    def launch(arguments, ranks, **_):
        verb, job, option, folder, *rest = arguments
        assert (verb, option, rest, ranks) == ("rank", "--run-dir", ["--threads", "1"], 2)
        assert Path(job) == Path(folder) / "job.toml"
        return machine(RunDir(folder))

    monkeypatch.setattr("runner.run.launch.launch", launch)
    options = ["--run-dir", "s", "--ranks", "2", "--threads", "1"]
    assert cli.main(["run", "job.toml", *options]) == 65
    out = capsys.readouterr().out
    assert f"n: 3 of 3 trials to run, {Path('s').absolute()}" in out
    assert out.count("ended with exit code 0") == 2
    assert "2/3" in out
    assert "95 % interval" in out
    machine.codes = {}
    assert cli.main(["run", "job.toml", *options]) == 0
    out = capsys.readouterr().out
    assert "n: 1 of 3 trials to run" in out
    assert "3/3" in out
    assert cli.main(["report", "--sweep", "s"]) == 0
    assert "3/3" in capsys.readouterr().out


def test_an_interrupted_sweep_ends_with_75_whatever_failed_before(monkeypatch):
    machine = Machine(seed1=65, seed2=75)
    monkeypatch.setattr(
        "runner.run.launch.launch", lambda arguments, _, **__: machine(RunDir(arguments[3]))
    )
    assert cli.main(["run", "job.toml", "--run-dir", "s"]) == 75
    machine.codes = {"seed1": 65, "seed2": 70}
    assert cli.main(["run", "job.toml", "--run-dir", "s"]) == 65


def test_a_rank_cannot_be_a_sweep():
    done = subprocess.run(
        [sys.executable, "-m", "runner", "rank", "job.toml"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert done.stderr == "job.toml: has a [sweep]; start it with run or submit\n"


def test_a_killed_trial_is_told_and_the_next_one_runs(monkeypatch, capsys):
    machine = Machine()

    def launch(arguments, _, **__):
        run = RunDir(arguments[3])
        if load_job(run.job).seed == 1:
            raise MachineError("the run was killed by SIGKILL")
        return machine(run)

    monkeypatch.setattr("runner.run.launch.launch", launch)
    assert cli.main(["run", "job.toml", "--run-dir", "s"]) == 71
    told = capsys.readouterr()
    assert told.err == "the run was killed by SIGKILL\n"
    assert machine.seeds == [2, 3]
    assert "2/3" in told.out


@pytest.mark.parametrize("option", [["--restart"], ["--resume", "s"]])
def test_a_sweep_goes_on_by_its_folder(option, capsys):
    assert cli.main(["run", "job.toml", *option]) == 64
    assert "goes on with --run-dir and its folder" in capsys.readouterr().err
