"""Triton: the one pass over the hidden states, making the logits and pooling for dW as it goes.

dW_k needs sum_l softmax(z)_lk H_l, which is attention pooling with the query W_k. A flash-attention
style online softmax (Milakov and Gimelshein, arXiv:1805.02867) collects it from the same registers
that the logits were just computed from, so H is never read again.

Importing this file imports Triton; `ops.py` does so at the first call on a GPU.

Shapes: T tokens, B rows (segments), D hidden width, N tiles (work slots), G tokens that one lane
reads together, P lanes of a program, C columns of a chunk of D, 2 = (start, end).
"""

# Triton exists for Linux only, and its functions are not the Python that pyright takes them for.
# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from span_kernels.launch import HeadPlan, Tiles, on_device, row_block, wide_dtype
from span_kernels.rows import find_tile, row_extent

# Columns of hidden states that a thread holds at a time. Triton 3.6 needs more registers for the
# same tile than 3.7 and would spill up to 530 bytes a thread with 64 of them (tests/kernels/aot).
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
THREAD_COLUMNS = 64 if _TRITON >= (3, 7) else 32


@triton.jit
def _finite_or_zero(x):
    # exp(-inf - -inf) is NaN, so a maximum over nothing but -inf is replaced before it is used.
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _soften(logits_GP, live_GP, peak_P):
    """One step of the online softmax: the new maximum, the fading of old sums, the powers."""
    logits_GP = tl.where(live_GP, logits_GP, -float("inf"))
    next_P = tl.maximum(peak_P, tl.max(logits_GP, 0))
    shift_P = _finite_or_zero(next_P)
    return next_P, tl.exp(peak_P - shift_P), tl.exp(logits_GP - shift_P[None, :])


@triton.jit(
    do_not_specialize=["tokens", "rows"],
    do_not_specialize_on_alignment=["segments"],
)
def _pool_kernel(
    # read
    hidden,
    weight,
    bias,
    segments,
    # written
    logits_T2,
    owner_N,
    peak_N2,
    pooled_N2D,
    # sizes and strides
    tokens,
    rows,
    tile_tokens,
    stride_t,
    stride_d,
    stride_wk,
    stride_wd,
    stride_b,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ACC: tl.constexpr = logits_T2.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64)
    row, tile = find_tile(segments, rows, slot, tile_tokens, BLOCK_R)
    if row == rows:
        tl.store(owner_N + slot, -1)
        return
    tl.store(owner_N + slot, row)
    offset, length = row_extent(segments, row, tokens)
    first = offset + tile * tile_tokens
    end = tl.minimum(offset + length, first + tile_tokens)

    lane_P = tl.arange(0, LANES)
    group_G = tl.arange(0, GROUP)
    column_C = tl.arange(0, CHUNK)
    # D is cut into CHUNKS static pieces, one tuple entry each: 768 is 3 * 256 without a masked
    # column, where a power-of-two block would waste a quarter. All of them stay in registers.
    start_w = ()
    end_w = ()
    start_pool = ()
    end_pool = ()
    for c in tl.static_range(CHUNKS):
        column = c * CHUNK + column_C
        real_C = column < D
        w = weight + column * stride_wd
        start_w += (tl.load(w, mask=real_C, other=0.0).to(ACC),)
        end_w += (tl.load(w + stride_wk, mask=real_C, other=0.0).to(ACC),)
        start_pool += (tl.zeros([LANES, CHUNK], ACC),)
        end_pool += (tl.zeros([LANES, CHUNK], ACC),)
    start_bias = tl.load(bias).to(ACC)
    end_bias = tl.load(bias + stride_b).to(ACC)

    # Every lane keeps an online softmax of its own. With a lane to each warp the sums over G and
    # over D stay inside the warp, and the warps meet once, behind the loop.
    start_peak_P = tl.full([LANES], -float("inf"), ACC)
    end_peak_P = tl.full([LANES], -float("inf"), ACC)
    # num_stages makes the compiler copy the next tokens to shared memory while these are summed.
    for step in tl.range(0, tile_tokens, GROUP * LANES, num_stages=STAGES):
        token_GP = first + step + group_G[:, None] * LANES + lane_P[None, :]
        live_GP = token_GP < end
        h = hidden + token_GP[:, :, None] * stride_t
        start_GPC = tl.zeros([GROUP, LANES, CHUNK], ACC)
        end_GPC = tl.zeros([GROUP, LANES, CHUNK], ACC)
        chunks = ()
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + column_C
            h_GPC = tl.load(
                h + column[None, None, :] * stride_d,
                mask=live_GP[:, :, None] & (column < D)[None, None, :],
                other=0.0,
            ).to(ACC)
            chunks += (h_GPC,)
            start_GPC += h_GPC * start_w[c][None, None, :]
            end_GPC += h_GPC * end_w[c][None, None, :]
        start_GP = tl.sum(start_GPC, 2) + start_bias
        end_GP = tl.sum(end_GPC, 2) + end_bias
        tl.store(logits_T2 + token_GP * 2, start_GP, mask=live_GP)
        tl.store(logits_T2 + token_GP * 2 + 1, end_GP, mask=live_GP)

        start_peak_P, start_fade_P, start_GP = _soften(start_GP, live_GP, start_peak_P)
        end_peak_P, end_fade_P, end_GP = _soften(end_GP, live_GP, end_peak_P)
        start_new = ()
        end_new = ()
        for c in tl.static_range(CHUNKS):
            start_sum_PC = tl.sum(start_GP[:, :, None] * chunks[c], 0)
            end_sum_PC = tl.sum(end_GP[:, :, None] * chunks[c], 0)
            start_new += (start_pool[c] * start_fade_P[:, None] + start_sum_PC,)
            end_new += (end_pool[c] * end_fade_P[:, None] + end_sum_PC,)
        start_pool = start_new
        end_pool = end_new

    start_peak = tl.max(start_peak_P, 0)
    end_peak = tl.max(end_peak_P, 0)
    tl.store(peak_N2 + slot * 2, start_peak)
    tl.store(peak_N2 + slot * 2 + 1, end_peak)
    start_fade_P = tl.exp(start_peak_P - _finite_or_zero(start_peak))
    end_fade_P = tl.exp(end_peak_P - _finite_or_zero(end_peak))
    pooled = pooled_N2D + slot * 2 * D
    for c in tl.static_range(CHUNKS):
        column = c * CHUNK + column_C
        start_C = tl.sum(start_pool[c] * start_fade_P[:, None], 0)
        end_C = tl.sum(end_pool[c] * end_fade_P[:, None], 0)
        tl.store(pooled + column, start_C, mask=column < D)
        tl.store(pooled + D + column, end_C, mask=column < D)


