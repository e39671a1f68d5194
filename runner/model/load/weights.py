"""A model's weights: their files as they were published, and pickled ones as safetensors.

What was published as pytorch_model.bin alone is read once, by an unpickler that makes tensors and
calls nothing else, and kept as safetensors in spantune's cache folder, under the hash of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from runner.data.window_cache import cache_root
from runner.errors import DataError, StorageError
from runner.utils.files import file_sha256, folder_aside, read_json, rust_errors, storage_errors
from runner.utils.text import first_line, one_of

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
_SUMS = "SHA256SUMS"
# Other ways in which weights are published; none of them is read.
_OTHERS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot")
# Keys under which trainers put the weights beside other things, and what they put before names.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Weights:
    """Weights as transformers reads them.

    Attributes:
        folder: where they are as safetensors.
        converted_from: names of the files that they were made of, and the sha256 of each; empty
            where they were published as safetensors.
        now: whether they were made by this call.
    """

    folder: Path
    converted_from: Mapping[str, str]
    now: bool = False

    def notes(self) -> list[str]:
        """A line for the log where they are not what was published."""
        if not self.converted_from:
            return []
        names = one_of(tuple(self.converted_from)).replace(" or ", " and ")
        how = "converted into" if self.now else "read as"
        return [f"weights: {names} {how} safetensors, kept in {self.folder}"]


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights as they were published: safetensors where there are any.

    Raises:
        DataError: if an index of pickled weights cannot be read, or names what is not there.
    """
    safe = sorted(folder.glob("*.safetensors"))
    if safe and _is_published(folder, SAFE):
        return safe
    return named_files(folder, PICKLED) or safe


def hash_weights(folder: Path) -> str | None:
    """sha256 of the weights in a model's folder as they were published; None where they are not in
    one file."""
    files = weight_files(folder)
    return file_sha256(files[0]) if len(files) == 1 else None


def readable_weights(folder: Path) -> Weights:
    """Find weights as safetensors; what was published as pickles is converted, or was before.

    Raises:
        DataError: if pickles hold anything but tensors, or cannot be read.
        StorageError: if the cache has no room for them.
    """
    files = weight_files(folder)
    if not files or files[0].suffix == ".safetensors":
        return Weights(folder, {})
    sums = {file.name: file_sha256(file) for file in files}
    # Whoever shares the cache folder has weights of his own, and a newer version of this code too.
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps([*sums.values(), code, os.getuid()]).encode()).hexdigest()[:32]
    place = cache_root() / "weights" / key
    there = _is_whole(place)
    if not there:
        try:
            _store(_tensors(files), place)
        except StorageError as error:
            raise StorageError(f"{error}; SPANTUNE_CACHE names another") from None
        if not _is_whole(place):
            raise StorageError(f"{place}: what was written there a moment ago is damaged or gone")
    return Weights(place, sums, now=not there)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a folder of safetensors, by its name; of the files only their
    headers are read.

    Raises:
        Exception: of many kinds, if they cannot be read.
    """
    found, files = {}, named_files(folder, SAFE)
    if not files:
        raise FileNotFoundError(f"no file {SAFE}, nor an index of its shards")
    for file in files:
        with safe_open(file, "pt") as tensors:
            found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return found


def what_is_there(folder: Path) -> str:
    """What is wrong with a folder without weights that are read."""
    others = sorted(path.name for pattern in _OTHERS for path in folder.glob(pattern))
    if not others:
        return f"has no weights, which are files *.safetensors or {PICKLED}"
    return (
        f"has its weights as {others[0]} only; {SAFE} and {PICKLED} (or their shards with an index)"
        " are read, nothing else: load it where it was made, and save it by save_pretrained"
    )


def named_files(folder: Path, name: str) -> list[Path]:
    """The file of this name or, where it was cut into shards, those of its index; none without
    either.

    Raises:
        DataError: if an index cannot be read, or names what is not there.
    """
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    try:
        names = sorted(set(read_json(index, dict[str, Any])["weight_map"].values()))
        # A name with a folder in it would lead to files that are not the model's.
        shards = [folder / Path(shard).name for shard in names]
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{index}: is no index of weights: {first_line(error)}") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        told = f"{len(missing)} of its {len(shards)} files are missing, such as "
        raise DataError(f"{index}: {told + missing[0] if missing else 'names no file'}")
    return shards


def _is_published(folder: Path, name: str) -> bool:
    return any((folder / file).is_file() for file in (name, f"{name}.index.json"))


# --- in the cache ---------------------------------------------------------------------------------


def _store(tensors: dict[str, Tensor], folder: Path) -> None:
    with storage_errors(folder), folder_aside(folder) as aside:
        aside.chmod(0o700)  # a model may be private
        with rust_errors(aside / SAFE):
            save_file(tensors, aside / SAFE, {"format": "pt"})
        (aside / _SUMS).write_text(_sums(aside), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache holds what was stored; one that does not is removed."""
    if not folder.is_dir():
        return False
    try:
        whole = (folder / _SUMS).read_text(encoding="utf-8") == _sums(folder)
    except (OSError, ValueError):
        whole = False
    if not whole:
        shutil.rmtree(folder, ignore_errors=True)
    return whole


