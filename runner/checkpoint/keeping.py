"""The evaluation whose weights are exported: kept in its checkpoint until a better one comes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runner.checkpoint.best import from_plain, to_plain
from runner.errors import DataError
from runner.eval.evaluation import Evaluation
from runner.export.save import export_model
from runner.job.inference import Answering

MODEL = "model"
_RECORD = "kept.json"


@dataclass
class Kept:
    """The evaluation whose weights stand in `model/`."""

    epoch: int
    step: int
    scores: Evaluation
    logits: list[np.ndarray]


def write_kept(
    folder: Path,
    kept: Kept,
    model: Any,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    answering: Answering,
) -> None:
    """Write an evaluation and its exported model into a new folder.

    Raises:
        OSError: if they cannot be written.
    """
    folder.mkdir()
    export_model(folder / MODEL, model, dict(state), tokenizer, card, answering)
    (folder / _RECORD).write_text(json.dumps(to_plain(kept)), encoding="utf-8")


def read_kept(folder: Path) -> Kept:
    """Read an evaluation back; call it only for a folder that was held against its manifest.

    Raises:
        DataError: if it is none.
    """
    try:
        return from_plain(Kept, json.loads((folder / _RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / _RECORD}: cannot be read: {error}") from None
