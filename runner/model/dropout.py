"""Dropout on a CPU: masks from few random numbers, a pure function of where in training they are
drawn.

torch draws every element of a mask by itself from one serial generator: on a CPU that is a fifth of
a training step. Here an element costs 16 bits of a fast generator (SFC64), compared in one pass. An
element is dropped with probability round(65536 p) / 65536, independently of all others, and what is
kept is divided by exactly one minus that, so the expectation is the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 1 << 16  # how finely a probability is told apart
_WORD = 4  # elements that one 64-bit number of the generator serves


class DropoutMasks:
    """The source of all masks of one rank.

    A resumed run draws the masks of an uninterrupted one: nothing depends on what was drawn before
    the last `reseed`, which seeds torch's generators too, for what draws from them.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._place = (seed, rank)
        self.reseed()

    def reseed(self, *position: int) -> None:
        """Begin the masks of a forward pass, named by numbers such as epoch, step and pass."""
        entropy = np.random.SeedSequence([*self._place, *position])
        self._bits = np.random.SFC64(entropy)
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def keep_mask(self, shape: Sequence[int], p: float) -> np.ndarray:
        """Which elements are kept, bool of `shape`; each is dropped with probability p."""
        count = math.prod(shape)
        words = self._bits.random_raw(-(-count // _WORD))
        levels = np.asarray(words).view(np.uint16)[:count]
        return np.greater_equal(levels, np.uint16(_threshold(p))).reshape(tuple(shape))

    def repeated(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a computation that begins now and of its repetition, which draws the same
        masks: `context_fn` of torch.utils.checkpoint, which sees to torch's generators itself."""
        return nullcontext(), self._drawing_from(self._bits.state)

    @contextmanager
    def _drawing_from(self, state: Any) -> Iterator[None]:
        after, self._bits.state = self._bits.state, state
        try:
            yield
        finally:  # checkpoint leaves its repetition by an exception
            self._bits.state = after


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by: one over the probability of keeping it."""
    return _LEVELS / (_LEVELS - _threshold(p))


def masked(values: Tensor, keep: np.ndarray) -> Tensor:
    """A copy of contiguous CPU `values` with zeros where they are not kept."""
    if values.dtype == torch.float32:
        return torch.from_numpy(np.multiply(values.numpy(), keep))
    if values.element_size() == 2:  # numpy has no bfloat16: times 1 or 0, the bits stay or vanish
        return torch.from_numpy(np.multiply(values.view(torch.int16).numpy(), keep)).view(
            values.dtype
        )
    return values * torch.from_numpy(keep)


class CpuDropout(nn.Dropout):
    """`nn.Dropout` with masks from `DropoutMasks`."""

    def __init__(self, p: float, masks: DropoutMasks) -> None:
        super().__init__(p)
        self.masks = masks

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of a CPU tensor of any shape while training."""
        if not self.training or self.p == 0.0:
            return input
        return _Drop.apply(input, self.masks.keep_mask(input.shape, self.p), keep_scale(self.p))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, keep: np.ndarray, scale: float) -> Tensor:
        ctx.save_for_backward(torch.from_numpy(keep))
        ctx.scale = scale
        return masked(values.contiguous(), keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return masked(grads[0].contiguous(), keep.numpy()).mul_(ctx.scale), None, None


def install_dropout(model: nn.Module, masks: DropoutMasks) -> int:
    """Let every `nn.Dropout` of a model draw from `masks`; returns how many there are.

    Weights and their names stay as they are.
    """
    found = [
        (parent, name, child.p)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]
    for parent, name, p in found:
        parent.register_module(name, CpuDropout(p, masks).train(parent.training))
    return len(found)


def _threshold(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)
