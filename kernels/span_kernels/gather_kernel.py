"""Triton: a packed batch gathered from windows that lie end to end on the device.

Importing this file imports Triton; `gather.py` does so at the first call on a GPU.

Shapes: N tokens of all windows, B windows of the batch, R windows of a block of them, T tokens of
the batch, E tokens of one program.
"""

# Triton exists for Linux only, and its functions are not the Python that pyright takes them for.
# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from span_kernels.launch import on_device


@triton.jit(
    do_not_specialize=["windows", "total", "first_position", "pad_id"],
    do_not_specialize_on_alignment=["firsts_B", "bounds_B1"],
)
def _gather_kernel(
    tokens_N,
    types_N,
    firsts_B,
    bounds_B1,
    out_3T,
    windows,
    total,
    first_position,
    pad_id,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token_E = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # A token's window is the number of windows that have ended at or before it.
    owner_E = tl.zeros([BLOCK], tl.int32)
    for row in range(0, windows, BLOCK_R):
        row_R = row + tl.arange(0, BLOCK_R)
        end_R = tl.load(bounds_B1 + row_R + 1, mask=row_R < windows, other=2147483647)
        owner_E += tl.sum((end_R[None, :] <= token_E[:, None]).to(tl.int32), 1)
    real_E = owner_E < windows
    inside_E = token_E < total
    place_E = token_E - tl.load(bounds_B1 + owner_E, mask=real_E, other=0)
    source_E = tl.load(firsts_B + owner_E, mask=real_E, other=0) + place_E
    token_id_E = tl.load(tokens_N + source_E, mask=real_E & inside_E, other=0).to(tl.int32)
    type_E = tl.load(types_N + source_E, mask=real_E & inside_E, other=0).to(tl.int32)
    tl.store(out_3T + token_E, tl.where(real_E, token_id_E, pad_id), mask=inside_E)
    tl.store(out_3T + total + token_E, tl.where(real_E, type_E, 0), mask=inside_E)
    position_E = first_position + tl.where(real_E, place_E, 0)
    tl.store(out_3T + 2 * total + token_E, position_E, mask=inside_E)


def gather(
    tokens_N: Tensor,
    types_N: Tensor,
    firsts_B: Tensor,
    bounds_B1: Tensor,
    total: int,
    first_position: int,
    pad_id: int,
    block: int = 128,
) -> Tensor:
    """See `span_kernels.gather_windows`; `block` is for tests."""
    out_3T = torch.empty((3, total), dtype=torch.int32, device=tokens_N.device)
    if total == 0:
        return out_3T
    windows = firsts_B.shape[0]
    with on_device(tokens_N):
        _gather_kernel[(-(-total // block),)](
            tokens_N,
            types_N,
            firsts_B,
            bounds_B1,
            out_3T,
            windows,
            total,
            first_position,
            pad_id,
            BLOCK=block,
            BLOCK_R=64,
            num_warps=4,
        )
    return out_3T
