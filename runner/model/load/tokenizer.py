"""Opens a model's fast tokenizer, and makes it say what this model takes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from runner.errors import DataError
from runner.model.config import empty_model, reading
from runner.model.load.pieces import refuse_damaged, restored
from runner.model.structure import longest_input, token_rows


def open_tokenizer(
    name: str, folder: Path, config: PreTrainedConfig
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Load the fast tokenizer, and say in lines for the log where it is not what transformers
    makes of its files.

    Its `model_input_names` and `model_max_length` are made to say what this model takes: what
    tokenizers say themselves is often another family's, or nothing.

    Raises:
        DataError: if it cannot be read, has no vocabulary, or tokens that the model has no
            embeddings for; if no model can be built of the configuration.
    """
    refuse_damaged(folder, name)
    with reading(f"model.name: {name}"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"{name}: has no vocabulary; are tokenizer files missing?")
    tokenizer, notes = restored(tokenizer, folder, name)
    names = list(tokenizer.model_input_names)
    segment_ids = _takes_segment_ids(config)
    if segment_ids is True and "token_type_ids" not in names:
        names.insert(1, "token_type_ids")
    elif segment_ids is False and "token_type_ids" in names:
        names.remove("token_type_ids")
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    model = empty_model(config, name)
    # The longest window, in tokens.
    tokenizer.model_max_length = longest_input(model) or VERY_LARGE_INTEGER
    rows, largest = token_rows(model), max(tokenizer.get_vocab().values())
    if rows is not None and largest >= rows:
        raise DataError(
            f"{name}: the tokenizer has tokens up to id {largest}, the model {rows} rows of"
            f" embeddings, for ids up to {rows - 1}; were tokens added to it? call"
            f" model.resize_token_embeddings({largest + 1}) and save the model again"
        )
    return tokenizer, notes


def _takes_segment_ids(config: PreTrainedConfig) -> bool | None:
    """Whether the architecture takes token_type_ids; None where only the tokenizer can know."""
    head: Any = MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(config)]
    if "token_type_ids" not in inspect.signature(head.forward).parameters:
        return False
    kinds = getattr(config, "type_vocab_size", None)
    return None if kinds is None else kinds >= 2
