"""Loads the pretrained model and tokenizer, freezes parts of it, and turns a batch into span
logits.

Legend: B windows, L padded length, T rows of logits (B * L of a padded batch), column 0 for the
    start and 1 for the end of the answer.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from runner.data.hub import snapshot
from runner.errors import AssetError, DataError, JobError
from runner.job.schema import Model
from runner.job.sources import is_hub_model, package_folder
from runner.model.structure import first_position, position_tables
from runner.run.provenance import cpu_features
from runner.utils.files import file_sha256

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

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


@dataclass(frozen=True)
class Pretrained:
    """A model ready to be trained, its tokenizer, and where the weights came from: a folder, and on
    the hub a commit."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    location: str
    revision: str | None
    weights_sha256: str | None


def load_config(section: Model) -> PreTrainedConfig:
    """Read the model's configuration and lay the job's dropout over it.

    Raises:
        AssetError: if the model is neither here nor reachable.
        DataError: if its folder cannot be read, or transformers has no span head for it.
        JobError: if it has no such dropout.
    """
    location = model_location(section)
    refuse_remote_code(section.name, Path(location))
    quiet_libraries()
    with _loading(section):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    if type(config) not in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
        raise DataError(
            f"{section.name}: {config.model_type} has no question-answering head in transformers"
        )
    _set_dropout(config, section)
    # A checkpoint of a classifier brings its own number of labels; a span head has start and end.
    config.num_labels = 2
    return config


def load_tokenizer(section: Model) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer alone, for feature preparation and `check --data`.

    Its `model_input_names` and `model_max_length` are made to say what this model takes: what
    tokenizers say themselves is often another family's, or nothing.
    """
    location = model_location(section)
    config = load_config(section)
    with _loading(section):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"{section.name}: has no vocabulary; are tokenizer files missing?")
    names = list(tokenizer.model_input_names)
    segment_ids = _takes_segment_ids(config)
    if segment_ids is True and "token_type_ids" not in names:
        names.insert(1, "token_type_ids")
    elif segment_ids is False and "token_type_ids" in names:
        names.remove("token_type_ids")
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    tokenizer.model_max_length = _positions(config)
    return tokenizer


def load_pretrained(section: Model, seed: int) -> Pretrained:
    """Load weights in float32 and give a missing head its first weights from the seed, alike on
    every rank.

    Raises:
        AssetError: if the model is neither here nor reachable.
        DataError: if its weights do not have the declared sha256, are not this model's, or it has
            no span head.
    """
    location = model_location(section)
    weights_sha256 = declared_weights(section)
    tokenizer = load_tokenizer(section)
    config = load_config(section)
    torch.manual_seed(seed)
    with _loading(section):
        model, found = AutoModelForQuestionAnswering.from_pretrained(
            location,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            # Weights come as safetensors only: pickles can run code.
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # transformers would draw them at random and say so in a warning only.
    body = f"{model.base_model_prefix}."
    strange = [name for name in found["missing_keys"] if name.startswith(body)]
    strange += [name for name, *_ in found["mismatched_keys"]]
    if strange:
        raise DataError(
            f"{section.name}: the weights are not those of its config.json: {len(strange)} tensors"
            f" are absent or of another shape, such as {min(strange)}"
        )
    return Pretrained(model, tokenizer, location, model_commit(section), weights_sha256)


def empty_model(section: Model) -> PreTrainedModel:
    """The model's architecture without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForQuestionAnswering.from_config(load_config(section))


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve "auto": bf16 where the device multiplies in it, else fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if "avx512_bf16" in cpu_features() else "fp32"


def quiet_libraries() -> None:
    """Silence what transformers prints while it loads: a run's own lines say what matters."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# --- finding -----------------------------------------------------------------------------------


def model_location(section: Model) -> str:
    """The folder of the model's files; for a hub id, the one in the cache, fetched if need be.

    Raises:
        AssetError: if it is neither here nor reachable.
    """
    if section.name.startswith("package:"):
        folder = package_folder(section.name.removeprefix("package:"))
        if folder is None:
            raise AssetError(f"model.name: {section.name} is not installed")
        return str(folder)
    if _on_hub(section):
        try:
            return str(snapshot("model", section.name, section.revision).folder)
        except AssetError as error:
            raise AssetError(f"model.name: {error}") from None
    if not Path(section.name).is_dir():
        raise AssetError(f"model.name: no folder {section.name}")
    return section.name


def model_commit(section: Model) -> str | None:
    """The commit of a model from the hub, whatever the job calls its revision; None for a
    folder."""
    return snapshot("model", section.name, section.revision).commit if _on_hub(section) else None


def declared_weights(section: Model) -> str | None:
    """Hash the weights; None where they are in several files.

    Raises:
        AssetError: if they are neither here nor reachable.
        DataError: if the job declares another hash, or there is no one file to hash.
    """
    files = sorted(Path(model_location(section)).glob("*.safetensors"))
    if len(files) != 1:
        if section.sha256 is not None:
            raise DataError(
                f"{section.name}: model.sha256 is declared, but there are {len(files)} files"
                " *.safetensors to hash, not one"
            )
        return None
    found = file_sha256(files[0])
    if section.sha256 is not None and found != section.sha256:
        raise DataError(
            f"{files[0]}: sha256 is {found}, the job declares {section.sha256}; another or a"
            " damaged version of the weights"
        )
    return found


def _on_hub(section: Model) -> bool:
    """Whether the name is one on the hub: a folder of this name comes first."""
    return is_hub_model(section.name) and not Path(section.name).is_dir()


def _takes_segment_ids(config: PreTrainedConfig) -> bool | None:
    """Whether the architecture tells question and context apart by token_type_ids; None where only
    the tokenizer can know."""
    head: Any = MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(config)]
    if "token_type_ids" not in inspect.signature(head.forward).parameters:
        return False
    kinds = getattr(config, "type_vocab_size", None)
    return None if kinds is None else kinds >= 2


def _positions(config: PreTrainedConfig) -> int:
    """The longest window, in tokens, that the model has position embeddings for."""
    with torch.device("meta"):
        model = AutoModelForQuestionAnswering.from_config(config)
    sizes = [table.num_embeddings - first_position(table) for table in position_tables(model)]
    return min(sizes, default=VERY_LARGE_INTEGER)


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


@contextmanager
def _loading(section: Model) -> Iterator[None]:
    """Say in one line that transformers cannot read a model's folder."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"model.name: {section.name}: cannot be read: {first}") from error


def refuse_remote_code(name: str, folder: Path) -> None:
    """Look through a model folder's configurations before any library reads them.

    Args:
        name: the model, as the job names it.
        folder: its files.

    Raises:
        DataError: naming the file and the key that asks for code.
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
