"""The house: what may import what, and what stays light. Adding a module means placing it here."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: ["errors", "ranks", "clock", "signals"],
    1: [
        *("job", "jobfile", "job_problems", "sources", "toml_lines", "expectation"),
        *("rundir", "tables", "plots", "provenance", "console", "tracking", "assets"),
        *("slurm_values", "slurm_defaults", "slurm_jobs", "slurm", "layout", "sweep", "undo"),
        *("text_match", "sweep_table"),
        *("attempts", "claim", "starting", "files", "store", "commit"),
        *("crew", "watch", "sameness", "trust"),
        "qa_calls",
        *("answering", "page", "line_chart", "page_markdown", "page_html", "report_data"),
        "answer_arguments",
    ],
    2: [
        *("hub", "dataset", "features", "feature_cache", "batches", "model", "prepare"),
        *("noise", "attention", "packing", "frozen", "resident", "reading", "exchange"),
        *("spans", "span_search", "metrics", "metric_objects"),
        "tracker_process",
        *("control", "shards", "plain", "ending"),
        *("rows", "asked", "question_source", "score_file"),
    ],
    3: [
        *("engine", "flat_zero", "computing", "scoring", "span_loss", "epoch", "stopping"),
        *("export", "fresh_logits", "card", "progress", "health", "checkpoint", "keeping"),
        *("evaluation", "records", "material", "origin", "conclusion"),
        *("error_tables", "comparison", "run_report", "comparison_report", "report"),
        "summary",
    ],
    4: [
        *("train", "check", "launch", "reproduce"),
        *("predict", "predict_verb", "qa_pipeline", "assess"),
        *("order", "submit", "status", "attend", "local_sweep", "desk"),
    ],
    5: ["cli", "main", "__main__", "__init__"],
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
# The desk: what a login node runs. The rest is the workshop.
DESK = {*FLOORS[0], *FLOORS[1], *FLOORS[5], "launch", "reproduce"}
DESK |= {"order", "submit", "status", "attend", "local_sweep", "desk"}
HEAVY = {"torch", "transformers", "datasets", "deepspeed", "evaluate", "numpy", "span_kernels"}
HEAVY |= {"huggingface_hub", "wandb", "tensorboard", "mlflow"}
TREES = {
    path.stem: ast.parse(path.read_text(encoding="utf-8"), path.name)
    for path in sorted((ROOT / "runner").glob("*.py"))
}


def imports(tree: ast.AST) -> list[str]:
    """Names of all modules that the code imports, `runner.x` for one of ours."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from runner import x` may name a module, or something that runner/__init__ defines
            modules = [f"runner.{name.name}" for name in node.names if name.name in TREES]
            found += modules if node.module == "runner" else [node.module or ""]
    return found


def ours(tree: ast.AST) -> set[str]:
    """Modules of the runner that the code imports."""
    return {name.removeprefix("runner.") for name in imports(tree) if name.startswith("runner.")}


def inside_functions(tree: ast.AST) -> set[str]:
    """Modules of the runner that the code imports only when a function is called."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return {name for node in ast.walk(tree) if isinstance(node, functions) for name in ours(node)}


def test_every_module_has_a_floor():
    assert not set(TREES) - set(FLOOR), "place the new module in FLOORS"
    assert sum(map(len, FLOORS.values())) == len(FLOOR)


@pytest.mark.parametrize("module", TREES)
def test_imports_go_downwards(module):
    upward = {name for name in ours(TREES[module]) if FLOOR.get(name, 9) > FLOOR.get(module, 0)}
    assert not upward


def test_no_module_imports_itself_on_a_detour():
    graph = {module: ours(tree) for module, tree in TREES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(TREES)


@pytest.mark.parametrize("module", sorted(DESK & set(TREES)))
def test_the_desk_needs_no_heavy_library(module):
    tree = TREES[module]
    assert not {name.split(".")[0] for name in imports(tree)} & HEAVY
    # What is imported by a call is only the verb's own; everything else is of the desk too.
    assert ours(tree) - inside_functions(tree) <= DESK


@pytest.mark.parametrize("module", TREES)
def test_only_cli_imports_our_modules_inside_functions(module):
    assert bool(inside_functions(TREES[module])) is (module == "cli")


@pytest.mark.parametrize("module", TREES)
def test_only_cli_prints(module):
    calls = [node.func for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
    assert prints is (module == "cli")


@pytest.mark.parametrize("module", TREES)
def test_a_sentence_says_what_a_module_does(module):
    text = ast.get_docstring(TREES[module])
    assert text
    assert re.match(r"\S[^\n]*(\n[^\n]+)*[.:]", text)


def test_the_kernels_know_nothing_of_the_runner():
    for path in (ROOT / "kernels" / "span_kernels").glob("*.py"):
        assert not ours(ast.parse(path.read_text(encoding="utf-8"))), path.name
    users = {m for m, tree in TREES.items() if any(n == "span_kernels" for n in imports(tree))}
    assert users
    assert not users & {*FLOORS[0], *FLOORS[1]}


def test_the_folder_kernels_is_no_package():
    # transformers looks for a package called kernels, and would take ours for Hugging Face's.
    assert (ROOT / "kernels" / "span_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_module_hides_a_library():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    projects = {re.split(r"[^\w.-]", name)[0] for group in groups for name in group}
    projects = {name.replace("-", "_").lower() for name in projects}
    packages = {
        package
        for package, names in importlib.metadata.packages_distributions().items()
        if projects & {name.replace("-", "_").lower() for name in names}
    }
    assert {"torch", "rich", "tomli_w"} <= packages
    names = set(TREES) - {"__init__", "__main__"}
    assert not names & (set(sys.stdlib_module_names) | packages | projects)


@pytest.mark.parametrize(
    "module",
    ["jobfile", "cli", "rundir", "tables", "plots", "provenance", "tracking", "starting"],
)
def test_a_fresh_process_stays_light(module):
    script = f"import sys, runner.{module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert f"runner.{module}" in loaded
    assert not loaded & {*HEAVY, "matplotlib"}
