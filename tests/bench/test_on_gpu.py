"""The script for a machine with a GPU, on a stand-in for Python: which parts run, with what, where
their results go."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("on_gpu.sh")
# Notes its arguments; a run leaves a result, and one that was stopped goes on at its next start.
PYTHON = """#!/usr/bin/env bash
[ "$1" = - ] && exec "{python}" "$@"
printf '%s\\n' "$PWD $*" >>"{calls}"
[[ "$*" == *"$FAIL"* ]] && exit 3
while [ $# -gt 0 ]; do [ "$1" = --run-dir ] && run=$2; shift; done
[ -n "${{run:-}}" ] || exit 0
mkdir -p "$run"
if [[ "$run" == *resumed ]] && [ ! -e "$run/train.csv" ]; then
    trap 'exit 75' USR2
    printf 'row\\n%.0s' 1 2 3 4 5 6 >"$run/train.csv"
    while true; do sleep 0.05; done
fi
echo '{result}' >"$run/result.json"
"""
RESULT = '{"weights_sha256": "abc", "metrics": {"f1": 50}, "seconds": {"training": 2}}'


class Machine:
    """A folder with data and a model, where the script is called with relative names."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name in ("data", "model"):
            (folder / name).mkdir()
        self.python = folder / "python"
        self.python.write_text(
            PYTHON.format(python=sys.executable, calls=self.calls, result=RESULT)
        )
        self.python.chmod(0o755)

    def run(self, *parts: str, model: str = "model", fail: str = "@no part@") -> tuple[int, str]:
        """Exit code, and what was said."""
        self.calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(SCRIPT), "out", "data", model, *parts],
            cwd=self.folder,
            env={**os.environ, "PYTHON": "./python", "FAIL": fail},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def called(self) -> list[str]:
        """Commands, without the one that tells the versions."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        checkout = str(SCRIPT.parents[2])
        lines = [line for line in lines if line.startswith(f"{checkout} -m") or " tests/" in line]
        return [line.removeprefix(f"{checkout} ") for line in lines]

    def results(self) -> list[Path]:
        return sorted(self.folder.glob("out/*"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_part_runs_with_whole_paths_and_leaves_its_results(machine):
    code, text = machine.run("bf16", "large-zero")
    assert code == 0, text
    *jobs, training = machine.called()
    assert len(jobs) == 3
    (out,) = machine.results()
    for number, command in enumerate(jobs, 1):
        assert f"--run-dir {out}/run-bf16-{number} " in command
        assert f"--set model.name={machine.folder}/model " in command
        assert f"--set data.train={machine.folder}/data/squadshifts" in command
        assert command.endswith(f"--set model.precision=bf16 --set seed={number}")
        assert json.loads((out / f"bf16-{number}.json").read_text())["metrics"]["f1"] == 50
    assert "training.py --shape large --parts zero " in training
    assert f"--table {out}/tables.md" in training


def test_another_call_takes_nothing_of_the_one_before(machine):
    for _ in range(2):
        assert machine.run("padded", model="package:some/model")[0] == 0
        assert "model.name=package:some/model " in machine.called()[0]
    first, second = machine.results()
    assert f"--run-dir {first}/" in machine.called()[0] or f"{second}/" in machine.called()[0]
    assert all((folder / "padded.json").exists() for folder in (first, second))


def test_without_names_all_parts_run_and_each_has_a_line_in_the_header(machine):
    code, text = machine.run()
    assert code == 0, text
    commands = "\n".join(machine.called())
    for shape in ("base", "large"):
        for part in ("throughput", "zero", "layout", "frozen"):
            assert f"--shape {shape} --parts {part} " in commands
    for words in ("-m pytest -m gpu", "span_kernels.bench", "span_search.py", "--first-seed 3"):
        assert words in commands
    assert commands.count("peer_trainer.py") == commands.count("--bf16") == 3
    # Stopped once, resumed once: the same hashes stand beside those of runs that were not.
    assert commands.count("run-strict-resumed") == 2
    (out,) = machine.results()
    table = (out / "hashes.txt").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == [
        *("strict-1", "strict-2", "strict-3", "strict-resumed"),
        *("loose-1", "loose-2", "loose-3"),
    ]
    header = SCRIPT.read_text().partition("set -uo")[0]
    known = SCRIPT.read_text().partition('ALL="')[2].partition('"')[0].split()
    assert not [n for n in known if n.replace("large-", "base-") not in header]


def test_every_option_that_is_given_is_known_to_the_script(machine):
    machine.run()
    for command in machine.calls.read_text().split(str(SCRIPT.parents[2])):
        for part in re.split(r"(?=tests/bench/\w+\.py)|-m runner", command):
            if (name := re.match(r"tests/bench/(\w+\.py)", part)) is None:
                continue
            given = set(re.findall(r"(?<= )--[a-z0-9-]+", part)) - {"--peer", "--ours"}
            known = (SCRIPT.parent / name[1]).read_text()
            assert not [option for option in given if f'"{option}"' not in known], part


def test_a_failing_part_is_counted_and_the_next_one_runs(machine):
    code, text = machine.run("padded", "compiled", fail="packing=off")
    assert code == 1, text
    assert "1 part(s) failed" in text
    assert "compile=on" in machine.called()[-1]
    (out,) = machine.results()
    assert [path.name for path in out.glob("*.json")] == ["compiled.json"]


def test_an_unknown_part_starts_nothing(machine):
    code, text = machine.run("bf16", "peers")
    assert code == 64
    assert "no part peers" in text
    assert not machine.called()
