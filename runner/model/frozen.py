"""Frozen bottom layers: how far they reach, and their outputs cached for all windows.

Autograd records nothing below the first trained weight, so frozen layers cost a forward pass only;
with `model.cache_frozen` not even that: training and evaluation start above them. Their dropout is
off then, or there would be nothing to cache.

Legend: N windows of a data set, T tokens of a batch or of all windows end to end, B windows of a
batch, L longest of them, D hidden width.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from runner.data.loader import send
from runner.data.windows import Windows, ranges
from runner.errors import JobError, StorageError
from runner.model.structure import layer_stack
from runner.utils.processes import machine_id
from runner.utils.ranks import Rank

_SHARE_OF_FREE = 0.5  # activations, and others, need room too


@dataclass(frozen=True)
class FrozenLayers:
    """The frozen bottom of an encoder.

    Attributes:
        base: the transformers encoder (model.base_model): embeddings, then a stack of layers.
        stack: the module in it that holds `layer`.
        depth: how many of these layers are frozen, from the first on.
    """

    base: Any
    stack: Any
    depth: int

    @classmethod
    def of(cls, model: Any) -> FrozenLayers | None:
        """Find it; None where embeddings are trained, or the encoder is built in another way."""
        base, stack = model.base_model, layer_stack(model)
        if stack is None or not hasattr(base, "embeddings"):
            return None
        before = [base.embeddings, *([base.embeddings_project] if _projects(base) else [])]
        if any(p.requires_grad for module in before for p in module.parameters()):
            return None
        trained = [any(p.requires_grad for p in layer.parameters()) for layer in stack.layer]
        return cls(base, stack, trained.index(True) if True in trained else len(trained))

    @contextmanager
    def replaced_by(self, hidden: Tensor) -> Iterator[None]:
        """Within it, the model takes `hidden` as these layers' output: [1, T, D] or [B, L, D]."""
        given, upper = _Given(hidden), self.stack.layer[self.depth :]
        with (
            _replaced(self.base, embeddings=given, embeddings_project=nn.Identity()),
            _replaced(self.stack, layer=upper),
        ):
            yield

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Any]) -> Tensor:
        """These layers' output for a model's inputs, without dropout: [1, T, D] or [B, L, D]."""
        was_training = self.base.training
        self.base.eval()
        with _replaced(self.stack, layer=self.stack.layer[: self.depth]):
            hidden = self.base(**inputs).last_hidden_state
        self.base.train(was_training)
        return hidden


