"""What the tests of this folder rely on: whose processes are found, what an installation leaves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .cluster import SCRIPT, Cluster, until


def test_processes_of_a_job_and_of_a_trial_are_found(tmp_path):
    def begin(**variables: str) -> subprocess.Popen:
        conf = {"SLURM_CONF": f"{tmp_path}/slurm.conf"}
        return subprocess.Popen(
            ["bash", "-c", "read", b"\xff"],  # any bytes may stand in a command line
            stdin=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], **conf, **variables},
        )

    plain = begin(SLURM_JOB_ID="17")
    trial = begin(SLURM_JOB_ID="19", SLURM_ARRAY_JOB_ID="18", SLURM_ARRAY_TASK_ID="1")
    cluster = Cluster(tmp_path)
    try:
        until(lambda: len(cluster.processes("17")) == 1, "the first is there")
        assert list(cluster.processes("17")) == [plain.pid]
        assert list(cluster.processes("18_1")) == [trial.pid]
        assert not cluster.processes("18_2")
        assert not Cluster(tmp_path / "another").processes("17")
    finally:
        for process in (plain, trial):
            process.kill()
            process.wait()
    cluster.leaves_nothing("17")
    cluster.leaves_nothing("18_1")


def test_an_installation_that_fails_leaves_no_policy_behind(tmp_path):
    policy = tmp_path / "policy-rc.d"
    commands = {
        "dpkg-query": "exit 1",
        "id": "echo 0",
        "apt-get": f"cp {policy} {policy}.seen; exit 9",
    }
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, "install"],
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "POLICY": str(policy)},
        check=False,
    )
    assert done.returncode == 9
    assert Path(f"{policy}.seen").is_file()  # no daemon was started meanwhile
    assert not policy.exists()
