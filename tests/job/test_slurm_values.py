"""What may stand in [slurm]: nothing that a shell or sbatch could take for something else."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runner.job import slurm_values as values
from runner.job.schema import Slurm

HOSTILE = (
    "a;touch x", "$(touch x)", "`touch x`", "a\n#SBATCH --wrap=id", "a\nid", "a b", "a'b", 'a"b',
    "a|id", "a&id", "a>x", "a<x", "a\\b", "a#b", "--wrap=id", "-x", "a\0b", "a\u202eb", "é",
    "$((1))", "${x:-$(id)}", "!!", "a\rb", "a\tb", "{a,b}", "a*", "a?", "~root", "", " ", "\n",
)  # fmt: skip
TEXTS = ("partition", "account", "qos", "mem", "time", "exclude", "mail_user", "venv")


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_refused(key, text):
    if (key, text) == ("venv", "~root"):
        pytest.skip("a home folder is a folder")
    with pytest.raises(ValidationError, match="is not allowed here; write "):
        Slurm.model_validate({key: text})


@pytest.mark.parametrize("text", [t for t in HOSTILE if t not in ("a|id", "a&id", "a*")])
def test_hostile_features_are_refused(text):
    # | & * are SLURM's own there, and stand in quotes in the script.
    with pytest.raises(ValidationError, match="node features"):
        Slurm.model_validate({"constraint": text})


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_lists_and_tables_are_refused(text):
    with pytest.raises(ValidationError, match="is not allowed here"):
        Slurm.model_validate({"modules": ["cuda", text]})
    if text not in ("", "-x", "--wrap=id", "~root"):  # plain words of a command, and nothing
        with pytest.raises(ValidationError, match="is not allowed here"):
            Slurm.model_validate({"container": ["apptainer", text]})
        with pytest.raises(ValidationError, match="is not allowed here"):
            Slurm.model_validate({"environment": {"A": text}})
    if text not in ("a|id", "a&id", "a*", "-x", "--wrap=id"):  # after --name= they are values
        with pytest.raises(ValidationError, match="comment: "):
            Slurm.model_validate({"sbatch": {"comment": text}})
    with pytest.raises(ValidationError, match="is not allowed here; allowed are begin, "):
        Slurm.model_validate({"sbatch": {text: "x"}})


@given(st.text(max_size=12))
def test_whatever_is_allowed_means_nothing_to_a_shell(text):
    plain = set(string.ascii_letters + string.digits + "_.+/-,:@=%~")
    for kind in (values.SLURM_NAME, values.MEMORY, values.TIME, values.MAIL, values.MODULE):
        try:
            kind(text)
        except ValueError:
            continue
        assert set(text) <= plain
        assert not text.startswith("-")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("partition", "gpu"),
        ("partition", "gpu,gpu-long"),
        ("account", "my.lab_2"),
        ("mem", "64G"),
        ("mem", "0"),
        ("time", "90"),
        ("time", "2-12"),
        ("time", "1-00:30:00"),
        ("constraint", "a100|h100"),
        ("constraint", "[rack1|rack2]"),
        ("constraint", "(a100&nvlink)*2"),
        ("exclude", "gpu[01-04,07],cpu3"),
        ("mail_user", "first.last+qa@uni.example"),
        ("mail_user", "me"),
        ("venv", "~/envs/qa"),
        ("venv", "$WORK/envs/qa"),
        ("venv", "/opt/envs/qa-3.11"),
    ],
)
def test_usual_values(key, text):
    assert getattr(Slurm.model_validate({key: text}), key) == text


@pytest.mark.parametrize("name", ["wrap", "export", "output", "signal", "array", "uid", "chdir"])
def test_options_that_are_not_the_jobs_own(name):
    with pytest.raises(ValidationError, match=f'"{name}" is not allowed here'):
        Slurm.model_validate({"sbatch": {name: "x"}})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"mem": "8G", "sbatch": {"mem-per-cpu": "2G"}}, "mem and sbatch.mem-per-cpu"),
        ({"mem": "0", "sbatch": {"mem-per-gpu": 2}}, "mem and sbatch.mem-per-gpu"),
        ({"sbatch": {"mem-per-gpu": 2, "mem-per-cpu": 2}}, "sbatch.mem-per-cpu and sbatch.mem-per"),
        ({"gpus_per_node": 2, "sbatch": {"gres": "gpu:2"}}, "gpus_per_node and sbatch.gres"),
        ({"gpus_per_node": 2, "sbatch": {"gres": "tmp:9,gpu:a100:2"}}, "gpus_per_node and sbatch."),
        ({"gpus_per_node": 2, "sbatch": {"gres": "gres/gpu:2"}}, "gpus_per_node and sbatch.gres"),
        ({"sbatch": {"hint": "multithread", "threads-per-core": 1}}, "sbatch.hint and sbatch.thr"),
    ],
)
def test_options_that_exclude_each_other(section, words):
    with pytest.raises(ValidationError, match=rf"{words}\S* exclude each other in SLURM"):
        Slurm.model_validate(section)


@pytest.mark.parametrize(
    "section",
    [
        {"mem": "8G", "sbatch": {"gres": "lscratch:100"}},
        {"gpus_per_node": 2, "sbatch": {"gres": "lscratch:100,gpumem:3"}},
        {"gpus_per_node": 2, "sbatch": {"mem-per-gpu": "8G"}},
        {"gpus_per_node": 0, "ranks_per_node": 2, "sbatch": {"gres": "gpu:2"}},
    ],
)
def test_options_that_go_together(section):
    assert Slurm.model_validate(section)


@pytest.mark.parametrize("value", [False, 1.5, [1], {}])
def test_an_option_has_a_plain_value(value):
    with pytest.raises(ValidationError, match="exclusive: "):
        Slurm.model_validate({"sbatch": {"exclusive": value}})


@pytest.mark.parametrize(
    "name",
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SBATCH_QOS", "MASTER_ADDR"],
)
def test_who_a_rank_is_cannot_be_set(name):
    with pytest.raises(ValidationError, match="is set by SLURM or by the ranks themselves"):
        Slurm.model_validate({"environment": {name: "1"}})


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "BASH_ENV", "BASH_FUNC_srun", "BASHOPTS", "SHELLOPTS", "ENV", "IFS", "PS4"),
        *("LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH_32", "GCONV_PATH", "GLIBC_TUNABLES"),
        *("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONPYCACHEPREFIX"),
    ],
)
def test_what_makes_bash_the_loader_or_python_run_something_cannot_be_set(name):
    with pytest.raises(ValidationError, match=rf"{name} makes bash, .* export it in the shell"):
        Slurm.model_validate({"environment": {name: "/x"}})


@pytest.mark.parametrize(
    "name",
    [
        *("LD_LIBRARY_PATH", "CUDA_HOME", "NCCL_DEBUG", "HF_HOME", "TMPDIR", "APPTAINER_BIND"),
        *("PYTHONUNBUFFERED", "PYTHONPROFILEIMPORTTIME", "run", "PATHS", "ENVIRONMENT"),
    ],
)
def test_other_variables_can_be_set(name):
    assert Slurm.model_validate({"environment": {name: "/x"}}).environment == {name: "/x"}


@pytest.mark.parametrize("name", ["", "A B", "A=1", "1A", "A\nB", "A;B"])
def test_names_of_variables(name):
    with pytest.raises(ValidationError, match="is no name of an environment variable"):
        Slurm.model_validate({"environment": {name: "1"}})


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("4:00:00", 14400),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-00:00:05", 86405),
        ("0", 0),
    ],
)
def test_seconds(time, seconds):
    assert values.TIME(time) == time
    assert values.time_limit_seconds(time) == seconds


def test_variables_are_those_of_the_submitter(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    monkeypatch.setenv("WORK", "/scratch/me")
    monkeypatch.setenv("EVIL", "/x; id")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert values.expand_hosts("~/envs") == "/users/me/envs"
    assert values.expand_hosts("$WORK/a:${WORK}/b") == "/scratch/me/a:/scratch/me/b"
    with pytest.raises(ValueError, match="variable NOWHERE is not set"):
        values.expand_hosts("/a/$NOWHERE/b")
    with pytest.raises(ValueError, match="is not allowed here"):
        values.expand_hosts("$EVIL")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"gpus_per_node": 2, "ranks_per_node": 4}, "ranks_per_node 4 on 2 GPUs a node"),
        ({"gpu_type": "a100"}, "gpus_per_node must say how many"),
        ({"time": "2", "signal_seconds": 120}, "must be less than the time limit of 120 s"),
        ({"gpus_per_node": -1}, "greater than or equal to 0"),
        ({"gpus_per_node": 0, "gpu_type": "a100"}, "gpus_per_node must say how many"),
        ({"mail_type": ["NEVER"]}, "BEGIN"),
    ],
)
def test_what_does_not_fit_together(table, words):
    with pytest.raises(ValidationError, match=words):
        Slurm.model_validate(table)


@pytest.mark.parametrize(
    ("table", "tasks"),
    [
        ({}, 1),
        ({"gpus_per_node": 4}, 4),
        ({"ranks_per_node": 8}, 8),
        ({"gpus_per_node": 2, "ranks_per_node": 2}, 2),
        ({"gpus_per_node": 0}, 1),
        ({"gpus_per_node": 0, "ranks_per_node": 2}, 2),
    ],
)
def test_ranks_of_a_node(table, tasks):
    assert Slurm.model_validate(table).tasks_per_node == tasks


def test_editors_know_the_patterns():
    schema = Slurm.model_json_schema()["properties"]
    assert "pattern" in schema["partition"]["anyOf"][0]