class _Given(nn.Module):
    """Stands in for the embeddings."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


@contextmanager
def _replaced(parent: Any, **children: nn.Module) -> Iterator[None]:
    """Put other submodules in place for a while; those that `parent` has not are left out."""
    before = {name: getattr(parent, name) for name in children if hasattr(parent, name)}
    for name in before:
        setattr(parent, name, children[name])
    try:
        yield
    finally:
        for name, child in before.items():
            setattr(parent, name, child)


def _projects(base: Any) -> bool:
    return hasattr(base, "embeddings_project")


@dataclass(frozen=True)
class HiddenCache:
    """The frozen layers' outputs for all windows of a data set.

    Attributes:
        windows: whose.
        hidden_TD: outputs of all tokens, in the order of `windows.tokens_T`, in the model's dtype.
        place: "GPU memory", "memory" or "disk".
    """

    windows: Windows
    hidden_TD: Tensor
    place: str

    def write(self, rows: np.ndarray, hidden_TD: Tensor) -> None:
        """Take the outputs of the windows at `rows`, end to end."""
        index_T = self._index(rows)
        self.hidden_TD.index_copy_(0, index_T, hidden_TD.to(self.hidden_TD))

    def get(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """The outputs of the windows at `rows`, [T, D] on `device`, without waiting for a copy."""
        found_TD = self.hidden_TD.index_select(0, self._index(rows))
        if found_TD.device == device:
            return found_TD
        return found_TD.pin_memory().to(device, non_blocking=True)

    def _index(self, rows: np.ndarray) -> Tensor:
        firsts_B = self.windows.firsts_N1[rows]
        index_T = ranges(firsts_B, self.windows.firsts_N1[rows + 1] - firsts_B)
        return send([torch.from_numpy(index_T)], self.hidden_TD.device)[0]


def allocate(
    windows: Windows,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    rank: Rank,
    broadcast: Callable[[Any], Any],
    all_gather: Callable[[str | None], Sequence[str | None]],
) -> HiddenCache | None:
    """Find room for a cache: on the GPU, else in memory, else on disk; None without any.

    The ranks of one machine share one copy, since each epoch deals windows to other ranks. Every
    rank must call this.

    Args:
        windows: whose outputs are to be cached.
        width: D.
        dtype: what the model computes in.
        device: where it runs.
        folder: where a file may be, should memory not do.
        rank: this one.
        broadcast: gives rank 0's value to all ranks.
        all_gather: gives each rank's value to all ranks, which so wait for each other.

    Raises:
        StorageError: on every rank, if the room that was found is gone on any machine.
    """
    tokens = len(windows.tokens_T)
    size = tokens * width * dtype.itemsize
    place = broadcast(_place(size, device, folder, rank))
    if place is None:
        return None
    if place == "GPU memory":
        return HiddenCache(windows, torch.empty(tokens, width, dtype=dtype, device=device), place)
    if rank.local_world == 1 and place == "memory":
        return HiddenCache(windows, torch.empty(tokens, width, dtype=dtype), place)
    descriptor, failure, hidden = -1, None, None
    try:
        if rank.local == 0:
            descriptor, failure = _reserve(folder if place == "disk" else None, size)
        _raise_any(all_gather(failure))
        here = f"{machine_id()} /proc/"
        mine = f"{here}{os.getpid()}/fd/{descriptor}" if rank.local == 0 else None
        # The last word of what this machine's first rank gives.
        path = next(
            (p.split()[-1] for p in all_gather(mine) if p and p.startswith(here)), "/proc/-"
        )
        try:
            hidden = torch.from_file(path, shared=True, size=tokens * width, dtype=dtype)
        except RuntimeError as error:
            failure = f"model.cache_frozen: rank {rank.index} does not see it: {error}"
        _raise_any(all_gather(failure))
    finally:
        if descriptor >= 0:
            os.close(descriptor)  # the mappings hold the room
    return HiddenCache(windows, cast(Tensor, hidden).view(tokens, width), place)


def _reserve(folder: Path | None, size: int) -> tuple[int, str | None]:
    """Take room in memory or in a folder, all of it at once; returns its descriptor, or what
    failed. It has no name: with its last process it is gone, however that ends."""
    descriptor = -1
    try:
        if folder is None:
            descriptor = os.memfd_create("spantune-frozen")
        else:
            path = folder / f".spantune-{uuid.uuid4().hex}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            path.unlink()
        # A hole that finds no room when it is written through a mapping ends the process by SIGBUS.
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        place = folder or "memory"
        return -1, f"model.cache_frozen: {place}: {error.strerror}; {size:,} bytes are needed there"
    return descriptor, None


def _raise_any(failures: Sequence[str | None]) -> None:
    if any(failures):
        raise StorageError("; ".join(text for text in failures if text))


def _place(size: int, device: torch.device, folder: Path, rank: Rank) -> str | None:
    on_gpu = device.type == "cuda" and rank.world == 1
    if on_gpu and size <= _SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]:
        return "GPU memory"
    if size <= _SHARE_OF_FREE * psutil.virtual_memory().available:
        return "memory"
    return "disk" if size <= _SHARE_OF_FREE * shutil.disk_usage(folder).free else None


def check_cacheable(frozen: FrozenLayers | None, zero_stage: int) -> FrozenLayers:
    """Refuse `model.cache_frozen` where there is nothing to cache.

    Raises:
        JobError: saying what is missing.
    """
    if frozen is None or frozen.depth == 0:
        raise JobError(
            [
                "model.cache_frozen: needs frozen embeddings and frozen first layers, such as"
                ' model.freeze = ["embeddings", "encoder.layer.0-5"]'
            ]
        )
    if zero_stage == 3:
        raise JobError(
            ["model.cache_frozen: needs zero.stage 0, 1 or 2; stage 3 shares out weights"]
        )
    return frozen
