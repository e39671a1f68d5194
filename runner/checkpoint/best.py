"""Spells dataclasses as JSON and reads them back by their declared types: no bit of a number is
lost, and nothing that is read can be more than data."""

from __future__ import annotations

import base64
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runner.errors import DataError
from runner.eval.evaluation import Evaluation
from runner.export.save import export_model
from runner.job.inference import InferenceSettings

MODEL = "model"

_RECORD = "kept.json"


def to_plain(value: Any) -> Any:
    """Turn dataclasses, arrays, tuples and dictionaries into what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
        return {"dtype": value.dtype.str, "shape": list(value.shape), "base64": content}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no spelling")


def from_plain(kind: Any, value: Any) -> Any:
    """Read back what `to_plain` wrote of a value of the declared type `kind`.

    Raises:
        TypeError, ValueError, KeyError: if it is none.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        fields = {field.name for field in dataclasses.fields(kind)}
        if set(value) != fields:
            raise ValueError(f"{kind.__name__} has other fields")
        return kind(**{name: from_plain(hints[name], value[name]) for name in fields})
    if kind is np.ndarray:
        content = base64.b64decode(value["base64"], validate=True)
        return np.frombuffer(content, np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    if origin in (typing.Union, types.UnionType):
        return _first_fitting(arguments, value)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(from_plain(k, part) for k, part in zip(kinds, value, strict=True))
    if origin in (list, Sequence):
        return [from_plain(arguments[0], part) for part in value]
    if origin in (dict, Mapping):
        return {key: from_plain(arguments[1], part) for key, part in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is none of {arguments}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is None or kind is type(None):
        kind = type(None)
    if kind is not Any and type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind}")
    return value


def _first_fitting(kinds: Sequence[Any], value: Any) -> Any:
    for kind in kinds:
        try:
            return from_plain(kind, value)
        except (TypeError, ValueError, KeyError):
            continue
    raise TypeError(f"{value!r} is none of {kinds}")


@dataclass
class BestEvaluation:
    """The evaluation whose weights stand in `model/`."""

    epoch: int
    step: int
    scores: Evaluation
    logits: list[np.ndarray]


def save_best(
    folder: Path,
    kept: BestEvaluation,
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
    (folder / _RECORD).write_text(json.dumps(to_plain(kept)), encoding="utf-8")


def load_best(folder: Path) -> BestEvaluation:
    """Read an evaluation back; call it only for a folder that was held against its manifest.

    Raises:
        DataError: if it is none.
    """
    try:
        return from_plain(
            BestEvaluation, json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / _RECORD}: cannot be read: {error}") from None
