"""Where a run's numbers come from: commit, versions, machine and content hashes, gathered without
importing torch."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.utils.signals import meant_for_us

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


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Instruction sets of this processor by Linux's names (avx512_bf16, ...); elsewhere empty."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _git(*arguments: str) -> bytes | None:
    try:
        with meant_for_us():
            done = subprocess.run(
                ["git", "-C", str(CHECKOUT), *arguments],
                capture_output=True,
                timeout=20,
                check=True,
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
