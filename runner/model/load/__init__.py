"""Finds a model's files, once, and loads configuration, tokenizer and weights from them.

- `weights`: files of weights, and pickled ones as safetensors
- `tokenizer`: the fast tokenizer, made to say what the model takes
- `pieces`: tokenizers made of sentencepiece models
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoModelForQuestionAnswering,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from runner.data.hub import snapshot
from runner.errors import AssetError, DataError, JobError
from runner.job.schema import Model
from runner.job.sources import is_hub_model, package_folder
from runner.model.config import read_config, reading, settle_attention
from runner.model.load.tokenizer import open_tokenizer
from runner.model.load.weights import (
    Weights,
    hash_weights,
    readable_weights,
    shapes,
    weight_files,
    what_is_there,
)
from runner.run.provenance import cpu_features
from runner.utils.text import first_line

# Instruction sets of x86-64 and of ARM that multiply in bfloat16.
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


@dataclass(frozen=True)
class ModelFiles:
    """A model's files, looked up and checked for foreign code once.

    Attributes:
        section: the job's [model].
        folder: where the files are.
        commit: the hub's, whatever the job calls its revision; None for a folder.
        config: the configuration, the job's dropout laid over it.
        notes: lines for the log, on what is read otherwise than it was published.
    """

    section: Model
    folder: Path
    commit: str | None
    config: PreTrainedConfig
    notes: list[str] = field(default_factory=list)

    @classmethod
    def locate(cls, section: Model) -> ModelFiles:
        """Find the files, fetched from the hub if need be, and read the configuration.

        Raises:
            AssetError: if the model is neither here nor reachable.
            DataError: if its folder cannot be read, or transformers has no span head for it.
            JobError: if it has no such dropout.
        """
        folder, commit = _find(section)
        quiet_libraries()
        config = read_config(section, folder)
        return cls(section, folder, commit, config, settle_attention(config))

    @cached_property
    def weights_sha256(self) -> str | None:
        """Hash of the weights as published; None where they are in several files."""
        return hash_weights(self.folder)

    @cached_property
    def weights(self) -> Weights:
        """Where transformers reads the weights: here, or where `readable_weights` puts them."""
        found = readable_weights(self.folder)
        self.notes.extend(found.notes())
        return found

    def check_weights(self) -> None:
        """Refuse weights that are never read, and others than the job declares.

        Raises:
            DataError: naming the files that there are instead; both hashes; or that there is no
                one file to hash.
        """
        files = weight_files(self.folder)
        if not files:
            raise DataError(f"{self.section.name}: {what_is_there(self.folder)}")
        declared = self.section.sha256
        found = None if declared is None else self.weights_sha256
        if found == declared:
            return
        if found is None:
            raise DataError(
                f"{self.section.name}: model.sha256 is declared, but there are {len(files)} files"
                f" *{files[0].suffix} to hash, not one"
            )
        raise DataError(
            f"{files[0]}: sha256 is {found}, the job declares {declared}; another or a damaged"
            " version of the weights"
        )


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer, as `open_tokenizer`."""
    tokenizer, notes = open_tokenizer(files.section.name, files.folder, files.config)
    files.notes.extend(notes)
    return tokenizer


def load_pretrained(files: ModelFiles, seed: int) -> PreTrainedModel:
    """Load weights to be trained, in float32, and give a missing head its first weights from the
    seed, alike on every rank.

    Raises:
        DataError: if they do not have the declared sha256, are not this model's, or cannot be read.
    """
    files.check_weights()
    torch.manual_seed(seed)
    model, found = _load_weights(files, torch.float32, f"model.name: {files.section.name}")
    _refuse_others(files, model, found)
    return model


