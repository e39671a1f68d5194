"""spantune as it is installed: its commands and its face, whatever else is called `runner`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from runner import __version__
from runner.utils.files import file_sha256

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
COMMAND = "import sys; from spantune import main; sys.exit(main())"  # as pip writes it
FOREIGN = "raise RuntimeError('another runner')"


@pytest.fixture
def installed(tmp_path):
    """The layout of a wheel, without pip."""
    site = tmp_path / "site"
    (site / "spantune").mkdir(parents=True)
    for path in (ROOT / "runner" / "spantune").glob("*.py"):
        (site / "spantune" / path.name).symlink_to(path)
    (site / "spantune" / "jobs").symlink_to(ROOT / "jobs")
    (site / "runner").symlink_to(ROOT / "runner")
    (site / "span_kernels").symlink_to(ROOT / "kernels" / "span_kernels")
    return site


def python(*arguments: object, site: Path, cwd: Path, path: str = "") -> tuple[int, str, str]:
    """Run Python where `site` is installed, and `path` stands first on PYTHONPATH."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, str(site))))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(params=["module", "package"])
def foreign(tmp_path, request):
    """A folder with a `runner` of somebody else's."""
    folder = tmp_path / "foreign"
    file = folder / ("runner.py" if request.param == "module" else "runner/__init__.py")
    file.parent.mkdir(parents=True)
    file.write_text(FOREIGN)
    return folder


@pytest.mark.parametrize("how", [["-c", COMMAND], ["-m", "spantune"]], ids=["command", "module"])
def test_another_runner_does_not_take_our_place(installed, foreign, how):
    """Neither on PYTHONPATH, where clusters put folders, nor in the current folder (case 23)."""
    words = [*how, "--version"]
    ours = (0, f"spantune {__version__}\n", "")
    assert python(*words, site=installed, cwd=installed, path=str(foreign)) == ours
    assert python(*words, site=installed, cwd=foreign) == ours


def test_the_face_is_lazy_and_finds_ours(installed, foreign):
    code = """
import sys, spantune
print(sorted(name for name in ("torch", "numpy", "runner.cli") if name in sys.modules))
print(spantune.train.__module__, (spantune.JOBS / "quickstart.toml").is_file())
import runner.predict
print(spantune.Predictor is runner.predict.Predictor)
"""
    code, out, err = python("-c", code, site=installed, cwd=foreign)
    assert (code, err) == (0, "")
    assert out.splitlines() == ["[]", "spantune True", "True"]


def test_another_runner_that_is_imported_already_is_named(installed, tmp_path):
    (tmp_path / "runner.py").write_text("")
    code, _, err = python("-c", "import runner, spantune", site=installed, cwd=tmp_path)
    assert code == 1
    assert err.splitlines()[-1] == (
        f"ImportError: {tmp_path}/runner.py was imported as `runner`, the name of spantune's own"
        " code; import spantune before it, or rename it"
    )


def test_a_job_that_fails_is_an_error_with_its_code(installed, tmp_path):
    (tmp_path / "job.toml").write_text("")
    code = "import spantune; spantune.train('job.toml', run_dir='run', overrides=['seed=1'])"
    code, _, err = python("-c", code, site=installed, cwd=tmp_path)
    assert err.splitlines()[-1].startswith("RuntimeError: job.toml: ended with exit code 64; see")


def test_a_wheel_has_every_package_under_its_name():
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "runner").rglob("__init__.py")
    } - {"runner.spantune"}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({*packages, "span_kernels", "spantune", "spantune.jobs"})


def test_versions_agree():
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "runner.__version__"}
    changelog = (ROOT / ".github" / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## ([\w.]+)", changelog, re.M)[0] == __version__


@pytest.mark.slow  # pip takes ten seconds
def test_a_wheel_runs_the_quickstart_beside_another_runner(tmp_path, tiny):
    """Built by pip, and started by its own command: ranks, curves, proof and all."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("runner", "kernels", "jobs"):
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, source], check=True, capture_output=True, timeout=300)
    weights = tiny("bert")
    work = tmp_path / "work"
    work.mkdir()
    (work / "runner.py").write_text(FOREIGN)
    code = f"""
import spantune
run = spantune.train(spantune.JOBS / "quickstart.toml", run_dir="run", ranks=2, overrides=[
    "model.name={weights}", "model.sha256={file_sha256(weights / "model.safetensors")}",
    "data.train={site}/spantune/jobs/data/product_qa_train.json[:8]",
    "data.validation={site}/spantune/jobs/data/product_qa_validation.json[:4]",
    "train.epochs=1", "train.batch_size=4", "data.max_length=128", "data.stride=32",
])
found = spantune.Predictor.load(run).answer("What is the shade made of?", "The shade is linen.")
print("answered", bool(found.answer))
"""
    done = python("-c", code, site=site, cwd=work, path=str(work))
    assert done[0] == 0, done[2][-3000:]
    assert done[1].splitlines()[-1] == "answered True"
    assert (work / "run" / "result.json").is_file()
