"""Triton: squared norm and finiteness of a flat gradient in one pass.

Importing this file imports Triton; `ops.py` does so at the first call on a GPU.

Shapes: N elements, P programs, E elements of one block.
"""

# Triton exists for Linux only, and its functions are not the Python that pyright takes them for.
# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from span_kernels.launch import on_device, power_of_two, wide_dtype

PROGRAMS = 528
"""One wave on an H200: at 64 registers a thread 4 programs of 8 warps fit each of its 132
multiprocessors. A constant, not the device's count, so that the order of the sum and with it the
bits do not depend on the GPU's size."""


@triton.jit(do_not_specialize=["size"])
def _partial_kernel(flat_N, sum_P, finite_P, size, BLOCK: tl.constexpr):
    ACC: tl.constexpr = sum_P.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    element_E = tl.arange(0, BLOCK).to(tl.int64)
    sum_E = tl.zeros([BLOCK], ACC)
    finite_E = tl.full([BLOCK], 1, tl.int32)
    # Whole blocks are read without a mask: behind one, where 16 does not divide the size, every
    # element would be a load of its own.
    for block in tl.range(program, size // BLOCK, programs, num_stages=3):
        x_E = tl.load(flat_N + block * BLOCK + element_E).to(ACC)
        sum_E += x_E * x_E
        # Not read off the sum: a finite gradient of 1e20 overflows it. False for NaN, too.
        finite_E &= (tl.abs(x_E) < float("inf")).to(tl.int32)
    # The last program, which has fewest whole blocks, reads what is left.
    element_E += tl.cast(size // BLOCK, tl.int64) * BLOCK
    left_E = (element_E < size) & (program == programs - 1)
    x_E = tl.load(flat_N + element_E, mask=left_E, other=0.0).to(ACC)
    sum_E += x_E * x_E
    finite_E &= (tl.abs(x_E) < float("inf")).to(tl.int32)
    tl.store(sum_P + program, tl.sum(sum_E, 0))
    tl.store(finite_P + program, tl.min(finite_E, 0))


@triton.jit(do_not_specialize=["programs"])
def _total_kernel(sum_P, finite_P, total, finite, programs, BLOCK: tl.constexpr):
    program_P = tl.arange(0, BLOCK)
    real_P = program_P < programs
    tl.store(total, tl.sum(tl.load(sum_P + program_P, mask=real_P, other=0.0), 0))
    tl.store(finite, tl.min(tl.load(finite_P + program_P, mask=real_P, other=1), 0) == 1)


def norm_and_finite(
    flat_N: Tensor, programs: int = PROGRAMS, block: int = 4096
) -> tuple[Tensor, Tensor]:
    """See `span_kernels.grad_norm_and_finite`; `programs` and `block` are for tests."""
    size = flat_N.numel()
    programs = max(min(programs, -(-size // block)), 1)
    sum_P = torch.empty(programs, dtype=wide_dtype(flat_N), device=flat_N.device)
    finite_P = torch.empty(programs, dtype=torch.int32, device=flat_N.device)
    total = torch.empty((), dtype=sum_P.dtype, device=flat_N.device)
    finite = torch.empty((), dtype=torch.bool, device=flat_N.device)
    with on_device(flat_N):
        _partial_kernel[(programs,)](
            flat_N,
            sum_P,
            finite_P,
            size,
            BLOCK=block,
            num_warps=8,
            enable_fp_fusion=True,
        )
        _total_kernel[(1,)](
            sum_P,
            finite_P,
            total,
            finite,
            programs,
            BLOCK=power_of_two(PROGRAMS),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return total, finite