def _sums(folder: Path) -> str:
    return f"{file_sha256(folder / SAFE)}  {SAFE}\n"


# --- pickles --------------------------------------------------------------------------------------


def _tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of pickled weights, none of which shares memory with another."""
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _state(file, _unpickled(file))
    size, most = sum(t.nbytes for t in found.values()), sum(f.stat().st_size for f in files)
    if size > 4 * most + 2**20:  # one number, drawn out to a large tensor
        raise DataError(
            f"{files[0]}: its tensors would take {size:,} bytes, its file(s) have {most:,}; it is"
            " no file of weights"
        )
    held: set[int] = set()
    for name, tensor in found.items():
        memory = tensor.untyped_storage().data_ptr()
        if memory in held or not tensor.is_contiguous():
            found[name] = tensor.clone(memory_format=torch.contiguous_format)
        held.add(memory)
    return found


def _unpickled(file: Path) -> Any:
    with file.open("rb") as opened:
        # Mapped where the format can be: a model may be larger than memory.
        mapped = opened.read(4) == b"PK\3\4"
    try:
        if mapped and any(entry.compress_type for entry in zipfile.ZipFile(file).infolist()):
            # By any factor.
            raise ValueError("is compressed, as torch.save never does (a TorchScript program?)")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"{file}: {_refused(error)}") from None


def _refused(error: Exception) -> str:
    """Why a pickle was not read. What torch says itself advises to read it without protection."""
    text = str(error)
    foreign = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", text)
    if foreign:
        return (
            f"asks for {foreign[1] or foreign[2]}, which is no part of a tensor; a pickle can run"
            " code, so nothing but tensors is read from one. If you trust it, load it where it was"
            " made and save the weights alone, by save_pretrained"
        )
    reason = text.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return (
        f"cannot be read as pickled weights: {reason.splitlines()[0].partition('. In PyTorch')[0]}"
    )


def _state(file: Path, table: Any) -> dict[str, Tensor]:
    """The tensors of what a pickle holds, by the names that the model has for them."""
    for _ in _WRAPPERS:  # a pickle may hold itself
        inner = _inner(table)
        table = table if inner is None else inner
    if not isinstance(table, Mapping) or not table:
        raise DataError(
            f"{file}: holds {_article(table)}, not a table of tensors by their names (a state_dict)"
        )
    for key, value in table.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not plain or value.is_quantized or value.is_meta:
            raise DataError(
                f"{file}: {key!r} is {_article(value)}, not a dense tensor; save the weights alone,"
                " by save_pretrained"
            )
    names = _without_prefixes(table)
    return {name: table[key].detach() for name, key in names.items()}


def _inner(table: Any) -> Mapping[Any, Any] | None:
    if not isinstance(table, Mapping):
        return None
    return next((table[k] for k in _WRAPPERS if isinstance(table.get(k), Mapping)), None)


def _without_prefixes(keys: Iterable[str]) -> dict[str, str]:
    """Each key by its name without what wrappers of models put before all of them."""
    names = {key: key for key in keys}
    while True:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            return names
        names = {name.removeprefix(prefix): key for name, key in names.items()}


def _article(value: Any) -> str:
    kind = "sparse or quantised tensor" if isinstance(value, Tensor) else type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
