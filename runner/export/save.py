"""Writes `model/` as transformers reads it, and proves in a fresh process that it gives the run's
own logits."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runner.data.dataset import Example
from runner.data.loader import Reader
from runner.data.windows import Windows
from runner.errors import RunnerError
from runner.job.inference import KEY, Answering
from runner.run.folder import storage_errors
from runner.utils.signals import meant_for_us

CHECKED_WINDOWS = 8
# How far two computations of the same logits may lie apart, as a share of the largest: same
# operations on the same device usually give the same bits, but a fresh process may pick another
# thread count or matrix kernel.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# What a launcher sets for its ranks: a fresh process is none of them.
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def gathered_state(engine: Any, stage: int) -> dict[str, Tensor]:
    """Return all weights on the CPU: on rank 0 complete, elsewhere empty. Every rank must call
    this.

    Taken from the module itself and never from optimiser shards, so that frozen parameters are
    always in it. The weights keep the precision that was trained and scored.
    """
    module = engine.module
    main = engine.global_rank == 0
    if stage < 3:
        return (
            {name: t.detach().cpu().clone() for name, t in module.state_dict().items()}
            if main
            else {}
        )
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if main:
                state[name] = parameter.detach().cpu().clone()
    if main:
        state |= {
            name: t.detach().cpu().clone()
            for name, t in module.named_buffers()
            if name in module.state_dict()
        }
    return state


def export_model(
    folder: Path,
    model: Any,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    answering: Answering,
) -> None:
    """Write weights (safetensors), configuration (with how to ask the model), tokenizer and model
    card into a new folder.

    Raises:
        OSError: if they cannot be written.
    """
    setattr(model.config, KEY, answering.model_dump(mode="json"))
    try:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # What is written in Rust tells the number in its text alone, "... (os error 28)"; the
        # tokenizers' errors have no kind of their own.
        found = re.search(r"os error (\d+)", str(error))
        if found is None and not isinstance(error, SafetensorError):
            raise
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(folder)) from error
    (folder / "README.md").write_text(card, encoding="utf-8")


def publish_model(exported: Path, folder: Path) -> None:
    """Let `folder` be the exported model of a checkpoint: the same files, not copies, where the
    file system has links.

    Raises:
        StorageError: if it cannot be made; what stood there before is untouched.
    """
    aside, old = folder.with_name(".model.new"), folder.with_name(".model.old")
    with storage_errors(folder):
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(exported, aside, copy_function=_link)
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@torch.no_grad()
def own_logits(reader: Reader, windows: Windows) -> list[np.ndarray]:
    """Logits [L, 2] of the first few windows, one window a pass, as float32. Every rank must call
    this."""
    was_training = reader.model.training
    reader.model.eval()
    logits = []
    for row in range(min(CHECKED_WINDOWS, len(windows))):
        read = reader.read(windows, np.array([row]))
        logits.append(read.logits_T2[: int(windows.lengths_N[row])].float().cpu().numpy())
    reader.model.train(was_training)
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
    environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with meant_for_us():
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("fresh_logits.py"))],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            cwd=folder,
            timeout=600,
            check=False,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunnerError(f"{folder}: a fresh process cannot open the exported model: {last}")
    answer = json.loads(done.stdout)
    if [len(theirs) for theirs in answer["logits"]] != [len(mine) for mine in logits]:
        raise RunnerError(f"{folder}: the exported tokenizer cuts other windows than the run did")
    largest = max(float(np.abs(mine).max()) for mine in logits)
    apart = max(
        float(np.abs(np.array(theirs, np.float32) - mine).max())
        for theirs, mine in zip(answer["logits"], logits, strict=True)
    )
    share = apart / max(largest, 1e-12)
    allowed = TOLERANCE[getattr(torch, answer["dtype"])]
    if not share <= allowed:
        raise RunnerError(
            f"{folder}: the exported model's logits differ from the run's by {share:.1e} of the"
            f" largest (allowed {allowed:.0e}); the export is not the model that was scored"
        )
    return share
