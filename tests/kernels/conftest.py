"""Batches, the truth they are compared with, and the devices, for all tests of the kernels.

One set of tests covers three implementations of the operators: closed form (CPU), the Triton
kernels on a GPU (marker gpu), and the Triton kernels interpreted on the CPU, where
`test_interpreter.py` runs the same files in a process of its own.

Shapes: T tokens, B windows (segments), D hidden width, 2 = (start, end) or (offset, length).
"""

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Folders that need a process of their own; the variable is what that process is started with.
collect_ignore = [
    folder
    for folder, variable in (("interp", "TRITON_INTERPRET"), ("aot", "SPAN_KERNELS_AOT"))
    if os.environ.get(variable) != "1"
]


class Batch(NamedTuple):
    hidden_TD: Tensor
    weight_2D: Tensor
    bias_2: Tensor
    logits_T2: Tensor
    segments_B2: Tensor
    starts_B: Tensor
    ends_B: Tensor

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_TD, self.weight_2D, self.bias_2

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.segments_B2, self.starts_B, self.ends_B


def _make_batch(
    lengths,
    *,
    width=8,
    dtype=torch.float32,
    layout="packed",
    labels=None,
    index_dtype=torch.int64,
    device="cpu",
    seed=0,
) -> Batch:
    """Random windows of the given lengths; by default every label is valid where one can be.

    layout: "packed" (one after another), "padded" (rows of max(lengths)) or "scattered" (gaps of
    three tokens before, between and behind the windows, which lie in reverse order).
    labels: pairs (start, end), one for each window.
    """
    generator = torch.Generator().manual_seed(seed)
    if layout == "padded":
        longest = max(lengths, default=0)
        offsets = [longest * b for b in range(len(lengths))]
        tokens = longest * len(lengths)
    elif layout == "packed":
        offsets = [sum(lengths[:b]) for b in range(len(lengths))]
        tokens = sum(lengths)
    else:
        offsets = [sum(n + 3 for n in lengths[b + 1 :]) + 3 for b in range(len(lengths))]
        tokens = sum(lengths) + 3 * (len(lengths) + 1)
    if labels is None:
        labels = [
            torch.randint(0, max(n, 1), (2,), generator=generator).tolist() for n in lengths
        ]
    starts_B, ends_B = torch.tensor(labels, dtype=index_dtype).reshape(-1, 2).unbind(1)
    rows = list(zip(offsets, lengths, strict=True))

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    return Batch(
        normal(tokens, width),
        normal(2, width, scale=width**-0.5),
        normal(2),
        normal(tokens, 2, scale=3.0),
        torch.tensor(rows, dtype=index_dtype).reshape(-1, 2).to(device),
        starts_B.to(device),
        ends_B.to(device),
    )


def _by_cross_entropy(
    logits_T2: Tensor, segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor
) -> Tensor:
    """The loss by a loop over windows and PyTorch's cross entropy, in the dtype of the logits."""
    halves = []
    for side, labels_B in enumerate((starts_B.tolist(), ends_B.tolist())):
        losses = [
            cross_entropy(
                logits_T2[None, offset : offset + length, side],
                torch.tensor([label], device=logits_T2.device),
            )
            for (offset, length), label in zip(segments_B2.tolist(), labels_B, strict=True)
            if 0 <= label < length
        ]
        # Without a valid row: 0, still connected to the logits.
        halves.append(torch.stack(losses).mean() if losses else logits_T2[:0].sum())
    return (halves[0] + halves[1]) / 2


class Result(NamedTuple):
    loss: Tensor
    grads: tuple[Tensor, ...]


def _differentiate(function, tensors, *rows, dtype=None, upstream=1.0, **options) -> Result:
    """Loss and gradients by the leaves `tensors`, taken in `dtype` if one is given."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    loss = function(*leaves, *rows, **options)
    return Result(loss.detach(), torch.autograd.grad(loss * upstream, leaves))


def _assert_as_good_as_eager(got: Result, truth: Result, eager: Result) -> None:
    """Every error is at most the one of eager PyTorch in the same dtype, or float32 rounding.

    The second half matters for float32 inputs, where both errors are a few units in the last place
    of the largest value and which one is smaller is chance.
    """
    for mine, exact, theirs in zip(
        (got.loss, *got.grads), (truth.loss, *truth.grads), (eager.loss, *eager.grads), strict=True
    ):
        if not exact.numel():
            assert mine.shape == exact.shape
            continue
        rounding = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        allowed = torch.maximum((theirs.double() - exact).abs().max(), rounding)
        error = (mine.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3g}, eager has {allowed:.3g}"


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request):
    return request.param


@pytest.fixture
def make_batch():
    return _make_batch


@pytest.fixture
def by_cross_entropy():
    return _by_cross_entropy


@pytest.fixture
def differentiate():
    return _differentiate


@pytest.fixture
def assert_as_good_as_eager():
    return _assert_as_good_as_eager
