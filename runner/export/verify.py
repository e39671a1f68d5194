"""Proves an exported model: a fresh process with plain transformers gives the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runner.data.dataset import Example
from runner.data.windows import Windows
from runner.errors import RunnerError
from runner.model.forward import SpanModel
from runner.utils.signals import LAUNCHER, children_ignore_signals

CHECKED_WINDOWS = 8

# How far two computations of the same logits may lie apart. In float32: a share of the largest, for
# another thread count or matrix kernel. Half the bits make that share useless: it depends on model
# and text (0.9 to 4.5 % were measured). But whoever computes is as far from float32 as anyone else:
# 0.9 to 1.3 times as far as the fresh process, by root mean squares over 8 windows and whatever the
# attention and the order of sums (tests/bench/README.md).
FLOAT32_TOLERANCE = 1e-4
ROUNDING_TOLERANCE = 2.0
RULED_OUT = 100.0  # logits below the best one: a share of e^-100

# What a launcher sets for its ranks: a fresh process is none of them.
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_SIZE",
    LAUNCHER,
)


def own_logits(model: SpanModel, windows: Windows) -> list[np.ndarray]:
    """Logits [L, 2] of the first few windows, one window a pass, as float32. Every rank must call
    this."""
    logits = []
    with model.evaluating():
        for row in range(min(CHECKED_WINDOWS, len(windows))):
            found = model(model.batch(windows, np.array([row])))
            length = int(windows.lengths_N[row])
            logits.append(found.logits_T2[:length].float().cpu().numpy())
    return logits


class FreshProcess:
    """Runs fresh_logits.py, which imports transformers at once and opens a model when it is asked;
    it ends with this process. It knows nothing of ours, so it runs as a script."""

    def __init__(self) -> None:
        environment = {
            key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES
        }
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        script = Path(__file__).with_name("fresh_logits.py")
        with children_ignore_signals():
            self._process = subprocess.Popen(
                [sys.executable, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="backslashreplace",
                env=environment,
                cwd=script.parent,
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer to the one request that it takes; fresh_logits.py has their keys.

        Raises:
            RunnerError: if it cannot open the model.
        """
        try:
            answer, said = self._process.communicate(json.dumps(request), timeout=600)
        finally:
            self._process.kill()
        if self._process.returncode != 0:
            last = (said.strip().splitlines() or ["no message"])[-1]
            raise RunnerError(
                f"{request['model']}: a fresh process cannot open the exported model: {last}"
            )
        return json.loads(answer)


def verify_export(
    fresh_process: FreshProcess,
    folder: Path,
    examples: Sequence[Example],
    windows: Windows,
    logits: Sequence[np.ndarray],
    max_length: int,
    stride: int,
) -> float:
    """Compare `logits` with those of a process that knows only transformers and the exported
    folder. They have to be as near to the exported weights' logits in float32 as that process's own
    are in the weights' precision: both round, and how much does not depend on who computes.

    Returns:
        the largest difference, as a share of the largest logit.

    Raises:
        RunnerError: if they differ by more than rounding: the export is not the model that was
            scored.
    """
    questions = [int(q) for q in windows.questions_N[: len(logits)]]
    request = {
        "model": str(folder.absolute()),
        "pairs": [
            [examples[q].question.lstrip(), examples[q].context] for q in dict.fromkeys(questions)
        ],
        "max_length": max_length,
        "stride": stride,
        "windows": len(logits),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    fresh = fresh_process.ask(request)
    if fresh["missing"]:
        raise RunnerError(f"{folder}: the export lacks weights: {', '.join(fresh['missing'])}")
    if [len(window) for window in fresh["logits"]] != [len(window) for window in logits]:
        raise RunnerError(f"{folder}: the exported tokenizer cuts other windows than the run did")
    share, excess = beyond_rounding(logits, fresh["logits"], fresh["exact"])
    if excess:
        raise RunnerError(
            f"{folder}: the run's logits are {excess}; the export is not the model that was scored"
        )
    return share


def beyond_rounding(
    found: Sequence[Any], fresh: Sequence[Any], exact: Sequence[Any]
) -> tuple[float, str | None]:
    """Compare two computations of the same logits, given those of the same weights in float32.

    Args:
        found, fresh, exact: logits [L, 2] of the same windows, found and computed afresh in one
            precision, and in float32.

    Returns:
        The largest difference as a share of the largest logit; and, if `found` is farther from
        `exact` than rounding explains, a clause that says so.
    """
    found_T2, fresh_T2, exact_T2 = (
        np.concatenate([np.asarray(window, np.float64) for window in windows])
        for windows in (found, fresh, exact)
    )
    # What rules a token out, as BigBird's -1e6 a question's, would set the scale for all others.
    floor = float(exact_T2.max()) - RULED_OUT
    found_T2, fresh_T2, exact_T2 = (np.maximum(x, floor) for x in (found_T2, fresh_T2, exact_T2))
    largest = max(float(np.abs(exact_T2).max()), 1e-12)
    share = float(np.abs(found_T2 - fresh_T2).max()) / largest
    apart, rounding = (
        float(np.sqrt(np.mean((logits_T2 - exact_T2) ** 2))) / largest
        for logits_T2 in (found_T2, fresh_T2)
    )
    # NaN is refused too.
    if share <= FLOAT32_TOLERANCE or apart <= ROUNDING_TOLERANCE * rounding < np.inf:
        return share, None
    allowed = max(FLOAT32_TOLERANCE, ROUNDING_TOLERANCE * rounding)
    return share, (
        f"{apart:.1e} of the largest from those of the same weights in float32 (rounding"
        f" explains {allowed:.1e})"
    )