def pool(
    hidden_TD: Tensor, weight_2D: Tensor, bias_2: Tensor, segments_B2: Tensor, plan: HeadPlan
) -> tuple[Tensor, Tiles]:
    """Logits of every token of a segment, and the softmax-pooled hidden state of every tile.

    Args:
        hidden_TD, weight_2D, bias_2: floating, any strides; T > 0 and B > 0.
        segments_B2: integer, contiguous.
        plan: how the work is cut; see `head_plan`.

    Returns:
        logits_T2 (undefined for tokens of no segment) and the tiles' pooled hidden states.
    """
    tokens, width = hidden_TD.shape
    rows = segments_B2.shape[0]
    # Disjoint segments fill at most T // tile whole tiles, and each ends with at most one more.
    slots = tokens // plan.tile + rows
    like = {"dtype": wide_dtype(hidden_TD), "device": hidden_TD.device}
    logits_T2 = torch.empty((tokens, 2), **like)
    tiles = Tiles(
        owner_N=torch.empty(slots, dtype=torch.int32, device=hidden_TD.device),
        peak_N2=torch.empty((slots, 2), **like),
        pooled_N2D=torch.empty((slots, 2, width), **like),
    )
    with on_device(hidden_TD):
        _pool_kernel[(slots,)](
            hidden_TD,
            weight_2D,
            bias_2,
            segments_B2,
            logits_T2,
            *tiles,
            tokens,
            rows,
            plan.tile,
            *hidden_TD.stride(),
            *weight_2D.stride(),
            bias_2.stride(0),
            D=width,
            GROUP=plan.group,
            LANES=plan.lanes,
            CHUNK=plan.chunk,
            CHUNKS=-(-width // plan.chunk),
            STAGES=plan.stages,
            BLOCK_R=row_block(rows),
            num_warps=plan.warps,
            enable_fp_fusion=True,
        )
    return logits_T2, tiles
