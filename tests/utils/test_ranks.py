"""The rank of a process, from the variables of each launcher."""

from __future__ import annotations

import os

import pytest

from runner.errors import MachineError
from runner.utils.ranks import (
    Rank,
    current_rank,
    first_host,
    is_launched,
    rendezvous_address,
    speaks_for_all,
)

SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}
SALLOC = {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"}:
            monkeypatch.delenv(name)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Rank(0, 1, 0, 1)),
        # deepspeed
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Rank(3, 4, 1, 2)),
        # torchrun
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            Rank(3, 4, 1, 2),
        ),
        # by hand, on one machine
        ({"RANK": "1", "WORLD_SIZE": "2"}, Rank(1, 2, 1, 2)),
        ({"RANK": "1"}, Rank(0, 1, 0, 1)),
        (SRUN, Rank(5, 8, 1, 4)),
        # inside the batch script itself, outside any step, one process runs
        ({name: SRUN[name] for name in SRUN if name != "SLURM_STEP_ID"}, Rank(0, 1, 0, 1)),
        # the shell that salloc gives where it is a step of its own, and with -n 2
        (SALLOC, Rank(0, 1, 0, 1)),
        ({**SALLOC, "SLURM_NTASKS": "2"}, Rank(0, 1, 0, 1)),
        ({**SALLOC, "SLURM_STEP_ID": "4294967291"}, Rank(0, 1, 0, 1)),  # the batch script's step
        # an older cluster's: srun --pty --preserve-env $SHELL
        ({**SALLOC, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, Rank(0, 1, 0, 1)),
        ({**SALLOC, "SLURM_STEP_ID": "0"}, Rank(0, 1, 0, 1)),
        # a launcher started in that shell counts, and so does srun
        ({**SALLOC, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Rank(1, 2, 1, 2)),
        ({**SALLOC, "SLURM_NTASKS": "2", **SRUN, "SLURM_STEP_NUM_TASKS": "8"}, Rank(5, 8, 1, 4)),
        # a launcher started by srun counts, not the step around it
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Rank(0, 2, 0, 2)),
    ],
)
def test_each_launcher(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert current_rank() == expected


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": ""},
        {name: SRUN[name] for name in SRUN if name != "SLURM_NTASKS"},
    ],
)
def test_variables_that_tell_no_rank_are_named(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match="do not tell this process's rank"):
        current_rank()
    assert speaks_for_all()


@pytest.mark.parametrize(
    ("variables", "launched"),
    [({}, False), ({"RANK": "0"}, True), (SRUN, True), (SALLOC, False)],
)
def test_a_shell_in_a_job_is_no_rank(monkeypatch, variables, launched):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_launched() is launched


def test_only_rank_0_is_main():
    assert [rank for rank in range(4) if Rank(rank, 4, rank, 4).is_main] == [0]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu03,gpu01", "gpu03"),
        ("gpu[03-05,7],cpu1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("rack2-n[10,12]-ib,x", "rack2-n10-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_where_ranks_of_plain_srun_meet(monkeypatch):
    for name, value in {**SRUN, "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "n[2-3]"}.items():
        monkeypatch.setenv(name, value)
    host, port = rendezvous_address(current_rank())
    assert (host, port) == ("n2", 14711)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert rendezvous_address(current_rank()) == (host, port)  # the same for every rank
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert rendezvous_address(current_rank())[1] != port
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    assert rendezvous_address(current_rank())[1] != port
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert rendezvous_address(current_rank())[0] == "127.0.0.1"


def test_where_ranks_meet_otherwise():
    assert rendezvous_address(Rank(1, 2, 1, 2)) == ("127.0.0.1", 29500)
    host, port = rendezvous_address(Rank(0, 1, 0, 1))
    assert host == "127.0.0.1"
    assert port != 29500
