"""Finds a model's files, once, and loads configuration, tokenizer and weights from them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
from runner.utils.text import first_line

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
class ModelFiles:
    """A model's files, looked up and checked for foreign code once.

    Attributes:
        section: the job's [model].
        folder: where the files are.
        commit: the hub's, whatever the job calls its revision; None for a folder.
        config: the configuration, the job's dropout laid over it.
    """

    section: Model
    folder: Path
    commit: str | None
    config: PreTrainedConfig

    @classmethod
    def locate(cls, section: Model) -> ModelFiles:
        """Find the files, fetched from the hub if need be, and read the configuration.

        Raises:
            AssetError: if the model is neither here nor reachable.
            DataError: if its folder cannot be read, or transformers has no span head for it.
            JobError: if it has no such dropout.
        """
        folder, commit = _find(section)
        refuse_remote_code(section.name, folder)
        quiet_libraries()
        with _reading(f"model.name: {section.name}"):
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if type(config) not in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
            raise DataError(
                f"{section.name}: {config.model_type} has no question-answering head in"
                " transformers"
            )
        _set_dropout(config, section)
        # A classifier's checkpoint brings its own number of labels; a span head has start and end.
        config.num_labels = 2
        return cls(section, folder, commit, config)

    @cached_property
    def weights_sha256(self) -> str | None:
        """Hash of the weights; None where they are in several files."""
        return hash_weights(self.folder)

    def check_weights(self) -> None:
        """Refuse other weights than the job declares.

        Raises:
            DataError: naming both hashes, or that there is no one file to hash.
        """
        declared, found = self.section.sha256, self.weights_sha256
        if declared is None or found == declared:
            return
        files = _weight_files(self.folder)
        if found is None:
            raise DataError(
                f"{self.section.name}: model.sha256 is declared, but there are {len(files)} files"
                " *.safetensors to hash, not one"
            )
        raise DataError(
            f"{files[0]}: sha256 is {found}, the job declares {declared}; another or a damaged"
            " version of the weights"
        )


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer.

    Its `model_input_names` and `model_max_length` are made to say what this model takes: what
    tokenizers say themselves is often another family's, or nothing.

    Raises:
        DataError: if it cannot be read, or has no vocabulary.
    """
    name = files.section.name
    with _reading(f"model.name: {name}"):
        tokenizer = AutoTokenizer.from_pretrained(str(files.folder), trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"{name}: has no vocabulary; are tokenizer files missing?")
    names = list(tokenizer.model_input_names)
    segment_ids = _takes_segment_ids(files.config)
    if segment_ids is True and "token_type_ids" not in names:
        names.insert(1, "token_type_ids")
    elif segment_ids is False and "token_type_ids" in names:
        names.remove("token_type_ids")
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    # The longest window, in tokens, that the model has position embeddings for.
    tables = position_tables(empty_model(files))
    sizes = [table.num_embeddings - first_position(table) for table in tables]
    tokenizer.model_max_length = min(sizes, default=VERY_LARGE_INTEGER)
    return tokenizer


def load_pretrained(files: ModelFiles, seed: int) -> PreTrainedModel:
    """Load weights to be trained, in float32, and give a missing head its first weights from the
    seed, alike on every rank.

    Raises:
        DataError: if they do not have the declared sha256, are not this model's, or cannot be read.
    """
    files.check_weights()
    name = files.section.name
    torch.manual_seed(seed)
    model, found = _load_weights(files, torch.float32, f"model.name: {name}")
    # transformers would draw them at random and say so in a warning only.
    body = f"{model.base_model_prefix}."
    strange = [key for key in found["missing_keys"] if key.startswith(body)]
    strange += [key for key, *_ in found["mismatched_keys"]]
    if strange:
        raise DataError(
            f"{name}: the weights are not those of its config.json: {len(strange)} tensors are"
            f" absent or of another shape, such as {min(strange)}"
        )
    return model


def load_finetuned(files: ModelFiles, device: torch.device, name: str) -> PreTrainedModel:
    """Load weights that answer questions, onto the CPU, in the precision they were stored in; where
    they will run on a `device` that does not multiply in it, in float32.

    Raises:
        DataError: if it was never fine-tuned to answer questions, or cannot be read.
    """
    model, found = _load_weights(files, "auto", name)
    absent = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if absent:
        raise DataError(
            f"{name}: was not fine-tuned to answer questions, or its weights are not those of its"
            f" config.json: {len(absent)} tensors are absent or of another shape, such as"
            f" {min(absent)}; fine-tune it first"
        )
    # Emulated, it would be many times slower.
    if device.type == "cpu" and model.dtype != torch.float32:
        native = model.dtype == torch.bfloat16 and choose_precision("auto", device) == "bf16"
        return model if native else model.float()
    return model


def _load_weights(
    files: ModelFiles, dtype: torch.dtype | str, name: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and which of its tensors were absent or of another shape."""
    with _reading(name):
        return AutoModelForQuestionAnswering.from_pretrained(
            str(files.folder),
            config=files.config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,  # pickles can run code
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )


def empty_model(files: ModelFiles) -> PreTrainedModel:
    """The model's architecture without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForQuestionAnswering.from_config(files.config)


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


def _find(section: Model) -> tuple[Path, str | None]:
    """The folder of a model's files and, from the hub, their commit."""
    if section.name.startswith("package:"):
        folder = package_folder(section.name.removeprefix("package:"))
        if folder is None:
            raise AssetError(f"model.name: {section.name} is not installed")
        return folder, None
    if Path(section.name).is_dir():  # it comes before a name on the hub
        return Path(section.name), None
    if not is_hub_model(section.name):
        raise AssetError(f"model.name: no folder {section.name}")
    try:
        found = snapshot("model", section.name, section.revision)
    except AssetError as error:
        raise AssetError(f"model.name: {error}") from None
    return found.folder, found.commit


def hash_weights(folder: Path) -> str | None:
    """sha256 of the weights in a model's folder; None where they are not in one file."""
    files = _weight_files(folder)
    return file_sha256(files[0]) if len(files) == 1 else None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _takes_segment_ids(config: PreTrainedConfig) -> bool | None:
    """Whether the architecture takes token_type_ids; None where only the tokenizer can know."""
    head: Any = MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(config)]
    if "token_type_ids" not in inspect.signature(head.forward).parameters:
        return False
    kinds = getattr(config, "type_vocab_size", None)
    return None if kinds is None else kinds >= 2


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
def _reading(name: str) -> Iterator[None]:
    """Say in one line that transformers cannot read a model's folder."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{name}: cannot be read: {first_line(error)}") from error


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
