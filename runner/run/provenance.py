"""Where a run's numbers come from: commit, versions, machine and content hashes, gathered without
importing torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.errors import DataError
from runner.run.folder import RunDir
from runner.utils.files import read_json, storage_errors
from runner.utils.signals import children_ignore_signals
from runner.utils.tables import read_rows

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "deepspeed",
    "evaluate",
    "triton",
    "numpy",
    "safetensors",
)

# The same difference gives the same text, whatever the user's own settings of git.
DIFF = (
    *("--binary", "--full-index", "--no-prefix", "--no-renames", "--unified=3"),
    *("--no-color", "--no-ext-diff", "--no-textconv"),
)

CHECKOUT = Path(__file__).resolve().parents[2]

# How a process was started, and why something was chosen, decides no number.
_MAY_DIFFER = re.compile(r"command(\.|$)|.*\.reason$")


def collect(seed: int, world: int, threads: int, devices: list[str]) -> dict[str, Any]:
    """Gather what could make a second run differ from this one.

    Args:
        seed: the job's seed.
        world: number of ranks.
        threads: CPU threads of each rank (on a CPU the bits depend on them).
        devices: the accelerator's name for each local rank.
    """
    return {
        "command": sys.argv,
        "git": git_state(),
        "versions": versions(),
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "devices": devices,
        },
        "ranks": world,
        "threads_per_rank": threads,
        "seed": seed,
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, str | None]:
    """Commit of the checkout and a hash of what differs from it in tracked files; both None outside
    a git checkout."""
    top, commit = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    # Installed into a user's project, CHECKOUT lies in a repository that tells nothing about us.
    if top is None or commit is None or Path(os.fsdecode(top.strip())).resolve() != CHECKOUT:
        return {"commit": None, "diff_sha256": None}
    diff = _git("diff", *DIFF, "HEAD")
    return {
        "commit": commit.decode().strip(),
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def processor_name() -> str:
    """The processor's model name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> frozenset[str]:
    """Instruction sets of this processor by Linux's names (avx512_bf16, on ARM bf16, ...);
    elsewhere empty."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    # "flags" on x86-64, "Features" on ARM.
    names = ("flags", "Features")
    flags = next((line for line in text.splitlines() if line.startswith(names)), "")
    return frozenset(flags.partition(":")[2].split())


def _git(*arguments: str) -> bytes | None:
    try:
        with children_ignore_signals():
            done = subprocess.run(
                ["git", "-C", str(CHECKOUT), *arguments],
                capture_output=True,
                timeout=20,
                check=True,
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object that a run wrote.

    Raises:
        DataError: if it is none, or not there.
        StorageError: if it cannot be read now.
    """
    try:
        with storage_errors(path):
            try:
                found = read_json(path, object)
            except FileNotFoundError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: is no record of a run")
    return found


def differing_fields(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name every field of provenance in which two runs differ: `versions.torch: 2.12.0, now
    2.13.0`."""
    first, second = (dict(_fields(record)) for record in (one, other))
    return [
        f"{name}: {_spell(first, name)}, now {_spell(second, name)}"
        for name in dict.fromkeys([*first, *second])
        if _spell(first, name) != _spell(second, name) and not _MAY_DIFFER.match(name)
    ]


def differing_results(one: RunDir, other: RunDir) -> list[str]:
    """Name where two finished runs came out differently: scores, weights, answers, and the first
    differing cell of each table. Seconds and speeds are no results."""
    found = []
    first, second = read_record(one.result), read_record(other.result)
    for key in ("metrics", "sets", "epoch", "step", "weights_sha256"):
        pairs = (dict(_fields({key: record.get(key)})) for record in (first, second))
        then, now = pairs
        for name in dict.fromkeys([*then, *now]):
            if _spell(then, name) != _spell(now, name):
                found.append(
                    f"result.json: {name} is {_spell(then, name)}, now {_spell(now, name)}"
                )
    for then_file, now_file in zip(one.answer_files, other.answer_files, strict=True):
        if then_file.read_bytes() != now_file.read_bytes():
            found.append(f"{then_file.name}: {_first_line(then_file, now_file)}")
    for then_table, now_table in zip(one.tables, other.tables, strict=True):
        difference = _first_cell(then_table, now_table)
        if difference:
            found.append(f"{then_table.name}: {difference}")
    return found


def is_time(column: str) -> bool:
    """Whether a column of a table tells of time, which no two runs share."""
    return column.endswith(("_seconds", "_per_second"))


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _fields(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _spell(fields: Mapping[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else "absent"


def _first_line(one: Path, other: Path) -> str:
    then, now = (path.read_text(encoding="utf-8").splitlines() for path in (one, other))
    for number, (a, b) in enumerate(zip(then, now, strict=False), 1):
        if a != b:
            return f"line {number} is another"
    return f"{len(then)} lines, now {len(now)}"


def _first_cell(one: Path, other: Path) -> str | None:
    then, now = read_rows(one), read_rows(other)
    for number, (a, b) in enumerate(zip(then, now, strict=False), 1):
        for column in dict.fromkeys([*a, *b]):
            if not is_time(column) and a.get(column) != b.get(column):
                return f"row {number}, {column} is {a.get(column)}, now {b.get(column)}"
    return f"{len(then)} rows, now {len(now)}" if len(then) != len(now) else None
