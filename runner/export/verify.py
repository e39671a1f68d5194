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

# How far two computations of the same logits may lie apart, as a share of the largest: same
# operations on the same device usually give the same bits, but a fresh process may pick another
# thread count or matrix kernel.
EXPORT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

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


def verify_export(
    folder: Path,
    examples: Sequence[Example],
    windows: Windows,
    logits: Sequence[np.ndarray],
    max_length: int,
    stride: int,
) -> float:
    """Compare `logits` with those of a new process that knows only transformers and the exported
    folder.

    Returns:
        the largest difference, as a share of the largest logit.

    Raises:
        RunnerError: if they differ by more than rounding: the export is not the model that was
            scored.
    """
    questions = [int(q) for q in windows.questions_N[: len(logits)]]
    request = {
        "model": str(folder),
        "pairs": [
            [examples[q].question.lstrip(), examples[q].context] for q in dict.fromkeys(questions)
        ],
        "max_length": max_length,
        "stride": stride,
        "windows": len(logits),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    fresh = _ask_fresh_process(folder, request)
    if [len(window) for window in fresh["logits"]] != [len(window) for window in logits]:
        raise RunnerError(f"{folder}: the exported tokenizer cuts other windows than the run did")
    largest = max(float(np.abs(window).max()) for window in logits)
    apart = max(
        float(np.abs(np.array(again, np.float32) - window).max())
        for again, window in zip(fresh["logits"], logits, strict=True)
    )
    share = apart / max(largest, 1e-12)
    allowed = EXPORT_TOLERANCE[getattr(torch, fresh["dtype"])]
    if not share <= allowed:  # NaN is refused too
        raise RunnerError(
            f"{folder}: the exported model's logits differ from the run's by {share:.1e} of the"
            f" largest (allowed {allowed:.0e}); the export is not the model that was scored"
        )
    return share


def _ask_fresh_process(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of fresh_logits.py; it knows nothing of ours, so it runs as a script."""
    environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with children_ignore_signals():
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("fresh_logits.py"))],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            env=environment,
            cwd=folder,
            timeout=600,
            check=False,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunnerError(f"{folder}: a fresh process cannot open the exported model: {last}")
    return json.loads(done.stdout)
