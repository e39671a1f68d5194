"""The script for a machine with a GPU, on a stand-in for Python: which parts run, with what, for
how long, and what comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

SCRIPT = Path(__file__).with_name("on_gpu.sh")
# Notes its arguments; a run leaves a result, and one that was stopped goes on at its next start; a
# training leaves a table, and one that hangs is ended.
PYTHON = """#!/usr/bin/env bash
[ "$1" = - ] && exec "{python}" "$@"
printf '%s\\n' "$PWD $*" >>"{calls}"
[[ "$*" == *"$HANG"* ]] && exec sleep 600
[[ "$*" == *"$FAIL"* ]] && {{ echo "what went wrong"; exit 3; }}
given=("$@")
while [ $# -gt 0 ]; do
    [ "$1" = --run-dir ] && run=$2
    [ "$1" = --table ] && echo "table of ${{given[*]}}" >"$2"
    shift
done
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
    """A folder with what was packed, where the script is called with relative names."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name in ("packed", "work"):
            (folder / name).mkdir()
        self.python = folder / "python"
        self.python.write_text(
            PYTHON.format(python=sys.executable, calls=self.calls, result=RESULT)
        )
        self.python.chmod(0o755)

    def start(
        self, *parts: str, fail: str = "@no part@", hang: str = "@no part@", script: Path = SCRIPT
    ) -> subprocess.Popen[str]:
        self.calls.unlink(missing_ok=True)
        own = {"PYTHON": "./python", "WORK": str(self.folder / "work"), "FAIL": fail, "HANG": hang}
        return subprocess.Popen(
            ["bash", str(script), "out", "packed", *parts],
            cwd=self.folder,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *parts: str, **options: Any) -> tuple[int, str]:
        """Exit code, and what was said."""
        started = self.start(*parts, **options)
        said, _ = started.communicate(timeout=120)
        return started.returncode, said

    def called(self) -> list[str]:
        """Commands, without those that unpack and that tell the versions."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        lines = [line.removeprefix(f"{SCRIPT.parents[2]} ") for line in lines]
        return [line for line in lines if line.startswith(("-m", "tests/bench/"))][1:]

    def summary(self) -> str:
        """Of the only call so far."""
        (path,) = self.folder.glob("out/*/summary.md")
        return path.read_text()

    def outcomes(self) -> dict[str, str]:
        rows = re.findall(r"^\| (\S+) \| [-\d]+ \| \d+ \| (.*) \|$", self.summary(), re.M)
        return dict(rows)

    def packed(self) -> dict[str, str]:
        """Files of the results that come back."""
        (path,) = self.folder.glob("out/*/results.tgz")
        with tarfile.open(path) as archive:
            files = [member for member in archive.getmembers() if member.isfile()]
            return {f.name: archive.extractfile(f).read().decode() for f in files}  # type: ignore[union-attr]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_part_runs_with_whole_paths_and_its_results_come_back(machine):
    code, text = machine.run("bf16", "large-zero")
    assert code == 0, text
    *jobs, training = machine.called()
    assert len(jobs) == 3
    (work,) = (machine.folder / "work").iterdir()
    for number, command in enumerate(jobs, 1):
        assert f"--run-dir {work}/run-bf16-{number} " in command
        assert f"--set model.name={work}/model " in command
        assert f"--set data.train={machine.folder}/packed/data/squadshifts" in command
        assert command.endswith(f"--set model.precision=bf16 --set seed={number}")
        found = machine.packed()[f"results/bf16-{number}.json"]
        assert json.loads(found)["metrics"]["f1"] == 50
    assert "training.py --shape large --parts zero " in training
    assert "table of tests/bench/training.py --shape large" in machine.summary()


def test_what_comes_back_is_two_files_one_folder_deep(machine):
    """Run folders hold weights, and stay where they are."""
    assert machine.run("padded", "base-zero")[0] == 0
    assert machine.run("padded")[0] == 0
    files = [path for path in machine.folder.glob("out/**/*") if path.is_file()]
    names = sorted(path.name for path in files)
    assert names == ["results.tgz"] * 2 + ["summary.md"] * 2
    assert {len(path.relative_to(machine.folder / "out").parts) for path in files} == {2}
    assert len(list(machine.folder.glob("work/*/run-padded/result.json"))) == 2


def test_the_smoke_looks_at_kernels_and_one_whole_job(machine):
    code, text = machine.run("smoke")
    assert code == 0, text
    assert set(machine.outcomes()) == {"unpack", "versions", "smoke-kernels", "smoke-job"}
    commands = "\n".join(machine.called())
    assert "-m pytest -p no:cacheprovider -n 4 -m gpu tests/kernels\n" in commands + "\n"
    # 20 steps of 16 windows in bf16.
    assert re.search(
        r"precision=bf16 --set data.sample=320 --set data.validation=\S+:64\]", commands
    )


def test_the_measurement_takes_what_is_worth_most_first(machine):
    code, text = machine.run("measure")
    assert code == 0, text
    wanted = (
        r"where.py",
        r"training.py --shape base --parts throughput .* --batch-size 32",
        r"training.py --shape base --parts throughput .* --batch-size 64",
        r"span_kernels.bench --rounds 20$",
        r"compare_training.py --pairs 1 --first-seed 1",
        r"training.py --shape large --parts throughput",
        r"training.py --shape base --parts zero",
    )
    for found, pattern in zip(machine.called(), wanted, strict=True):
        assert re.search(pattern, found), found


@pytest.mark.parametrize(("name", "most"), [("smoke", 90), ("measure", 400)])
def test_a_call_never_takes_longer_than_it_says(machine, name, most):
    """What is left of the call limits each part, and `timeout -k 5` ends what will not end."""
    text = SCRIPT.read_text()
    (total,) = re.findall(rf"{name}\) total=(\d+)", text)
    (grace,) = re.findall(r"timeout -k (\d+)", text)
    assert int(total) + int(grace) <= most


@pytest.mark.slow
def test_a_part_that_hangs_is_cut_short_and_the_next_one_runs(machine, tmp_path):
    short = tmp_path / "tests" / "bench" / "on_gpu.sh"
    short.parent.mkdir(parents=True)
    short.write_text(SCRIPT.read_text().replace("[base-32]=65", "[base-32]=5"))
    code, text = machine.run("base-32", "base-zero", hang="--batch-size 32", script=short)
    assert code == 1, text
    assert machine.outcomes()["base-32"] == "cut short at its limit"
    assert machine.outcomes()["base-zero"] == "done"


def test_no_part_starts_when_the_call_has_no_time_left(machine, tmp_path):
    short = tmp_path / "tests" / "bench" / "on_gpu.sh"
    short.parent.mkdir(parents=True)
    short.write_text(SCRIPT.read_text().replace("total=3600", "total=4"))
    code, text = machine.run("padded", script=short)
    assert code > 0, text
    assert machine.outcomes()["padded"] == "no time left"
    assert not machine.called()


def test_a_call_that_is_killed_leaves_what_was_finished(machine):
    """A lent machine ends the command at its own limit, without a word."""
    started = machine.start("base-zero", "padded", hang="packing=off")
    while not (machine.calls.exists() and "packing=off" in machine.calls.read_text()):
        assert started.poll() is None
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
    assert machine.outcomes()["base-zero"] == "done"
    assert machine.outcomes()["padded"] == "running"
    assert "results/base-zero.md" in machine.packed()


@pytest.mark.slow
def test_every_part_runs_alone_and_has_a_line_in_the_header(machine):
    text = SCRIPT.read_text()
    known = text.partition('ALL="')[2].partition('"')[0].split()
    code, said = machine.run(*known)
    assert code == 0, said
    commands = machine.calls.read_text()
    for shape in ("base", "large"):
        for part in ("throughput", "zero", "layout", "frozen"):
            assert f"--shape {shape} --parts {part} " in commands
    for words in ("-m gpu", "span_kernels.bench", "--sweep", "span_search.py", "--first-seed 3"):
        assert words in commands
    assert commands.count("peer_trainer.py") == commands.count("--bf16") == 3
    # Stopped once, resumed once: the same hashes stand beside those of runs that were not.
    assert commands.count("run-strict-resumed") == 2
    table = machine.packed()["results/hashes.txt"].splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == [
        *("strict-1", "strict-2", "strict-3", "strict-resumed"),
        *("loose-1", "loose-2", "loose-3"),
    ]
    header = text.partition("set -uo")[0]
    assert not [n for n in known if re.sub("^large-(?!32)", "base-", n) not in header]


@pytest.mark.slow
def test_every_option_that_is_given_is_known_to_the_script(machine):
    known = SCRIPT.read_text().partition('ALL="')[2].partition('"')[0].split()
    machine.run(*known)
    for command in machine.calls.read_text().split(str(SCRIPT.parents[2])):
        for part in re.split(r"(?=tests/bench/\w+\.py)|-m runner", command):
            if (name := re.match(r"tests/bench/(\w+\.py)", part)) is None:
                continue
            given = set(re.findall(r"(?<= )--[a-z0-9-]+", part)) - {"--peer", "--ours"}
            text = (SCRIPT.parent / name[1]).read_text()
            assert not [option for option in given if f'"{option}"' not in text], part


def test_a_failing_part_is_counted_and_the_next_one_runs(machine):
    code, text = machine.run("padded", "compiled", fail="packing=off")
    assert code == 1, text
    assert "1 part(s) failed" in text
    assert machine.outcomes()["padded"] == "failed (3)"
    assert "## padded: failed (3) \n\n```\nwhat went wrong\n```" in machine.summary()
    assert machine.outcomes()["compiled"] == "done"


def test_an_unknown_part_starts_nothing(machine):
    code, text = machine.run("bf16", "peers")
    assert code == 64
    assert "no part peers" in text
    assert not machine.calls.exists()


@pytest.mark.slow
def test_what_is_packed_is_unpacked_in_float32(tiny, tmp_path, real_data):
    """Half the bytes travel; nothing but the rounding is lost."""
    carry, packed = SCRIPT.with_name("carry.py"), tmp_path / "packed"
    pack = ("pack", "--data", real_data, "--model", tiny("bert"), "--out", packed)
    for command in ((*pack, "--without-wheels"), ("unpack", packed, tmp_path)):
        subprocess.run([sys.executable, carry, *map(str, command)], check=True)
    sent, found, model = (
        load_file(folder / "model.safetensors")
        for folder in (packed / "model", tmp_path / "model", tiny("bert"))
    )
    assert {str(array.dtype) for array in sent.values()} == {"float16"}
    assert {str(array.dtype) for array in found.values()} == {"float32"}
    assert all(np.array_equal(found[name], sent[name]) for name in model)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert len(list((packed / "data").iterdir())) == 2
