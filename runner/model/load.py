"""Loads the pretrained model and tokenizer, freezes parts of it, and turns a batch into span
logits.

Legend: B windows, L padded length, T rows of logits (B * L of a padded batch), column 0 for the
    start and 1 for the end of the answer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
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

from runner.data.collate import Packed, Padded
from runner.data.hub import snapshot
from runner.errors import AssetError, DataError, JobError
from runner.job.schema import Model
from runner.job.sources import is_hub_model, package_folder
from runner.model.trust import refuse_code
from runner.run.provenance import cpu_features, file_sha256

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
    refuse_code(section.name, Path(location))
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


def model_inputs(batch: Padded | Packed, *, segment_ids: bool) -> dict[str, Any]:
    """What a transformers model is called with.

    Args:
        batch: on the model's device; a packed one is for a model that `packing` has prepared.
        segment_ids: whether the model takes token_type_ids.
    """
    inputs: dict[str, Any]
    if isinstance(batch, Packed):
        # Without segment ids RoBERTa looks some up by position, which takes int64.
        positions_1T = batch.positions_1T if segment_ids else batch.positions_1T.long()
        inputs = {"input_ids": batch.input_ids_1T, "position_ids": positions_1T}
        inputs["packed"] = batch.bounds
        types = batch.types_1T
    else:
        inputs = {"input_ids": batch.input_ids_BL}
        if batch.mask_BL is not None:
            inputs["attention_mask"] = batch.mask_BL
        types = batch.types_BL
    if segment_ids:
        inputs["token_type_ids"] = types
    return inputs


def span_logits(model: Any, batch: Padded | Packed, *, segment_ids: bool) -> Tensor:
    """Run the model and return its logits as [T, 2], T = B * L of a padded batch, in the model's
    dtype.

    Args:
        model: a transformers question-answering model, or the DeepSpeed engine around one.
        batch, segment_ids: as for `model_inputs`.
    """
    output = model(**model_inputs(batch, segment_ids=segment_ids))
    return torch.stack([output.start_logits, output.end_logits], dim=-1).reshape(-1, 2)


def takes_segment_ids(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model of this tokenizer, as `load_tokenizer` gives it, is given segment ids."""
    return "token_type_ids" in tokenizer.model_input_names


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


# --- freezing ----------------------------------------------------------------------------------


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Stop training every parameter that a pattern names.

    A pattern is a module or parameter name without the model's own prefix ("embeddings",
    "encoder.layer.3"), may hold a range of numbers ("encoder.layer.0-5"), or is a glob over
    parameter names ("*.LayerNorm.*").

    Raises:
        JobError: if a pattern matches nothing (listing what there is) or nothing is left to train.
    """
    prefix = f"{model.base_model_prefix}."
    names = {name: name.removeprefix(prefix) for name, _ in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        wanted = [
            name
            for name, short in names.items()
            if any(_matches(p, short) or _matches(p, name) for p in _spell_out(pattern))
        ]
        if not wanted:
            raise JobError(
                [
                    f"model.freeze: {pattern!r} matches no parameter; there are"
                    f" {', '.join(module_outline(names.values()))}"
                ]
            )
        for name in wanted:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise JobError(
            [f"model.freeze: {list(patterns)} freezes every parameter; nothing is left to train"]
        )


def module_outline(names: Iterable[str]) -> list[str]:
    """Name what can be frozen in a few words: top modules, numbered layers as a range."""
    outline: dict[str, list[int]] = {}
    for name in names:
        found = re.match(r"(.+?)\.(\d+)\.", name)
        if found:
            outline.setdefault(found[1], []).append(int(found[2]))
        else:
            outline.setdefault(name.split(".")[0], [])
    return [
        f"{key}.{min(n)}-{max(n)}" if n and max(n) > 0 else f"{key}.0" if n else key
        for key, n in outline.items()
    ]


def parameter_table(model: PreTrainedModel) -> list[dict[str, str | int | float | None]]:
    """One row for each top module and for all: parameters, how many of them are trained."""
    prefix = f"{model.base_model_prefix}."
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        short = name.removeprefix(prefix)
        found = re.match(r"(.+?\.\d+)\.", short)
        row = counts.setdefault(found[1] if found else short.split(".")[0], [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    rows: list[dict[str, str | int | float | None]] = [
        {"part": part, "parameters": total, "trained": trained}
        for part, (total, trained) in _merge(counts).items()
    ]
    totals = [sum(pair[n] for pair in counts.values()) for n in (0, 1)]
    rows.append({"part": "all", "parameters": totals[0], "trained": totals[1]})
    return rows


def _merge(counts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Join neighbouring numbered layers that are alike: encoder.layer.0-5."""
    merged: dict[str, list[int]] = {}
    run: tuple[str, int, int, list[int]] | None = None
    for name, pair in [*counts.items(), ("", [0, 0])]:
        stem, _, number = name.rpartition(".")
        if run and number.isdigit() and stem == run[0] and pair == run[3]:
            run = (run[0], run[1], int(number), pair)
            continue
        if run:
            stem_before, first, last, each = run
            label = f"{stem_before}.{first}-{last}" if last > first else f"{stem_before}.{first}"
            merged[label] = [value * (last - first + 1) for value in each]
            run = None
        if number.isdigit():
            run = (stem, int(number), int(number), pair)
        elif name:
            merged[name] = pair
    return merged


def _spell_out(pattern: str) -> list[str]:
    found = re.search(r"(?<=\.)(\d+)-(\d+)(?=\.|$)", pattern)
    if not found:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [f"{pattern[: found.start()]}{n}{pattern[found.end() :]}" for n in numbers]


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def optimiser_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of trained parameters: matrices decay, biases and norm weights (one dimension)
    never do."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
    # RoBERTa and its kin count positions from behind the padding's.
    sizes = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding)
    ]
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
