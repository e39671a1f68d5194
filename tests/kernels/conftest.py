"""Batches, the truth they are compared with, and the devices, for all tests of the kernels.

One set of tests covers three implementations of the operators: closed form (CPU), the Triton
kernels on a GPU (marker gpu), and the Triton kernels interpreted on the CPU, where
`test_interpreter.py` runs the same files in a process of its own.

Shapes: T tokens, B windows (segments), D hidden width, 2 = (start, end) or (offset, length).
"""

import os
import re
import subprocess
import sys
from pathlib import Path
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


_COUNTS = pytest.StashKey[dict[str, str]]()


@pytest.fixture
def run_pytest_apart(request, tmp_path):
    """A function that runs pytest in a process of its own; its counts go to our summary.

    Triton's interpreter and its compiler exclude each other in one process, and both exclude the
    plain CPU implementation that the rest of the tests use.
    """

    def run(name: str, paths: list[str], options: list[str], **variables: str) -> int:
        root = Path(__file__).parents[2]
        inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        variables["TRITON_CACHE_DIR"] = str(tmp_path)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *paths],
            cwd=root,
            env=inherited | variables,
            capture_output=True,
            text=True,
        )
        counts = re.findall(r"\d+ (?:passed|failed|skipped|error|deselected)\w*", done.stdout)
        summary = ", ".join(counts) or "no tests ran"
        request.config.stash.setdefault(_COUNTS, {})[name] = summary
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return int(re.search(r"(\d+) passed", summary)[1])

    return run


def pytest_terminal_summary(terminalreporter, config):
    for name, summary in config.stash.get(_COUNTS, {}).items():
        terminalreporter.write_line(f"{name}, in a process of its own: {summary}")


@pytest.fixture(scope="session")
def kernel_helpers():
    """The same functions for tests by hypothesis, which takes no function-scoped fixtures."""
    return _make_batch, _by_cross_entropy, _differentiate
