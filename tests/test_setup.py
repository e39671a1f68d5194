"""`make setup`: which Python it takes, what it says, where torch comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKS = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
SHIM = (
    "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"  # of a version that is not chosen
)
OLD = "#!/bin/sh\nexit 1\n"  # what the question about versions gives on Python 3.10 or 3.14


@pytest.fixture
def setup(tmp_path):
    """What `make setup` would do on a machine with these Pythons, and its exit code."""

    def asked(pythons: dict[str, str], *options: str) -> tuple[int, list[str]]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in pythons.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        for name in ("sh", "make", "echo", "test"):
            (folder / name).symlink_to(shutil.which(name) or name)
        done = subprocess.run(
            ["make", "-n", "setup", f"VENV={tmp_path}/venv", *options],
            cwd=ROOT,
            env={"PATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout.splitlines()

    return asked


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3.11": WORKS, "python3.12": WORKS}, "python3.11"),
        ({"python3.11": SHIM, "python3.12": WORKS, "python3": WORKS}, "python3.12"),
        ({"python3.12": OLD, "python3.13": WORKS}, "python3.13"),
        ({"python3": WORKS}, "python3"),
    ],
)
def test_make_takes_the_python_that_is_there(setup, tmp_path, pythons, taken):
    code, lines = setup(pythons)
    assert code == 0
    assert f"{taken} -m venv {tmp_path}/venv" in lines


def test_without_a_fitting_python_it_says_so(tmp_path):
    (tmp_path / "python3").write_text(OLD)
    (tmp_path / "python3").chmod(0o755)
    for name in ("sh", "make"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        ["make", "setup", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert done.stdout.startswith("no Python 3.11, 3.12 or 3.13 with venv is on the path")
    assert not (tmp_path / "venv").exists()


def test_the_size_is_said_before_anything_is_downloaded(setup):
    _, lines = setup({"python3.11": WORKS})
    first = next(n for n, line in enumerate(lines) if "pip install" in line)
    assert any("3 GB" in line and "TORCH_INDEX" in line for line in lines[:first])
    assert not any("--quiet" in line or " -q" in line for line in lines)


def test_torch_alone_comes_from_the_index_that_is_named(setup):
    _, lines = setup({"python3.11": WORKS}, "TORCH_INDEX=http://127.0.0.1:1/simple")
    named = [line for line in lines if "http://127.0.0.1:1/simple" in line]
    assert len(named) == 1
    assert named[0].endswith("--no-deps --index-url http://127.0.0.1:1/simple torch")


def test_running_needs_none_of_what_testing_needs(setup):
    _, lines = setup({"python3.11": WORKS})
    assert any(line.endswith(" -e .") for line in lines)
    assert not any("[dev]" in line for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    running = " ".join(project["dependencies"])
    assert not [name for name in ("pytest", "wandb", "mlflow", "pyright") if name in running]


def test_all_three_versions_are_tried_in_ci():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert '["3.11", "3.12", "3.13"]' in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
