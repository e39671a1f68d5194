"""Starts deepspeed's launcher on this machine, for those who would rather write `spantune run
JOB.toml`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.ranks import free_port

MAIN = Path(__file__).with_name("main.py")


def launch(arguments: Sequence[str], ranks: int | None) -> int:
    """Run `deepspeed runner/main.py ARGUMENTS` and return its exit code.

    Args:
        arguments: what each rank's command gets.
        ranks: processes to start; None: one for each GPU, or one where there is none.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # deepspeed starts `python` by name from the path; it must be the interpreter that runs now.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--master_port",
        str(free_port()),
    ]
    command += ["--num_gpus", str(ranks)] if ranks else []
    code = subprocess.run(
        [*command, str(MAIN), *arguments], env=environment, check=False
    ).returncode
    return code if code >= 0 else 128 - code  # ended by a signal: spelled as a shell does
