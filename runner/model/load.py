"""Finds a model's files, once, and loads configuration, tokenizer and weights from them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
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
from runner.model.config import empty_model, read_config, reading
from runner.model.structure import longest_input, token_rows
from runner.run.provenance import cpu_features
from runner.utils.files import file_sha256
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
        quiet_libraries()
        return cls(section, folder, commit, read_config(section, folder))

    @cached_property
    def weights_sha256(self) -> str | None:
        """Hash of the weights; None where they are in several files."""
        return hash_weights(self.folder)

    def check_weights(self) -> None:
        """Refuse weights that are never read, and others than the job declares.

        Raises:
            DataError: naming the files that there are instead of *.safetensors, and how to convert
                them; both hashes; or that there is no one file to hash.
        """
        files = _weight_files(self.folder)
        if not files:
            raise DataError(f"{self.section.name}: {_no_weights(self.folder)}")
        declared, found = self.section.sha256, self.weights_sha256
        if declared is None or found == declared:
            return
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
        DataError: if it cannot be read, has no vocabulary, or tokens that the model has no
            embeddings for; if no model can be built of the configuration.
    """
    name = files.section.name
    with reading(f"model.name: {name}"):
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
    model = empty_model(files.config, name)
    # The longest window, in tokens.
    tokenizer.model_max_length = longest_input(model) or VERY_LARGE_INTEGER
    rows, largest = token_rows(model), max(tokenizer.get_vocab().values())
    if rows is not None and largest >= rows:
        raise DataError(
            f"{name}: the tokenizer has tokens up to id {largest}, the model {rows} rows of"
            f" embeddings, for ids up to {rows - 1}; were tokens added to it? call"
            f" model.resize_token_embeddings({largest + 1}) and save the model again"
        )
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
    return model


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
    with reading(name):
        return AutoModelForQuestionAnswering.from_pretrained(
            str(files.folder),
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


def hash_weights(folder: Path) -> str | None:
    """sha256 of the weights in a model's folder; None where they are not in one file."""
    files = _weight_files(folder)
    return file_sha256(files[0]) if len(files) == 1 else None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _no_weights(folder: Path) -> str:
    """What is wrong with a folder without safetensors."""
    others = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
        for path in folder.glob(pattern)
    )
    if not others:
        return "has no weights, which are files *.safetensors"
    sentence = f"has its weights as {others[0]} only; files *.safetensors are read, nothing else"
    if not others[0].startswith("pytorch_model"):
        return sentence
    return (
        f"{sentence}, since a pickle can run code; convert it in its folder: python -c"
        ' "import glob, torch, safetensors.torch as s; s.save_file({k: v.clone() for f in'
        " glob.glob('pytorch_model*.bin') for k, v in torch.load(f, weights_only=True).items()},"
        " 'model.safetensors', {'format': 'pt'})\""
    )


def _takes_segment_ids(config: PreTrainedConfig) -> bool | None:
    """Whether the architecture takes token_type_ids; None where only the tokenizer can know."""
    head: Any = MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(config)]
    if "token_type_ids" not in inspect.signature(head.forward).parameters:
        return False
    kinds = getattr(config, "type_vocab_size", None)
    return None if kinds is None else kinds >= 2
