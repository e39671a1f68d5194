"""Chooses how a run computes, each choice with its reason: packed or padded batches, whose step,
compiled layers or not, frozen layers' outputs kept or not."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from runner.data.collate import Packing, score_batches
from runner.data.loader import Reader, fill
from runner.data.window_cache import cache_root
from runner.data.windows import Windows
from runner.distributed.collectives import everyone, share
from runner.distributed.flat_zero import choose_optimiser
from runner.errors import StorageError
from runner.job.schema import Model, Zero
from runner.model.dropout import Noise, install
from runner.model.frozen import Trunk, check_cacheable, make_room
from runner.model.packing import choose_packing
from runner.utils.ranks import Rank

# Where compiling pays: a cold start costs about a minute and saves some tenths of a step. Until
# both are measured on a GPU, only jobs of much arithmetic compile by themselves: some ten minutes
# at 200 TFLOP/s.
_WORTH_COMPILING = 1.2e17


@dataclass(frozen=True)
class Computing:
    """How a run computes.

    Attributes:
        packing: how batches are packed; None pads them.
        noise: where dropout comes from.
        optimiser: "flat" or "deepspeed".
        trunk: the frozen bottom whose outputs are kept; None computes it in every pass.
        choices: name to (choice, reason), for the log and for provenance.
    """

    packing: Packing | None
    noise: Noise
    optimiser: str
    trunk: Trunk | None
    choices: dict[str, tuple[str, str]]

    def described(self) -> list[str]:
        """One line a choice."""
        return [f"{name}: {choice} ({reason})" for name, (choice, reason) in self.choices.items()]

    def choice(self) -> str:
        """All choices in a few words, without the reasons."""
        return ", ".join(f"{name}: {choice}" for name, (choice, _) in self.choices.items())

    def recorded(self) -> dict[str, dict[str, str]]:
        """The same for provenance.json."""
        return {
            name: {"choice": choice, "reason": reason}
            for name, (choice, reason) in self.choices.items()
        }


def choose_computing(
    section: Model,
    zero: Zero,
    model: Any,
    device: torch.device,
    precision: str,
    *,
    longest: int,
    tokens: int,
    noise: Noise,
) -> Computing:
    """Decide once for a run, and prepare the model for it.

    Parts of it are frozen before, and DeepSpeed wraps it afterwards.

    Args:
        section, zero: the job's [model] and [zero].
        model: a transformers question-answering model.
        device: where it runs.
        precision: "bf16", "fp16" or "fp32".
        longest: tokens of the longest window that it will read.
        tokens: tokens that it will be trained on, all epochs together.
        noise: where dropout comes from.

    Raises:
        JobError: if the job asks for what cannot be.
    """
    choices: dict[str, tuple[str, str]] = {}
    packing, reason = choose_packing(section.packing, model, device, precision, longest)
    choices["batches"] = ("padded" if packing is None else "packed", reason)
    optimiser, reason = choose_optimiser(zero.optimizer, zero.stage, zero.deepspeed)
    choices["step"] = (optimiser, reason)
    compiled, reason = _choose_compile(section.compile, model, device, tokens)
    choices["compile"] = ("each layer" if compiled else "off", reason)
    trunk = Trunk.of(model)
    if section.cache_frozen:
        trunk = check_cacheable(trunk, zero.stage)
        reason = "as the job says; dropout in them is off"
        choices["frozen"] = (f"embeddings and {trunk.depth} layers once", reason)
    elif trunk is not None:
        choices["frozen"] = (
            f"embeddings and {trunk.depth} layers forward only",
            "nothing to train",
        )
        trunk = None
    if device.type == "cpu":
        install(model, noise)
        choices["dropout"] = ("16 bits an element", "torch's own takes a fifth of a step on a CPU")
    if compiled:
        compile_layers(model)
    return Computing(packing, noise, optimiser, trunk, choices)


def _choose_compile(wanted: str, model: Any, device: torch.device, tokens: int) -> tuple[bool, str]:
    if wanted != "auto":
        return wanted == "on", "as the job says"
    if device.type != "cuda":
        return False, "no GPU"
    layers = encoder_layers(model)
    weights = sum(p.numel() for layer in layers for p in layer.parameters())
    work = 6 * weights * tokens
    if work < _WORTH_COMPILING:
        return False, f"{work:.0e} operations are too few to pay for a compiler's start"
    return True, f"{work:.0e} operations"


def encoder_layers(model: Any) -> list[nn.Module]:
    """The layers of an encoder's stack, from the bottom; none where it is built in another way."""
    base = model.base_model
    stack = getattr(base, "encoder", None) or getattr(base, "transformer", None)
    return list(getattr(stack, "layer", ()))


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile an encoder layer by layer: they share one program, whatever the model's depth.

    What the compiler makes is kept in spantune's cache folder for later runs.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
    for layer in encoder_layers(model):
        layer.compile(dynamic=True, backend=backend)


def keep_frozen(
    reader: Reader,
    trunk: Trunk | None,
    sets: Sequence[Windows],
    batch_size: int,
    folder: Path,
    rank: Rank,
    between: Callable[[], None] = lambda: None,
) -> tuple[Reader, list[str]]:
    """Compute the trunk's outputs for whole data sets. Every rank must call this.

    They depend on the weights and on the data sets alone, so that a resumed run, which computes
    them anew, goes on with the same numbers.

    Args:
        reader: reads with the engine.
        trunk: whose outputs are kept; None keeps nothing.
        sets: training and validation windows.
        batch_size: windows per forward pass.
        folder: where a file may be, should memory not do.
        rank: this one.
        between: called before each of this rank's batches; it may raise.

    Returns:
        A reader that reads these windows from above the trunk, and lines for the log.

    Raises:
        StorageError: if there is no room. Going on without would be another training: with dropout.
    """
    if trunk is None:
        return reader, []
    began = time.monotonic()
    dtype = next(trunk.base.parameters()).dtype
    reader = dataclasses.replace(reader, trunk=trunk)
    stores = []
    for windows in sets:
        width = trunk.base.config.hidden_size
        size = len(windows.tokens_T) * width * dtype.itemsize / 2**30
        store = make_room(windows, width, dtype, reader.device, folder, rank, share, everyone)
        if store is None:
            raise StorageError(
                f"model.cache_frozen: {size:.1f} GiB of frozen layers' outputs fit neither into"
                f" free memory nor below {folder}; set it to false, or train on fewer questions"
            )
        mine = score_batches(windows.lengths_N, batch_size, rank.local, rank.local_world)
        fill(reader, store, _asking(mine, between))
        everyone(None)  # the windows of one rank are read by others
        stores.append((store, size))
    held = ", ".join(f"{size:.2f} GiB in {store.place}" for store, size in stores)
    line = f"outputs of frozen layers: {held}, computed in {time.monotonic() - began:.1f} s"
    return dataclasses.replace(reader, stores=tuple(store for store, _ in stores)), [line]


def _asking(batches: Iterable[np.ndarray], between: Callable[[], None]) -> Iterator[np.ndarray]:
    for rows in batches:
        between()
        yield rows
