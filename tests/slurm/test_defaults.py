"""The cluster's defaults: where they are found, what is wrong with them, and that the job wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from runner.errors import JobError
from runner.job.schema import Slurm
from runner.slurm.defaults import defaults_file, load_defaults, resolve

DEFAULTS = """\
[slurm]
partition = "gpu"
account = "nlp"
gpus_per_node = 4
time = "8:00:00"
modules = ["cuda/12.4"]
environment = { HF_HOME = "/scratch/hf", NCCL_DEBUG = "WARN" }
"""


@pytest.fixture
def defaults(tmp_path) -> Path:
    path = tmp_path / "slurm.toml"
    path.write_text(DEFAULTS)
    return path


def section(**values) -> Slurm:
    return Slurm.model_validate(values)


def test_the_job_wins_key_by_key(defaults):
    job = section(partition="debug", modules=[], environment={"NCCL_DEBUG": "INFO", "A": "b"})
    found = resolve(job, defaults)
    assert (found.partition, found.account, found.gpus_per_node) == ("debug", "nlp", 4)
    assert found.modules == ()
    assert found.environment == {"HF_HOME": "/scratch/hf", "NCCL_DEBUG": "INFO", "A": "b"}


def test_a_key_set_to_the_schemas_default_wins_too(tmp_path):
    path = tmp_path / "slurm.toml"
    path.write_text("[slurm]\nrequeue = false\nnodes = 4\n")
    assert resolve(section(requeue=True), path).requeue is True
    assert resolve(section(nodes=1), path).nodes == 1
    assert resolve(section(), path).requeue is False


def test_a_job_on_cpus_where_the_defaults_are_for_gpus(defaults):
    defaults.write_text(f'{DEFAULTS}gpu_type = "a100"\n')
    found = resolve(section(gpus_per_node=0, ranks_per_node=2), defaults)
    assert (found.gpus_per_node, found.gpu_type, found.tasks_per_node) == (0, None, 2)


@pytest.mark.parametrize(
    ("default", "job", "left"),
    [
        ({"mem": "8G"}, {"sbatch": {"mem-per-cpu": "2G"}}, {"sbatch": {"mem-per-cpu": "2G"}}),
        (
            {"sbatch": {"mem-per-cpu": "2G", "nice": 1}},
            {"mem": "8G"},
            {"mem": "8G", "sbatch": {"nice": 1}},
        ),
        (
            {"sbatch": {"mem-per-cpu": "2G"}},
            {"sbatch": {"mem-per-gpu": "8G"}},
            {"sbatch": {"mem-per-gpu": "8G"}},
        ),
        (
            {"gpus_per_node": 4, "gpu_type": "a100"},
            {"ranks_per_node": 2, "sbatch": {"gres": "gpu:2"}},
            {"ranks_per_node": 2, "sbatch": {"gres": "gpu:2"}},
        ),
        (
            {"sbatch": {"gres": "gpu:a100:4,lscratch:9"}},
            {"gpus_per_node": 1},
            {"gpus_per_node": 1, "sbatch": {"gres": "lscratch:9"}},
        ),
        ({"sbatch": {"gres": "gpu:4"}}, {"gpus_per_node": 0}, {"gpus_per_node": 0, "sbatch": {}}),
        ({"mem": "8G"}, {"sbatch": {"nice": 1}}, {"mem": "8G", "sbatch": {"nice": 1}}),
        (
            {"gpus_per_node": 4},
            {"sbatch": {"gres": "lscratch:9"}},
            {"gpus_per_node": 4, "sbatch": {"gres": "lscratch:9"}},
        ),
    ],
)
def test_what_the_job_asks_for_takes_the_place_of_what_excludes_it(tmp_path, default, job, left):
    path = tmp_path / "slurm.toml"
    path.write_text(tomli_w.dumps({"slurm": default}))
    assert resolve(section(**job), path) == section(**left)


@pytest.mark.parametrize("job", [None, Slurm()])
def test_without_a_section_the_defaults_stand(defaults, job):
    assert resolve(job, defaults) == load_defaults(defaults)
    assert resolve(job, None) == Slurm()


def test_what_is_wrong_is_said_with_file_and_line(tmp_path):
    path = tmp_path / "slurm.toml"
    path.write_text('partition = "x"\n[slurm]\naccont = "nlp"\nmem = "a;b"\n[train]\nepochs = 1\n')
    with pytest.raises(JobError) as caught:
        load_defaults(path)
    assert caught.value.exit_code == 64
    assert list(caught.value.problems) == [
        f"{path}:1: partition: only [slurm] may stand in slurm.toml; partition belongs to a job",
        f"{path}:3: slurm.accont: unknown key; did you mean account?",
        f'{path}:4: slurm.mem: "a;b" is not allowed here; write an amount such as "64G"'
        " (K, M, G or T; 0 is all of a node)",
        f"{path}:5: train: only [slurm] may stand in slurm.toml; train belongs to a job",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "[slurm", "slurm = 3\n"])
def test_files_that_are_no_defaults(tmp_path, text):
    path = tmp_path / "slurm.toml"
    path.write_text(text)
    with pytest.raises(JobError) as caught:
        load_defaults(path)
    assert str(path) in str(caught.value)


def test_what_does_not_fit_together_names_the_file(defaults):
    with pytest.raises(JobError) as caught:
        resolve(section(ranks_per_node=3), defaults)
    assert str(caught.value).startswith(f"[slurm] of the job, with the defaults of {defaults}: ")


def test_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.delenv("SPANTUNE_SLURM", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert defaults_file() is None
    usual = tmp_path / "spantune" / "slurm.toml"
    usual.parent.mkdir()
    usual.write_text(DEFAULTS)
    assert defaults_file() == usual
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / ".config" / "spantune"
    home.mkdir(parents=True)
    (home / "slurm.toml").write_text(DEFAULTS)
    assert defaults_file() == home / "slurm.toml"
    monkeypatch.setenv("SPANTUNE_SLURM", "")
    assert defaults_file() is None
    monkeypatch.setenv("SPANTUNE_SLURM", "~/nowhere.toml")
    named = defaults_file()
    assert named == tmp_path / "home" / "nowhere.toml"
    with pytest.raises(JobError, match="no such file"):
        resolve(None, named)