def load_outline(files: ModelFiles) -> PreTrainedModel:
    """The model as `load_pretrained` gives or refuses it, of whose weights the shapes alone are
    read: all rows of a tensor are one in memory, so that any model fits.
    """
    files.check_weights()
    kind: Any = MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(files.config)]
    folder = files.weights.folder
    with reading(f"model.name: {files.section.name}"):
        state = {
            key: torch.zeros(shape[-1:]).expand(shape) for key, shape in shapes(folder).items()
        }
        model, found = kind.from_pretrained(
            None,
            config=files.config,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _refuse_others(files, model, found)
    return model


def _refuse_others(files: ModelFiles, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the model; transformers would draw at random what is
    absent, and say so in a warning only."""
    name = files.section.name
    body = f"{model.base_model_prefix}."
    strange = [key for key in found["missing_keys"] if key.startswith(body)]
    strange += [key for key, *_ in found["mismatched_keys"]]
    elsewhere = _other_prefix(strange, body, found["unexpected_keys"])
    has_head = all(key.startswith(body) for key in found["missing_keys"])
    if elsewhere is not None and not has_head:
        raise DataError(
            f"{name}: the weights are of a {files.config.model_type} without a question-answering"
            f" head: such a head looks for them as {body}*, they are called {elsewhere}*; put them"
            f" into AutoModelForQuestionAnswering.from_config(config).{body.rstrip('.')} and save"
            " it, or take an encoder"
        )
    if strange:
        raise DataError(
            f"{name}: the weights are not those of its config.json: {len(strange)} tensors are"
            f" absent or of another shape, such as {min(strange)}"
        )


def _other_prefix(absent: Sequence[str], body: str, there: Iterable[str]) -> str | None:
    """The prefix under which tensors that are absent below `body` are there after all, as a
    decoder's are."""
    inner = {key.removeprefix(body) for key in absent}
    prefixes = {key.partition(".")[0] for key in there} if inner else ()
    held = set(there)
    return next((f"{p}." for p in prefixes if all(f"{p}.{key}" in held for key in inner)), None)


def load_finetuned(files: ModelFiles, device: torch.device, name: str) -> PreTrainedModel:
    """Load weights that answer questions, onto the CPU, in the precision they were stored in; where
    they will run on a `device` that does not multiply in it, in float32.

    Raises:
        DataError: if it was never fine-tuned to answer questions, or cannot be read.
    """
    files.check_weights()
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
    folder = files.weights.folder
    with reading(name):
        return AutoModelForQuestionAnswering.from_pretrained(
            str(folder),
            config=files.config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,  # pickles can run code
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )


def check_forward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    training: bool = False,
) -> None:
    """Run a model that is on the CPU over a window of a few tokens: what its configuration allows
    and its forward pass does not is told before anything is computed.

    Args:
        model, tokenizer: as loaded here.
        name: of the model, for messages.
        training: whether the model will be trained, with dropout.

    Raises:
        DataError: with what transformers says.
    """
    encoded = tokenizer("a", "a b", return_tensors="pt")
    inputs = {key: encoded[key] for key in tokenizer.model_input_names if key in encoded}
    model.train(training)
    try:
        with torch.no_grad():
            output = model(**inputs)
        found = output.start_logits.shape, output.end_logits.shape
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(
            f"{name}: the model reads no window with the values of its config.json:"
            f" {type(error).__name__}: {first_line(error)}"
        ) from error
    if set(found) != {encoded["input_ids"].shape}:
        raise DataError(f"{name}: the model gives no start and end logit for each token")


@torch.no_grad()
def padding_notes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A line for the log where padding changes the logits of a model that is on the CPU, as in
    those that convolve over neighbouring tokens."""
    encoded = tokenizer("a", "a b", return_tensors="pt")
    alone = {key: encoded[key] for key in tokenizer.model_input_names if key in encoded}
    fill = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
    padded = {
        key: torch.nn.functional.pad(ids, (0, 8), value=fill[key])
        for key, ids in {"attention_mask": torch.ones_like(encoded["input_ids"]), **alone}.items()
    }
    was_training = model.training
    model.eval()
    length = encoded["input_ids"].shape[1]
    own, beside = (model(**inputs).start_logits[0, :length] for inputs in (alone, padded))
    model.train(was_training)
    if (own - beside).abs().max() <= 1e-4 * own.abs().max():
        return []
    return [
        f"padding: {model.config.model_type} sees it, so that logits near a window's end depend on"
        " the batch; train.micro_batch_size = 1 and score.batch_size = 1 need none"
    ]


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve "auto": bf16 where the device multiplies in it, else fp32.

    Raises:
        JobError: if the device has no fp16.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise JobError(
            ['model.precision: "fp16" needs a GPU, here is none; use "auto", "bf16" or "fp32"']
        )
    if wanted != "auto":
        return wanted
    return "bf16" if multiplies_in_bf16(device) else "fp32"


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for it, or must emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not BF16_FEATURES.isdisjoint(cpu_features())


def emulation_warning(precision: str, device: torch.device) -> list[str]:
    """The line for the log where a CPU has no instructions for the bf16 that it is asked for."""
    if precision != "bf16" or device.type != "cpu" or multiplies_in_bf16(device):
        return []
    return [
        "warning: this CPU has no instructions for bf16 and emulates it, up to 250 times slower"
        ' than fp32; set model.precision = "auto" or "fp32"'
    ]


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
