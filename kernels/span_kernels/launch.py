"""Host-side choices that every launch shares. Needs torch alone.

Triton compiles a kernel anew for whether 16 divides a number or an address, and for the number 1.
What differs from batch to batch (tokens, rows, slots; where the rows' table lies in the one buffer
that was copied) is therefore exempt in every kernel: a run would meet the compiler in its midst.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and accumulators for inputs of x's dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def power_of_two_below(n: int) -> int:
    """The largest power of two that is at most n, and at least 1."""
    return 1 << max(n.bit_length() - 1, 0)


MIN_ROW_BLOCK, MAX_ROW_BLOCK = 32, 1024
"""The floor keeps small batches on one compiled kernel, the cap keeps the table in registers."""


def row_block(rows: int) -> int:
    """Rows of the segment table that a program holds at once."""
    return min(max(power_of_two(rows), MIN_ROW_BLOCK), MAX_ROW_BLOCK)


class Statistics(NamedTuple):
    """What the softmax of every row leaves behind; an ignored side has scale 0."""

    losses_B: Tensor  # scaled, so that their sum is the loss
    lse_B2: Tensor
    scale_B2: Tensor  # 1 / (2 * valid rows of that side)


class Tiles(NamedTuple):
    """What the pass over the hidden states leaves behind, for each of N work slots."""

    owner_N: Tensor  # int32: the row that the slot's tile belongs to, or -1 for a slot without work
    peak_N2: Tensor  # the tile's largest logit
    pooled_N2D: Tensor  # sum over the tile of exp(logit - peak) times the hidden state


class HeadPlan(NamedTuple):
    """How the fused head cuts its work; the numbers are arguments of the compiled kernel."""

    tile: int  # tokens of one program
    group: int  # tokens that one lane reads together
    lanes: int  # rows of a program with a softmax of their own
    chunk: int  # columns of the hidden state in one vector load
    stages: int  # depth of the copy pipeline into shared memory
    warps: int


MAX_WIDTH = 8192
"""Hidden widths beyond this do not fit the registers of one program."""


def head_plan(tokens: int, width: int, dtype: torch.dtype, thread_columns: int = 64) -> HeadPlan:
    """The plan for `tokens` hidden states of `width` columns; pure arithmetic, no autotuning.

    `thread_columns` of the group's hidden states fit the registers of a thread; see
    `pool_kernel.THREAD_COLUMNS`.

    A token's row is held by one warp (512 bytes a chunk, 16 bytes a thread) up to 1,024 columns,
    and by 2, 4 or 8 warps beyond, so that its two pooled vectors, the weight and the group's hidden
    states stay below 255 registers a thread. `python -m span_kernels.bench --sweep` times the
    neighbours of these choices.
    """
    warps_per_row = max(power_of_two(width) // 1024, 1)
    chunk = min(512 // dtype.itemsize * warps_per_row, power_of_two(width))
    columns_per_thread = max(width // (32 * warps_per_row), 1)
    # Two and a half programs for each of 132 multiprocessors, as far as the batch allows.
    tile = min(max(power_of_two_below(tokens // 384), 16), 128)
    return HeadPlan(
        tile=tile,
        group=min(power_of_two_below(thread_columns // columns_per_thread), 8),
        lanes=max(4 // warps_per_row, 1),
        chunk=chunk,
        stages=3,
        warps=max(4, warps_per_row),
    )
