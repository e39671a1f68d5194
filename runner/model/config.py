"""Reads a model's config.json: refuses what asks for code or cannot be a model, and makes it say
what this product needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoConfig,
    AutoModelForQuestionAnswering,
    PreTrainedConfig,
    PreTrainedModel,
)

from runner.errors import DataError, JobError
from runner.job.schema import Model
from runner.utils.text import first_line, shorten

# Names under which configurations keep their two kinds of dropout.
_DROPOUT_KEYS = (
    "hidden_dropout_prob",
    "dropout",
    "hidden_dropout",
    "embedding_dropout",
    "mlp_dropout",
)
_ATTENTION_DROPOUT_KEYS = ("attention_probs_dropout_prob", "attention_dropout")

# Keys by which a configuration names Python files of its repository.
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
_KERNELS = "attn_implementation"  # part of keys that may name compiled code of the hub
_LIMIT = 2**24  # bytes of a configuration

# Keys that count what is built one by one, and more than anyone has built.
_BUILT = re.compile(r"(?!.*(size|dim|capacity))(?=.*(layer|group|block|expert))")
_MOST_BUILT = 10_000


def read_config(section: Model, folder: Path) -> PreTrainedConfig:
    """Read the configuration in a model's folder, the job's dropout laid over it.

    Raises:
        DataError: if it asks for code, cannot be read, or transformers has no span head for it.
        JobError: if it has no such dropout.
    """
    name = section.name
    refuse_remote_code(name, folder)
    with reading(f"model.name: {name}"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    if type(config) not in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
        raise DataError(
            f"{name}: {config.model_type} has no question-answering head in transformers"
        )
    chunk = getattr(config, "chunk_size_feed_forward", 0)
    if isinstance(chunk, int) and chunk > 1:
        raise DataError(
            f"{name}: config.json: with chunk_size_feed_forward = {chunk} the model takes windows"
            " of certain lengths alone; set it to 0, which computes the same"
        )
    _set_dropout(config, section)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, int | float) and not 0 <= value <= 1:
            raise DataError(f"{name}: config.json: {key} = {value} is no share from 0 to 1")
    # A classifier's checkpoint brings its own number of labels; a span head has start and end.
    config.num_labels = 2
    # Logits alone are asked for, by their names.
    config.return_dict = True
    config.output_hidden_states = config.output_attentions = False
    return config


def empty_model(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """The architecture without weights, on the meta device.

    Args:
        config: as `read_config` gives it.
        name: of the model, for messages.

    Raises:
        DataError: if no model can be built of these values.
    """
    try:
        with torch.device("meta"):
            return AutoModelForQuestionAnswering.from_config(config)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        keys = _suspects(config.to_dict(), reason)
        raise DataError(
            f"{name}: no {config.model_type} can be built of its config.json"
            f"{f' ({keys})' if keys else ''}: {reason}"
        ) from error


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Say in one line that transformers cannot read a model's folder."""
    try:
        yield
    except BaseException as error:
        # Where Rust gave up, as tokenizers do with some files, it is no Exception in Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{name}: cannot be read: {first_line(error)}") from error


def refuse_remote_code(name: str, folder: Path) -> None:
    """Look through a model folder's configurations before any library reads them.

    Args:
        name: the model, as the job names it.
        folder: its files.

    Raises:
        DataError: naming the file and the key that asks for code, or for more layers than can be.
    """
    for path in sorted(folder.glob("*config.json")):
        try:
            if path.stat().st_size > _LIMIT:
                raise DataError(f"{name}: {path.name} has more than {_LIMIT:,} bytes")
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # who reads it says what is wrong with it
        for key, value in _entries(table):
            kernel = _KERNELS in key and any(sign in str(value) for sign in "/:")
            if (key in _CODE and value) or kernel:
                raise DataError(
                    f"{name}: {path.name} asks for code that comes with the model ({key}), which is"
                    " never run; remove that key if the model is of an architecture that"
                    " transformers has"
                )
            if _BUILT.match(key) and isinstance(value, int | float) and value > _MOST_BUILT:
                raise DataError(
                    f"{name}: {path.name}: {key} = {shorten(str(value))} is more than"
                    f" {_MOST_BUILT:,}, which no model has"
                )


def _entries(table: Any) -> Iterator[tuple[str, Any]]:
    """Every key at any depth, with its value."""
    waiting = [table]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield from part.items()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _suspects(config: Mapping[str, Any], reason: str) -> str:
    """The keys that may be why no model can be built: those whose value the error tells, sizes
    below 1, and tokens that have no row."""
    told = set(re.findall(r"[\w.+-]+", reason))
    rows = config["vocab_size"] if isinstance(config.get("vocab_size"), int) else None

    def is_suspect(key: str, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return False
        if str(value) in told:
            return not isinstance(value, int) or value not in (0, 1)
        if not isinstance(value, int):
            return False
        if key.endswith("token_id"):
            return rows is not None and value >= rows
        return value < 1 and re.search("size$|heads|layers|embeddings", key) is not None

    found = [
        f"{key} = {json.dumps(value)}"
        for key, value in config.items()
        if key not in ("model_type", "transformers_version") and is_suspect(key, value)
    ]
    return ", ".join(found[:4])


def _set_dropout(config: Any, section: Model) -> None:
    for keys, value, field in (
        (_DROPOUT_KEYS, section.dropout, "dropout"),
        (_ATTENTION_DROPOUT_KEYS, section.attention_dropout, "attention_dropout"),
    ):
        if value is None:
            continue
        known = [key for key in keys if hasattr(config, key)]
        if not known:
            raise JobError([f"model.{field}: {config.model_type} has no such setting"])
        for key in known:
            setattr(config, key, value)
    if section.dropout is not None:
        for key in ("qa_dropout", "classifier_dropout"):
            if getattr(config, key, None) is not None:
                setattr(config, key, section.dropout)
