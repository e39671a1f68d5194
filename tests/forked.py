"""Runs workers of tests/workers as forks of the zygote, which has imported torch and DeepSpeed:
each then takes as long as what it does."""

from __future__ import annotations

from pathlib import Path

from tests.workers.zygote import Zygote

_RUN = """
import os, runpy, sys
sys.argv = {words!r}
runpy.run_path({script!r}, run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


def forked(zygote: Zygote, script: Path, *arguments: object, ranks: int = 1) -> list[str]:
    """Run a Python file on each rank of a new group, each with the environment that a launcher
    gives it; returns the lines that they print. A worker must end well on every rank."""
    words = [str(script), *map(str, arguments)]
    code = _RUN.format(words=words, script=str(script))
    codes, text = zygote.run(code=code, ranks=ranks)
    assert codes == [0] * ranks, text[-3000:]
    return text.splitlines()
