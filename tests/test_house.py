"""The house, as far as import-linter (`make lint`) cannot say it: sizes, what stays light."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "runner"
TREES = {
    path.relative_to(RUNNER).with_suffix("").as_posix(): ast.parse(path.read_text("utf-8"))
    for path in sorted(RUNNER.rglob("*.py"))
}
PACKAGES = sorted(path.parent.name for path in RUNNER.glob("*/__init__.py"))
HEAVY = {"torch", "transformers", "datasets", "deepspeed", "evaluate", "numpy", "span_kernels"}
HEAVY |= {"huggingface_hub", "wandb", "tensorboard", "mlflow", "matplotlib", "jinja2"}
# Modules that are longer than 350 lines, and why.
LONG = {
    "job/schema": "the one page of all keys, each with its description, unit and range",
    "train/trainer": "the loop and its parts are read in one piece, from top to bottom",
}

LONG_FUNCTIONS = {"flat_engine": "holds two classes whose base is DeepSpeed's, imported late"}


def imports(node: ast.AST) -> set[str]:
    """Names of all modules that the code imports."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {name.name for name in part.names}
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, "imports are absolute"
            found.add(part.module or "")
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_packages_are_as_their_map_says():
    assert len(PACKAGES) == 17
    text = (RUNNER / "README.md").read_text("utf-8")
    assert not [name for name in PACKAGES if f"`{name}/`" not in text]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_at_most_ten_modules_each_named_by_its_face(package):
    folder = RUNNER / package
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in folder.glob("*/__init__.py")}  # data/formats
    assert len(modules) <= 10
    face = ast.get_docstring(TREES[f"{package}/__init__"]) or ""
    assert set(re.findall(r"^- `(\w+)`", face, re.M)) == modules


@pytest.mark.parametrize("module", TREES)
def test_a_module_and_its_functions_fit_in_the_head(module):
    lines = (RUNNER / f"{module}.py").read_text("utf-8").count("\n")
    assert (lines > 350) is (module in LONG), f"{lines} lines"
    long = [f.name for f in functions(TREES[module]) if (f.end_lineno or 0) - f.lineno >= 60]
    assert set(long) <= LONG_FUNCTIONS.keys()


def test_the_name_of_a_public_class_is_there_once():
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("module", TREES)
def test_only_cli_imports_ours_inside_functions_and_prints(module):
    tree = TREES[module]
    late = {name for f in functions(tree) for name in imports(f) if name.startswith("runner.")}
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
    if not module.startswith("cli/") and module != "predict/__init__":  # which is lazy
        assert not late
    assert not prints or module == "cli/output"


def test_the_trainer_has_no_functions_inside_of_functions():
    nested = [
        inner.name
        for function in functions(TREES["train/trainer"])
        for inner in functions(function)
        if inner is not function
    ]
    assert not nested


@pytest.mark.parametrize("module", TREES)
def test_a_sentence_says_what_a_module_does(module):
    text = ast.get_docstring(TREES[module])
    assert text
    assert re.match(r"\S[^\n]*(\n[^\n]+)*[.:]", text)


def test_the_kernels_know_nothing_of_the_runner():
    for path in (ROOT / "kernels" / "span_kernels").glob("*.py"):
        names = imports(ast.parse(path.read_text("utf-8")))
        assert not [name for name in names if name.startswith("runner")], path.name


def test_the_folder_kernels_is_no_package():
    # transformers looks for a package called kernels, and would take ours for Hugging Face's.
    assert (ROOT / "kernels" / "span_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_module_hides_a_library():
    """A started script has its own folder on sys.path: its neighbours would be imported instead."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    projects = {re.split(r"[^\w.-]", name)[0] for group in groups for name in group}
    projects = {name.replace("-", "_").lower() for name in projects}
    packages = {
        package
        for package, names in importlib.metadata.packages_distributions().items()
        if projects & {name.replace("-", "_").lower() for name in names}
    }
    assert {"torch", "rich", "tomli_w"} <= packages
    started = {path.parent for path in (RUNNER / "main.py", RUNNER / "export" / "fresh_logits.py")}
    names = {path.stem for folder in started for path in folder.iterdir()}
    names -= {"__init__", "__main__", "__pycache__"}
    assert not names & (set(sys.stdlib_module_names) | packages | projects)


@pytest.mark.parametrize(
    "module",
    [
        *("cli.command", "job.load", "run.folder", "run.provenance", "run.resume", "report.plots"),
        *("slurm.submit", "tracking.client", "utils.tables"),
    ],
)
def test_a_fresh_process_stays_light(module):
    script = f"import sys, runner.{module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert f"runner.{module}" in loaded
    assert not loaded & HEAVY
