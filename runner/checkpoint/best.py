"""The best evaluation of a run so far, beside the model that it is of.

A checkpoint holds it, so that a run that goes on past its best epoch, or is cut short, exports and
reports that one: no bit of a number is lost, and nothing that is read can be more than data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runner.errors import DataError
from runner.eval.evaluation import Evaluation, JsonArray
from runner.export.save import export_model
from runner.job.inference import InferenceSettings
from runner.utils.files import read_json, storage_errors, to_jsonable

MODEL = "model"
_RECORD = "kept.json"


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation whose weights stand in `model/`.

    Attributes:
        epoch, step: after which.
        scores: on the first validation set.
        logits: of its first windows.
        further: scores on the other validation sets.
    """

    epoch: int
    step: int
    scores: Evaluation
    logits: list[JsonArray]
    further: dict[str, Evaluation] = field(default_factory=dict)


def save_best(
    folder: Path,
    best: BestEvaluation,
    model: Any,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    answering: InferenceSettings,
) -> None:
    """Write an evaluation and its exported model into a new folder.

    Raises:
        OSError: if they cannot be written.
    """
    folder.mkdir()
    export_model(folder / MODEL, model, dict(state), tokenizer, card, answering)
    (folder / _RECORD).write_text(json.dumps(to_jsonable(best)), encoding="utf-8")


def load_best(folder: Path) -> BestEvaluation:
    """Read an evaluation back; call it only for a folder that was held against its manifest.

    Raises:
        DataError: if it is none.
        StorageError: if it cannot be read now.
    """
    path = folder / _RECORD
    try:
        with storage_errors(path):
            try:
                return read_json(path, BestEvaluation)
            except FileNotFoundError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
