"""A SLURM cluster for the tests of this folder, and all that takes time on it, begun at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import stories
from .cluster import SCRIPT, Cluster
from .scenes import Jobs, disturb, submit_all
from .stories import Run, Story


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of one cluster together where several workers share the tests."""
    for item in items:
        if "cluster" in _fixtures(item):
            item.add_marker(pytest.mark.xdist_group("cluster"))


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start the cluster; `make test-cluster` says when there is to be one."""
    if "SPANTUNE_TEST_CLUSTER" not in os.environ:
        pytest.skip("make test-cluster installs SLURM and runs these")
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
    """Submits jobs with a stand-in for the run."""
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="session")
def job_file(tmp_path_factory, tiny) -> Path:
    """The job of all real runs, small."""
    folder = tmp_path_factory.mktemp("job")
    path = folder / "tiny.toml"
    text = stories.JOB.format(data=stories.DATA, model=tiny("bert"), cache=folder / "cache")
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def begun(request, cluster, jobs, tmp_path_factory) -> dict[str, Story]:
    """All that takes its time, by the name of the fixture that tests look at it with: whichever
    test comes first, everything that is looked at in this session begins now, side by side."""
    looked_at = {name for item in request.session.items for name in _fixtures(item)}
    found: dict[str, Story] = {}
    if "scenes" in looked_at:
        found["scenes"] = Story(disturb(cluster, submit_all(jobs)))
    if not looked_at & {"calm", "plain", "sweep", "disturbed", "broken"}:
        return found
    job_file: Path = request.getfixturevalue("job_file")
    runs = tmp_path_factory.mktemp("runs")
    sweep_file = job_file.with_name("sweep.toml")
    sweep_file.write_text(f"{job_file.read_text()}\n[sweep]\nseeds = [7, 8]\n")

    def run(name: str) -> Run:
        return Run(cluster, job_file, runs / name)

    # Each in the order in which it is submitted, for some wait for their turn on the same nodes.
    makers: dict[str, Callable[[], Story]] = {
        "calm": lambda: Story(stories.calm(run("calm"))),
        "plain": lambda: Story(stories.plain(run("plain"), job_file)),
        "sweep": lambda: Story(stories.sweep(cluster, sweep_file, runs / "sweep")),
        "disturbed": lambda: Story(stories.disturbed(run("disturbed"))),
        "broken": lambda: Story(stories.broken(run("broken"))),
    }
    return found | {name: make() for name, make in makers.items() if name in looked_at}


@pytest.fixture(scope="session")
def scenes(begun) -> Story:
    return begun["scenes"]


@pytest.fixture(scope="session")
def calm(begun) -> Story:
    return begun["calm"]


@pytest.fixture(scope="session")
def plain(begun) -> Story:
    return begun["plain"]


@pytest.fixture(scope="session")
def sweep(begun) -> Story:
    return begun["sweep"]


@pytest.fixture(scope="session")
def disturbed(begun) -> Story:
    return begun["disturbed"]


@pytest.fixture(scope="session")
def broken(begun) -> Story:
    return begun["broken"]
