"""Triton: the head's gradients from what the forward pass kept, without the hidden states.

    dW_k = sum over tiles n of s_bk exp(m_nk - lse_bk) a_nk  -  sum over rows b of s_bk H[label_bk]
    dH   = dz W, rank 2: two numbers a token and W

with a, m of `pool_kernel.py` and s, lse, dz of `loss_kernel.py`. Both sums run in index order, so
the same input gives the same bits. db is exactly zero: adding a constant to all logits of a window
changes no softmax.

Importing this file imports Triton; `ops.py` does so at the first call on a GPU.

Shapes: T tokens, B rows (segments), D hidden width, N tiles, 2 = (start, end); M rows and C columns
of one block.
"""

# Triton exists for Linux only, and its functions are not the Python that pyright takes them for.
# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from span_kernels.launch import Statistics, Tiles, on_device, power_of_two

BLOCK_TILES = 256
"""Tiles that a program of the weight's gradient reads at once: its time is the length of the chain
of dependent loads, not their bytes."""

BLOCK_TOKENS = 32
"""Tokens that a program of the hidden gradient writes."""


@triton.jit(
    do_not_specialize=["rows", "slots"],
    do_not_specialize_on_alignment=["segments", "starts", "ends"],
)
def _weight_grad_kernel(
    # read
    hidden,
    segments,
    starts,
    ends,
    owner_N,
    peak_N2,
    pooled_N2D,
    losses_B,
    lse_B2,
    scale_B2,
    # written
    loss,
    grad_2D,
    # sizes and strides
    rows,
    slots,
    stride_t,
    stride_d,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = grad_2D.dtype.element_ty
    side = tl.program_id(1)
    column_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real_C = column_C < D
    block_M = tl.arange(0, BLOCK_M).to(tl.int64)

    sum_MC = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for first in range(0, slots, BLOCK_M):
        slot_M = first + block_M
        owner_M = tl.load(owner_N + slot_M, mask=slot_M < slots, other=-1).to(tl.int64)
        used_M = owner_M >= 0
        scale_M = tl.load(scale_B2 + owner_M * 2 + side, mask=used_M, other=0.0)
        # An ignored row is not read at all: 0 * NaN is NaN.
        used_M = scale_M != 0
        lse_M = tl.load(lse_B2 + owner_M * 2 + side, mask=used_M, other=0.0)
        peak_M = tl.load(peak_N2 + slot_M * 2 + side, mask=used_M, other=-float("inf"))
        share_M = scale_M * tl.exp(peak_M - lse_M)
        pooled_MC = tl.load(
            pooled_N2D + (slot_M * 2 + side)[:, None] * D + column_C[None, :],
            mask=used_M[:, None] & real_C[None, :],
            other=0.0,
        )
        sum_MC += share_M[:, None] * pooled_MC
    grad_C = tl.sum(sum_MC, 0)

    sum_MC = tl.zeros([BLOCK_M, BLOCK_C], ACC)
    for first in range(0, rows, BLOCK_M):
        row_M = first + block_M
        scale_M = tl.load(scale_B2 + row_M * 2 + side, mask=row_M < rows, other=0.0)
        used_M = scale_M != 0
        offset_M = tl.load(segments + row_M * 2, mask=used_M, other=0).to(tl.int64)
        if side == 0:
            label_M = tl.load(starts + row_M, mask=used_M, other=0).to(tl.int64)
        else:
            label_M = tl.load(ends + row_M, mask=used_M, other=0).to(tl.int64)
        chosen_MC = tl.load(
            hidden + (offset_M + label_M)[:, None] * stride_t + column_C[None, :] * stride_d,
            mask=used_M[:, None] & real_C[None, :],
            other=0.0,
        ).to(ACC)
        sum_MC += scale_M[:, None] * chosen_MC
    tl.store(grad_2D + side * D + column_C, grad_C - tl.sum(sum_MC, 0), mask=real_C)

    if (tl.program_id(0) == 0) & (side == 0):
        sum_M = tl.zeros([BLOCK_M], ACC)
        for first in range(0, rows, BLOCK_M):
            row_M = first + block_M
            sum_M += tl.load(losses_B + row_M, mask=row_M < rows, other=0.0)
        tl.store(loss, tl.sum(sum_M, 0))


@triton.jit(do_not_specialize=["tokens"])
def _hidden_grad_kernel(
    # read
    grad_output,
    grad_T2,
    grad_2D,
    weight,
    # written
    hidden_grad_TD,
    weight_grad_2D,
    # sizes and strides
    tokens,
    stride_wk,
    stride_wd,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    upstream = tl.load(grad_output).to(grad_T2.dtype.element_ty)
    column_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real_C = column_C < D
    w = weight + column_C * stride_wd
    start_w = tl.load(w, mask=real_C, other=0.0).to(upstream.dtype)
    end_w = tl.load(w + stride_wk, mask=real_C, other=0.0).to(upstream.dtype)

    token_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_M = token_M < tokens
    start_M = tl.load(grad_T2 + token_M * 2, mask=real_M, other=0.0) * upstream
    end_M = tl.load(grad_T2 + token_M * 2 + 1, mask=real_M, other=0.0) * upstream
    out_MC = start_M[:, None] * start_w[None, :] + end_M[:, None] * end_w[None, :]
    tl.store(
        hidden_grad_TD + token_M[:, None] * D + column_C[None, :],
        out_MC.to(hidden_grad_TD.dtype.element_ty),
        mask=real_M[:, None] & real_C[None, :],
    )

    # The weight's gradient is ready but for the factor: no launch of its own for 2 * D numbers.
    if tl.program_id(0) == 0:
        for side in tl.static_range(2):
            at_C = side * D + column_C
            scaled_C = tl.load(grad_2D + at_C, mask=real_C, other=0.0) * upstream
            scaled_C = scaled_C.to(weight_grad_2D.dtype.element_ty)
            tl.store(weight_grad_2D + at_C, scaled_C, mask=real_C)


def weight_grad(
    hidden_TD: Tensor,
    segments_B2: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    tiles: Tiles,
    statistics: Statistics,
) -> tuple[Tensor, Tensor]:
    """The scalar loss and d loss / d weight, [2, D] in the dtype of the statistics.

    Args:
        hidden_TD: floating; only the labelled tokens' rows are read.
        segments_B2, starts_B, ends_B: integer, contiguous.
        tiles, statistics: of `pool` and `span_loss_forward`.
    """
    slots, _, width = tiles.pooled_N2D.shape
    like = {"dtype": tiles.pooled_N2D.dtype, "device": hidden_TD.device}
    loss = torch.empty((), **like)
    grad_2D = torch.empty((2, width), **like)
    # 32 float32 columns are one 128-byte line: narrow programs are many, and each reads few bytes.
    block_c = min(32, power_of_two(width))
    with on_device(hidden_TD):
        _weight_grad_kernel[(-(-width // block_c), 2)](
            hidden_TD,
            segments_B2,
            starts_B,
            ends_B,
            *tiles,
            *statistics,
            loss,
            grad_2D,
            segments_B2.shape[0],
            slots,
            *hidden_TD.stride(),
            D=width,
            BLOCK_M=BLOCK_TILES,
            BLOCK_C=block_c,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return loss, grad_2D


def hidden_grad(
    grad_output: Tensor, grad_T2: Tensor, grad_2D: Tensor, weight_2D: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dH of the given dtype and dW of the weight's dtype, both times `grad_output` (a scalar)."""
    tokens, width = grad_T2.shape[0], weight_2D.shape[1]
    hidden_grad_TD = torch.empty((tokens, width), dtype=dtype, device=grad_T2.device)
    weight_grad_2D = torch.empty((2, width), dtype=weight_2D.dtype, device=grad_T2.device)
    # A pure write stream: 512 bytes to a row, so that every warp stores 16 bytes a thread.
    block_c = min(512 // dtype.itemsize, power_of_two(width))
    with on_device(grad_T2):
        _hidden_grad_kernel[(max(-(-tokens // BLOCK_TOKENS), 1), -(-width // block_c))](
            grad_output,
            grad_T2,
            grad_2D,
            weight_2D,
            hidden_grad_TD,
            weight_grad_2D,
            tokens,
            *weight_2D.stride(),
            D=width,
            BLOCK_M=BLOCK_TOKENS,
            BLOCK_C=block_c,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return hidden_grad_TD, weight_grad_2D
