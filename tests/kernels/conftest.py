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
        labels = [torch.randint(0, max(n, 1), (2,), generator=generator).tolist() for n in lengths]
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


class Truth(NamedTuple):
    exact: Result
    rounding: tuple[Tensor, ...]  # of the loss and of each gradient


def _truth_of(function, tensors, *rows) -> Truth:
    """A loss and its gradients in float64, and how far a computation in float32 may miss them.

    Two things move it, both with the size of what is added up, not with that of the sum:
    - each input, product and exponential is rounded: all inputs are moved by a unit in the last
      place, and what comes of it is measured, which holds for whatever the function cancels;
    - a sum over T tokens is rounded T times, by half a unit in the last place of what it has come
      to: a walk of sqrt(T) such steps, of which four standard deviations are allowed.
    """
    eps = torch.finfo(torch.float32).eps
    exact = _differentiate(function, tensors, *rows, dtype=torch.float64)
    steps = 2 * max(len(tensors[0]), 1) ** 0.5
    rounding = [steps * eps * _largest(x) for x in (exact.loss, *exact.grads)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        signs = [torch.randint(0, 2, x.shape, generator=generator) * 2 - 1 for x in tensors]
        inputs = [
            x.double() * (1 + eps * sign.to(x.device))
            for x, sign in zip(tensors, signs, strict=True)
        ]
        moved = _differentiate(function, inputs, *rows)
        pairs = zip((moved.loss, *moved.grads), (exact.loss, *exact.grads), strict=True)
        moves = [_largest(x - y) for x, y in pairs]
        rounding = [max(most, 2 * move) for most, move in zip(rounding, moves, strict=True)]
    return Truth(exact, tuple(rounding))


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _assert_as_good_as_eager(function, eager, tensors, *rows) -> Result:
    """Every error is at most the one of eager PyTorch in the same dtype, and float32 rounding.

    What is computed in float32 and rounded once to a half dtype is the nearest number there is, so
    eager's error in that dtype is at least as large. Returns the function's result.
    """
    got, theirs = (_differentiate(f, tensors, *rows) for f in (function, eager))
    exact, rounding = _truth_of(eager, tensors, *rows)
    for mine, right, other, slack in zip(
        (got.loss, *got.grads),
        (exact.loss, *exact.grads),
        (theirs.loss, *theirs.grads),
        rounding,
        strict=True,
    ):
        assert mine.shape == right.shape
        error, allowed = _largest(mine - right), _largest(other - right) + slack
        assert error <= allowed, f"error {error:.3g}, {allowed:.3g} is allowed"
    return got


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


@pytest.fixture
def truth_of():
    return _truth_of


def pytest_terminal_summary(terminalreporter):
    """What ran in processes of their own (tests/apart.py)."""
    for report in terminalreporter.getreports("passed"):
        for name, counts in report.user_properties:
            terminalreporter.write_line(f"{name}, in a process of its own: {counts}")


@pytest.fixture(scope="session")
def kernel_helpers():
    """The same functions for tests by hypothesis, which takes no function-scoped fixtures."""
    return _make_batch, _by_cross_entropy, _differentiate
