"""Triton: softmax, loss and gradient of given start and end logits, one program per window.

Importing this file imports Triton; `ops.py` does so at the first call on a GPU.

Shapes: T tokens, B rows (segments), L tokens of one block, 2 = (start, end).
"""

# Triton exists for Linux only, and its functions are not the Python that pyright takes them for.
# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from span_kernels.launch import Statistics, on_device, row_block, wide_dtype
from span_kernels.rows import gap_after, row_extent, row_scales


@triton.jit(
    do_not_specialize=["tokens", "rows"],
    do_not_specialize_on_alignment=["segments", "starts", "ends"],
)
def _window_kernel(
    # read
    logits,
    segments,
    starts,
    ends,
    # written
    losses_B,
    lse_B2,
    scale_B2,
    grad_T2,
    # sizes and strides
    tokens,
    rows,
    stride_t,
    stride_k,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ACC: tl.constexpr = grad_T2.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    offset, length = row_extent(segments, row, tokens)
    end = offset + length

    # The pair (start, end) is the fast axis of every tile, as it is in memory.
    side_2 = tl.arange(0, 2)
    label_2 = tl.where(side_2 == 0, tl.load(starts + row), tl.load(ends + row)).to(tl.int64)
    valid_2 = (label_2 >= 0) & (label_2 < length)
    start_scale, end_scale = row_scales(segments, starts, ends, rows, ACC, BLOCK_R)
    scale_2 = tl.where(valid_2, tl.where(side_2 == 0, start_scale, end_scale), 0.0)

    # The first block stays in registers: a window of up to BLOCK_L tokens is read once.
    token_L = tl.arange(0, BLOCK_L).to(tl.int64)
    read_L2 = logits + (offset + token_L)[:, None] * stride_t + side_2[None, :] * stride_k
    head_L2 = tl.load(
        read_L2, mask=(token_L < length)[:, None] & valid_2[None, :], other=-float("inf")
    ).to(ACC)
    peak_2 = tl.max(head_L2, 0)
    # exp(-inf - -inf) is NaN, so a column of nothing but -inf is shifted by 0 instead.
    shift_2 = tl.where(peak_2 == -float("inf"), 0.0, peak_2)
    total_2 = tl.sum(tl.exp(head_L2 - shift_2[None, :]), 0)
    for first in range(BLOCK_L, length, BLOCK_L):
        more_L2 = tl.load(
            read_L2 + first * stride_t,
            mask=(first + token_L < length)[:, None] & valid_2[None, :],
            other=-float("inf"),
        ).to(ACC)
        peak_2 = tl.maximum(peak_2, tl.max(more_L2, 0))
        next_2 = tl.where(peak_2 == -float("inf"), 0.0, peak_2)
        total_2 = total_2 * tl.exp(shift_2 - next_2) + tl.sum(tl.exp(more_L2 - next_2[None, :]), 0)
        shift_2 = next_2
    lse_2 = tl.log(tl.where(valid_2, total_2, 1.0)) + shift_2

    picked_2 = tl.load(
        logits + (offset + label_2) * stride_t + side_2 * stride_k, mask=valid_2, other=0.0
    ).to(ACC)
    loss_2 = tl.where(valid_2, scale_2 * (lse_2 - picked_2), 0.0)
    tl.store(losses_B + row, tl.sum(loss_2, 0))
    tl.store(lse_B2 + row * 2 + side_2, lse_2)
    tl.store(scale_B2 + row * 2 + side_2, scale_2)

    # d loss / d logit = scale * (softmax - onehot); exactly 0 on an ignored side.
    write_L2 = grad_T2 + (offset + token_L)[:, None] * 2 + side_2[None, :]
    inside_L2 = (token_L < length)[:, None] & (side_2 >= 0)[None, :]
    hit_L2 = (token_L[:, None] == label_2[None, :]).to(ACC)
    grad_L2 = scale_2[None, :] * (tl.exp(head_L2 - lse_2[None, :]) - hit_L2)
    tl.store(write_L2, tl.where(valid_2[None, :], grad_L2, 0.0), mask=inside_L2)
    for first in range(BLOCK_L, length, BLOCK_L):
        inside_L2 = (first + token_L < length)[:, None] & (side_2 >= 0)[None, :]
        more_L2 = tl.load(
            read_L2 + first * stride_t, mask=inside_L2 & valid_2[None, :], other=-float("inf")
        ).to(ACC)
        hit_L2 = ((first + token_L)[:, None] == label_2[None, :]).to(ACC)
        grad_L2 = scale_2[None, :] * (tl.exp(more_L2 - lse_2[None, :]) - hit_L2)
        tl.store(write_L2 + first * 2, tl.where(valid_2[None, :], grad_L2, 0.0), mask=inside_L2)

    # Tokens of no segment get their zero from the segment before them, so the gradient needs no
    # memset of its own; row 0 also owns what lies before the first segment.
    zero_L2 = tl.zeros([BLOCK_L, 2], ACC)
    if length > 0:
        after = gap_after(segments, rows, end, tokens, BLOCK_R)
        for first in range(end, after, BLOCK_L):
            gap_L2 = grad_T2 + (first + token_L)[:, None] * 2 + side_2[None, :]
            inside_L2 = (first + token_L < after)[:, None] & (side_2 >= 0)[None, :]
            tl.store(gap_L2, zero_L2, mask=inside_L2)
    if row == 0:
        before = gap_after(segments, rows, 0, tokens, BLOCK_R)
        for first in range(0, before, BLOCK_L):
            gap_L2 = grad_T2 + (first + token_L)[:, None] * 2 + side_2[None, :]
            inside_L2 = (first + token_L < before)[:, None] & (side_2 >= 0)[None, :]
            tl.store(gap_L2, zero_L2, mask=inside_L2)


def span_loss_forward(
    logits_T2: Tensor,
    segments_B2: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    block: int | None = None,
) -> tuple[Statistics, Tensor]:
    """Loss of every row and what its gradients need; two columns at once, one read of the logits.

    Args:
        logits_T2: floating [T, 2], any strides.
        segments_B2, starts_B, ends_B: integer, contiguous; see `reference_span_loss`.
        block: tokens held in registers, a power of two; by default from T / B.

    Returns:
        The rows' statistics and d loss / d logits_T2, all contiguous, float64 for float64 logits
        and float32 otherwise.
    """
    tokens, rows = logits_T2.shape[0], segments_B2.shape[0]
    like = {"dtype": wide_dtype(logits_T2), "device": logits_T2.device}
    if tokens == 0 or rows == 0:
        zero_B2 = torch.zeros((rows, 2), **like)
        return Statistics(zero_B2[:, 0], zero_B2, zero_B2), torch.zeros((tokens, 2), **like)
    statistics = Statistics(
        losses_B=torch.empty(rows, **like),
        lse_B2=torch.empty((rows, 2), **like),
        scale_B2=torch.empty((rows, 2), **like),
    )
    grad_T2 = torch.empty((tokens, 2), **like)
    # 512 covers the usual window of 384 tokens; a longer window loops, it is not refused.
    block = block or (512 if tokens <= 512 * rows else 1024)
    with on_device(logits_T2):
        _window_kernel[(rows,)](
            logits_T2,
            segments_B2,
            starts_B,
            ends_B,
            *statistics,
            grad_T2,
            tokens,
            rows,
            logits_T2.stride(0),
            logits_T2.stride(1),
            BLOCK_L=block,
            BLOCK_R=row_block(rows),
            num_warps=4 if block <= 512 else 8,
            enable_fp_fusion=True,
        )
    return statistics, grad_T2
