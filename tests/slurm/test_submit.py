"""Submitting: what is checked first, what lies in the run folder, what SLURM is asked."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.command import main
from runner.errors import DataError, JobError, RunDirError, SlurmError, SlurmTimeout, StorageError
from runner.job.load import load_job
from runner.job.sweep import load_trials
from runner.run.folder import RunDir
from runner.slurm import client as slurm_jobs
from runner.slurm.client import read_submission
from runner.slurm.request import expand, node_command, prepare
from runner.slurm.submit import submit_run, submit_sweep

ROOT = Path(__file__).parents[2]
JOB = """\
name = "n"
data = {train = "o/n", validation = "o/n"}
model = {name = "o/n"}
train = {epochs = 1, batch_size = 8, learning_rate = 1e-4}
"""
SWEEP = (
    JOB
    + """\
[sweep]
seeds = [1, 2]
over = {train.learning_rate = [1e-5, 3e-5]}
"""
)
TAKES = {"sbatch": "[ $1 = --test-only ] || echo 17", "squeue": "exit 0"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPANTUNE_SLURM", "")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    Path("job.toml").write_text(JOB)
    Path("sweep.toml").write_text(SWEEP)


def order(path: str = "job.toml", *overrides: str):
    return prepare(path, overrides, "spantune submit")


# ---- checks


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["slurm.ranks_per_node=3"],
            "job.toml: train.batch_size: 8 windows per step do not divide over 3 ranks; use 1, 2, 4"
            " or 8 ranks, or a batch_size of 6 or 9",
        ),
        (
            ["slurm.nodes=3", "slurm.gpus_per_node=4"],
            "job.toml: train.batch_size: 8 windows per step do not divide over 12 ranks; use 1, 2,"
            " 4 or 8 ranks, or a batch_size of 12",
        ),
        (
            ["slurm.venv=/nowhere"],
            "job.toml: slurm.venv: /nowhere is no environment: it has no bin/python",
        ),
        (
            ["slurm.environment.A=$NOT_SET_HERE"],
            "job.toml: slurm.environment.A: $NOT_SET_HERE: the environment variable NOT_SET_HERE is"
            " not set",
        ),
    ],
)
def test_what_would_fail_on_the_nodes_fails_here(overrides, problem):
    with pytest.raises(JobError) as caught:
        order("job.toml", *overrides)
    assert list(caught.value.problems) == [problem]


def test_every_trial_is_checked():
    Path("sweep.toml").write_text(
        SWEEP.replace("learning_rate = [1e-5, 3e-5]", "batch_size = [8, 9]")
    )
    with pytest.raises(JobError, match="9 windows per step do not divide over 2 ranks"):
        order("sweep.toml", "slurm.ranks_per_node=2")


def test_the_environment_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "envs/qa/bin").mkdir(parents=True)
    (tmp_path / "envs/qa/bin/python").touch()
    monkeypatch.setenv("WORK", str(tmp_path))
    found = order(
        "job.toml", "slurm.venv=$WORK/envs/qa", "slurm.environment.HF_HOME=$WORK/hf"
    ).section
    assert found.venv == f"{tmp_path}/envs/qa"
    assert found.environment == {"HF_HOME": f"{tmp_path}/hf"}
    assert node_command(found)[:2] == [f"{tmp_path}/envs/qa/bin/python", "-u"]
    assert expand(found) == found


def test_what_starts_spantune_on_a_node():
    main_script = str(ROOT / "runner" / "main.py")
    assert node_command(order().section) == [sys.executable, "-u", main_script]
    boxed = order("job.toml", 'slurm.container=["apptainer", "exec", "/x.sif"]').section
    assert node_command(boxed) == ["apptainer", "exec", "/x.sif", "python3", "-u", main_script]


@pytest.mark.parametrize("name", ["LD_PRELOAD", "BASH_ENV", "PATH"])
@pytest.mark.parametrize("where", ["job", "defaults"])
def test_a_variable_that_runs_something_is_submitted_to_nobody(
    fake_slurm, tmp_path, monkeypatch, capsys, name, where
):
    calls = fake_slurm(**TAKES)
    path = Path("job.toml" if where == "job" else "slurm.toml")
    if where == "defaults":
        monkeypatch.setenv("SPANTUNE_SLURM", str(path))
        path.write_text("")
    with path.open("a") as file:
        file.write(f'[slurm.environment]\n{name} = "/x"\n')
    assert main(["submit", "job.toml"]) == 64
    line = path.read_text().splitlines().index("[slurm.environment]") + 1
    err = capsys.readouterr().err
    assert f"{path}:{line}: slurm.environment: {name} makes bash, the loader or Python run" in err
    assert calls.read_text() == ""
    assert not Path("runs").exists()


def test_what_a_container_runs_is_said_before_it_is_submitted(fake_slurm, capsys):
    fake_slurm(sbatch="echo refused >&2; exit 1", squeue="exit 0")
    assert main(["submit", "job.toml", "--set", 'slurm.container=["touch", "x"]']) == 72
    assert capsys.readouterr().out == "n: each rank is run by: touch x python3\n"


# ---- one run


def test_a_run_is_prepared_and_submitted(fake_slurm, tmp_path):
    calls = fake_slurm(**TAKES)
    done = submit_run(order("job.toml", "slurm.partition=gpu"), tmp_path / "runs", None)
    assert (done.job_id, done.runs, done.doubt) == ("17", 1, None)
    run = RunDir(done.folder)
    assert done.folder.parent == tmp_path / "runs" / "n"
    assert sorted(path.name for path in done.folder.iterdir()) == [
        *(".prepared.json", "job.toml", "slurm.json", "submit.sh")
    ]
    assert load_job(run.job) == load_job("job.toml", ["slurm.partition=gpu"])
    script = run.submit_script.read_text()
    assert "#SBATCH --partition=gpu\n" in script
    assert f"\nrun={run.path}\n" in script
    submission = read_submission(run.slurm)
    assert submission is not None
    assert submission.name == "17"
    assert submission.output == str(run.path / "slurm-17.out")
    assert submission.options["partition"] == "gpu"
    assert submission.options["signal_seconds"] == 180
    assert calls.read_text().splitlines() == [
        f"sbatch --test-only {run.submit_script}",
        f"sbatch --parsable {run.submit_script}",
    ]


def test_defaults_of_the_cluster_are_recorded_not_put_into_the_job(
    fake_slurm, tmp_path, monkeypatch
):
    fake_slurm(**TAKES)
    defaults = tmp_path / "defaults.toml"
    defaults.write_text('[slurm]\npartition = "gpu"\naccount = "nlp"\n')
    monkeypatch.setenv("SPANTUNE_SLURM", str(defaults))
    done = submit_run(order("job.toml", "slurm.account=me"), tmp_path / "runs", None)
    submission = read_submission(RunDir(done.folder).slurm)
    assert submission is not None
    assert submission.defaults == str(defaults)
    assert (submission.options["partition"], submission.options["account"]) == ("gpu", "me")
    text = RunDir(done.folder).job.read_text()
    assert 'account = "me"' in text
    assert "partition" not in text


def test_a_refused_run_leaves_nothing(fake_slurm, tmp_path):
    fake_slurm(sbatch="echo 'sbatch: error: no' >&2; exit 1")
    with pytest.raises(SlurmError, match="SLURM refuses the job: no"):
        submit_run(order(), tmp_path / "runs", None)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    with pytest.raises(SlurmError):
        submit_run(order(), tmp_path / "runs", tmp_path / "runs" / "a" / "b")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_hostile_folder_leaves_nothing(fake_slurm, tmp_path):
    calls = fake_slurm(**TAKES)
    with pytest.raises(JobError, match="choose another folder"):
        submit_run(order(), tmp_path / "a;b", None)
    assert calls.read_text() == ""
    assert not (tmp_path / "a;b").exists()


@pytest.mark.parametrize("path", ["job.toml", "sweep.toml"])
@pytest.mark.parametrize("name", ["home", "a;b"])
def test_what_was_in_a_folder_stays_whatever_fails(fake_slurm, tmp_path, path, name):
    fake_slurm(sbatch="echo no >&2; exit 1")
    folder = tmp_path / name
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter.tex").write_text("mine")
    (folder / "submit.sh").write_text("mine")
    with pytest.raises(DataError, match=r"holds submit\.sh, thesis and is not"):
        (submit_sweep if path == "sweep.toml" else submit_run)(order(path), tmp_path, folder)
    assert (folder / "thesis" / "chapter.tex").read_text() == "mine"
    assert (folder / "submit.sh").read_text() == "mine"
    assert sorted(file.name for file in folder.iterdir()) == ["submit.sh", "thesis"]


def test_a_refused_start_of_a_run_leaves_it_as_it_was(fake_slurm, tmp_path):
    fake_slurm(**TAKES)
    folder = tmp_path / "run"
    submit_run(order(), tmp_path, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fake_slurm(**TAKES | {"sbatch": "exit 1"})
    with pytest.raises(SlurmError):
        submit_run(order("job.toml", "slurm.time=9", "track.wait=7"), tmp_path, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("path", ["job.toml", "sweep.toml"])
def test_the_folder_of_a_job_that_slurm_may_have_taken_is_kept(
    fake_slurm, tmp_path, monkeypatch, path
):
    monkeypatch.setattr(slurm_jobs, "SBATCH_ANSWER_S", 0.2)
    fake_slurm(sbatch="[ $1 = --test-only ] || exec sleep 5")
    with pytest.raises(SlurmTimeout, match="is kept for the job") as caught:
        (submit_sweep if path == "sweep.toml" else submit_run)(order(path), tmp_path / "r", None)
    [folder] = (tmp_path / "r" / "n").iterdir()
    assert str(folder) in str(caught.value)
    assert (folder / "submit.sh").is_file()
    assert list(folder.rglob("job.toml"))


def test_a_controller_that_is_silent_before_anything_was_asked_leaves_nothing(
    fake_slurm, tmp_path, monkeypatch
):
    monkeypatch.setattr(slurm_jobs, "SLURM_ANSWER_S", 0.2)
    fake_slurm(sbatch="exec sleep 5")
    with pytest.raises(SlurmError, match="has not answered"):
        submit_run(order(), tmp_path / "runs", None)
    assert not (tmp_path / "runs").exists()


def test_a_job_that_cannot_be_noted_is_told(fake_slurm, tmp_path, monkeypatch):
    fake_slurm(**TAKES)

    def full(*_):
        raise StorageError("slurm.json: No space left on device")

    monkeypatch.setattr("runner.slurm.submit.write_submission", full)
    with pytest.raises(StorageError, match=r"No space left .*; job 17 is submitted all the same"):
        submit_run(order(), tmp_path, tmp_path / "run")
    assert (tmp_path / "run" / "job.toml").is_file()


@pytest.mark.parametrize("path", ["job.toml", "sweep.toml"])
def test_a_folder_that_cannot_be_is_one_line(fake_slurm, capsys, path):
    calls = fake_slurm(**TAKES)
    Path("file").write_text("mine")
    assert main(["submit", path, "--run-dir", "file/run"]) == 74
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["submit", path, "--run-dir", "file"]) == 74
    assert Path("file").read_text() == "mine"
    assert calls.read_text() == ""


@pytest.mark.parametrize("path", ["job.toml", "sweep.toml"])
def test_two_submits_at_once_are_one_job(fake_slurm, tmp_path, path):
    calls = fake_slurm(**TAKES)
    submit = submit_sweep if path == "sweep.toml" else submit_run
    folder = tmp_path / "run"
    submit(order(path), tmp_path, folder)
    before = calls.read_text()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)  # as another process that is at it
    with pytest.raises(RunDirError, match="is being submitted by another") as caught:
        submit(order(path), tmp_path, folder)
    assert caught.value.exit_code == 73
    assert calls.read_text() == before
    os.close(other)
    assert submit(order(path), tmp_path, folder)


def test_a_run_goes_on_in_its_folder(fake_slurm, tmp_path):
    fake_slurm(**TAKES)
    folder = tmp_path / "run"
    submit_run(order(), tmp_path, folder)
    fake_slurm(**TAKES | {"sbatch": "echo 18"})
    submit_run(order("job.toml", "slurm.time=5:00:00"), tmp_path, folder)
    submission = read_submission(RunDir(folder).slurm)
    assert submission is not None
    assert (submission.job_id, submission.earlier) == ("18", ["17"])
    assert "--time=5:00:00" in RunDir(folder).submit_script.read_text()


def test_a_run_goes_on_with_what_the_newest_submission_says(fake_slurm, tmp_path):
    fake_slurm(**TAKES)
    folder = tmp_path / "run"
    submit_run(order(), tmp_path, folder)
    changes = [
        *("train.checkpoint_minutes=3", "train.timeout_minutes=9"),
        *("expect={f1 = 90.0}", 'track.tools=["wandb"]', "slurm.time=5:00:00"),
    ]
    submit_run(order("job.toml", *changes), tmp_path, folder)
    assert load_job(RunDir(folder).job) == load_job("job.toml", changes)


def test_a_run_in_the_queue_is_not_submitted_again(fake_slurm, tmp_path):
    fake_slurm(**TAKES)
    folder = tmp_path / "run"
    submit_run(order(), tmp_path, folder)
    calls = fake_slurm(**TAKES | {"squeue": "echo '17|PENDING|Priority|1:00|'"})
    with pytest.raises(RunDirError, match="submitted already: job 17 is PENDING") as caught:
        submit_run(order(), tmp_path, folder)
    assert caught.value.exit_code == 73
    assert "sbatch" not in calls.read_text()
    fake_slurm(**TAKES | {"squeue": "echo '17|CANCELLED|None|1:00|'"})
    assert submit_run(order(), tmp_path, folder).job_id == "17"


def test_a_folder_of_another_job_is_refused(fake_slurm, tmp_path):
    fake_slurm(**TAKES)
    submit_run(order(), tmp_path, tmp_path / "run")
    with pytest.raises(DataError, match=r"of another job: train\.epochs is 1 there and 2 now"):
        submit_run(order("job.toml", "train.epochs=2"), tmp_path, tmp_path / "run")
    assert (tmp_path / "run" / "slurm.json").is_file()


# ---- a sweep


def test_a_sweep_is_an_array(fake_slurm, tmp_path):
    fake_slurm(**TAKES)
    done = submit_sweep(order("sweep.toml"), tmp_path / "runs", None)
    assert done is not None
    assert done.runs == 4
    _, trials = load_trials("sweep.toml")
    names = [trial.name for trial in trials]
    manifest = json.loads((done.folder / "sweep.json").read_text())
    assert [entry["name"] for entry in manifest["trials"]] == names
    script = (done.folder / "submit.sh").read_text()
    assert "#SBATCH --array=0-3\n" in script
    for index, trial in enumerate(trials):
        run = RunDir(done.folder / trial.name)
        assert load_job(run.job) == trial.job
        assert trial.job.sweep is None
        submission = read_submission(run.slurm)
        assert submission is not None
        assert (submission.name, submission.index) == (f"17_{index}", index)
        assert submission.output == str(done.folder / f"slurm-17_{index}.out")
        assert f"\n  {trial.name}\n" in script


def test_only_what_is_left_of_a_sweep_is_submitted(fake_slurm, tmp_path):
    fake_slurm(**TAKES)
    folder = tmp_path / "sweep"
    names = [trial.name for trial in load_trials("sweep.toml")[1]]
    assert submit_sweep(order("sweep.toml"), tmp_path, folder)
    (folder / names[1] / "result.json").write_text("{}")
    fake_slurm(**TAKES | {"sbatch": "echo 18", "squeue": "echo '17_0|RUNNING|None|1:00|n1'"})
    done = submit_sweep(order("sweep.toml"), tmp_path, folder)
    assert done is not None
    assert done.runs == 2  # one has a result, one still runs
    assert "#SBATCH --array=2-3\n" in (folder / "submit.sh").read_text()
    kept = read_submission(RunDir(folder / names[0]).slurm)
    assert kept is not None
    assert kept.name == "17_0"

    running = (
        "for i in 0 2 3; do echo \"18_$i|RUNNING|None|1:00|n1\"; done; echo '17_0|RUNNING|x|1|n'"
    )
    fake_slurm(**TAKES | {"squeue": running})
    with pytest.raises(RunDirError, match="the 3 trials without a result run or are in the queue"):
        submit_sweep(order("sweep.toml"), tmp_path, folder)

    for name in names:
        (folder / name / "result.json").write_text("{}")
    assert submit_sweep(order("sweep.toml"), tmp_path, folder) is None


def test_slurm_is_asked_once_for_all_trials(fake_slurm, tmp_path):
    fake_slurm(**TAKES)
    submit_sweep(order("sweep.toml"), tmp_path, tmp_path / "sweep")
    calls = fake_slurm(**TAKES | {"sacct": "exit 1"})
    submit_sweep(order("sweep.toml"), tmp_path, tmp_path / "sweep")
    verbs = [line.split()[0] for line in calls.read_text().splitlines()]
    assert sorted(verbs) == ["sacct", "sbatch", "sbatch", "squeue"]


def test_a_refused_sweep_leaves_nothing(fake_slurm, tmp_path):
    fake_slurm(sbatch="exit 1")
    with pytest.raises(SlurmError, match="no reason given"):
        submit_sweep(order("sweep.toml"), tmp_path / "runs", None)
    assert not (tmp_path / "runs").exists()


# ---- the command


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gpus_per_node=1", "cpus_per_task=8", "time=1:00:00"], []),
        (["sbatch.gres=gpu:a100:1", "cpus_per_task=8", "time=1:00:00"], []),
        (["gpus_per_node=1", "sbatch.exclusive=true", "time=90"], []),
        (["gpus_per_node=1", "cpus_per_task=1", "time=90"], ["one CPU core"]),
        (["gpus_per_node=1", "cpus_per_task=8"], ["no time limit"]),
        (["gpus_per_node=0", "cpus_per_task=8", "time=90"], ["no GPU"]),
        (["gpus_per_node=1", "cpus_per_task=8", "time=90", "mem=64"], ["64 MB to SLURM"]),
    ],
)
def test_what_a_run_rarely_goes_without_is_missed(overrides, words):
    notes = order("job.toml", *(f"slurm.{override}" for override in overrides)).notes()
    notes = [note for note in notes if "in the cache of the hub" not in note]
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda p: p.stem)
def test_the_committed_jobs_ask_for_all_of_it(path, monkeypatch):
    monkeypatch.setattr("runner.job.load.package_folder", lambda name: Path("/somewhere"))
    notes = order(str(path)).notes()
    assert not [note for note in notes if "in the cache of the hub" not in note]


def test_what_is_said(fake_slurm, capsys):
    fake_slurm(**TAKES)
    assert main(["submit", "job.toml", "sweep.toml", "--set", "slurm.partition=gpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    [plain, *_] = sorted(Path("runs/n").glob("*/slurm.json"))
    lines = out.splitlines()
    assert lines[:4] == [
        "n: job 17, 1 node(s) with 1 CPU rank(s), partition gpu",
        f"  spantune status {plain.parent}",
        f"  spantune logs {plain.parent} -f",
        f"  spantune cancel {plain.parent}",
    ]
    assert lines[4:7] == [
        "  no GPU is asked for: set slurm.gpus_per_node = 1",
        "  each rank has one CPU core: set slurm.cpus_per_task = 8, say",
        '  no time limit is asked for: set slurm.time = "4:00:00", say',
    ]
    assert "o/n is not in the cache of the hub" in lines[7]
    assert "n: job 17, an array of 4 trials, 1 node(s) with 1 CPU rank(s), partition gpu" in lines


def test_one_wrong_job_keeps_all_from_being_submitted(fake_slurm, capsys):
    calls = fake_slurm(**TAKES)
    Path("wrong.toml").write_text(JOB.replace("epochs", "epoch"))
    assert main(["submit", "job.toml", "wrong.toml"]) == 64
    assert (
        capsys.readouterr().err == "wrong.toml:4: train.epoch: unknown key; did you mean epochs?\n"
    )
    assert calls.read_text() == ""
    assert not Path("runs").exists()


def test_a_dry_run_writes_nothing(fake_slurm, capsys):
    calls = fake_slurm(**TAKES)
    assert main(["submit", "job.toml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n# n on SLURM, written by: spantune submit job.toml\n#\n")
    assert out.endswith('\nexit "$code"\n')
    assert main(["submit", "sweep.toml", "--dry-run"]) == 0
    assert "#SBATCH --array=0-3\n" in capsys.readouterr().out
    assert calls.read_text() == ""
    assert not Path("runs").exists()


def test_a_dry_run_of_a_sweep_that_has_begun_shows_what_is_left(fake_slurm, capsys):
    fake_slurm(**TAKES)
    assert main(["submit", "sweep.toml", "--run-dir", "s"]) == 0
    names = [entry["name"] for entry in json.loads(Path("s/sweep.json").read_text())["trials"]]
    Path("s", names[1], "result.json").write_text("{}")
    # Other values come first in the job now, but each trial keeps its place in the array.
    Path("sweep.toml").write_text(SWEEP.replace("[1e-5, 3e-5]", "[7e-5, 1e-5, 3e-5]"))
    fake_slurm(**TAKES | {"squeue": "echo '17_3|RUNNING|None|1:00|n1'"})
    capsys.readouterr()
    assert main(["submit", "sweep.toml", "--run-dir", "s", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0,2,4-5\n" in shown
    assert main(["submit", "sweep.toml", "--run-dir", "s"]) == 0
    lines = shown.replace(" --dry-run", "").splitlines()
    assert Path("s", "submit.sh").read_text().splitlines() == lines
    for path in Path("s").glob("*/job.toml"):
        path.with_name("result.json").write_text("{}")
    capsys.readouterr()
    assert main(["submit", "sweep.toml", "--run-dir", "s", "--dry-run"]) == 0
    assert capsys.readouterr().out == "n: finished already, s\n"


def test_doubts_of_slurm_are_told(fake_slurm, capsys):
    fails = "echo 'allocation failure: Too many' >&2; exit 1"
    fake_slurm(sbatch=f"if [ $1 = --test-only ]; then {fails}; fi; echo 9")
    assert main(["submit", "job.toml"]) == 0
    assert "could not start it on the nodes as they are now: Too many" in capsys.readouterr().out


def test_a_folder_is_for_one_job(fake_slurm, capsys):
    fake_slurm(**TAKES)
    assert main(["submit", "job.toml", "job.toml", "--run-dir", "x"]) == 64
    assert "takes the run of one job" in capsys.readouterr().err


def test_no_heavy_library_is_loaded(fake_slurm):
    """It takes half a second, since it does with a few hundred modules."""
    fake_slurm(**TAKES)
    script = (
        "import sys\nfrom runner.cli.command import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'evaluate', 'numpy'}\n"
        "sys.exit(code or str(heavy & set(sys.modules) or len(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "submit", "job.toml"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 100 < int(done.stderr) < 700
