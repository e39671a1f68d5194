"""Runs pytest in a process of its own, for what a process decides once and for all.

Triton's interpreter and its compiler exclude each other in one process, and both exclude the plain
CPU implementation of the operators; the instructions that PyTorch computes with are chosen when it
is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Marks of a test's parameter that costs nothing but where kernels are interpreted.
SLOW_INTERPRETED = [pytest.mark.slow] if INTERPRETED else []


def slow_interpreted(test: Callable) -> Callable:
    """Marks a test that costs nothing but where kernels are interpreted."""
    return pytest.mark.slow(test) if INTERPRETED else test


def run_pytest(
    paths: Sequence[str], options: Sequence[str], folder: Path, **variables: str
) -> dict[str, int]:
    """Run pytest in a process of its own; a test that fails there fails here.

    Args:
        paths: of tests, from the checkout.
        options: of pytest's command line. No plugin is loaded that these do not name.
        folder: for what Triton compiles.
        variables: of the environment.

    Returns:
        How many tests "passed", were "skipped" and "deselected". Ask for the number that has to
        pass: tests that are silently not collected must not look like success.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    environment |= {
        "OMP_NUM_THREADS": "1",  # other tests run beside it
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TRITON_CACHE_DIR": str(folder),
    }
    done = subprocess.run(
        # The marker xdist_group is that plugin's.
        [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", *options, *paths],
        cwd=CHECKOUT,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counts = re.findall(r"(\d+) (passed|skipped|deselected)", done.stdout.splitlines()[-1])
    return dict.fromkeys(("passed", "skipped", "deselected"), 0) | {w: int(n) for n, w in counts}
