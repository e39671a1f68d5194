"""A two-node SLURM cluster for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import SCRIPT, Cluster
from .scenes import Jobs, begin


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start the cluster; `make test-slurm` says when there is to be one."""
    if "SPANTUNE_TEST_SLURM" not in os.environ:
        pytest.skip("make test-slurm installs SLURM and runs these")
    folder = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))
    environment = {name: value for name, value in os.environ.items() if "SLURM_" not in name}
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(environment):
            patch.delenv(name)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("SPANTUNE_SLURM", "")
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
        try:  # what has started is stopped also where the rest does not start
            subprocess.run(["bash", SCRIPT, "start", folder], check=True)
            yield Cluster(folder)
        finally:
            subprocess.run(["bash", SCRIPT, "stop", folder], check=False)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def jobs(cluster, tmp_path_factory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="session")
def scenes(cluster, jobs) -> dict[str | int, tuple[str, Path]]:
    return begin(cluster, jobs)
