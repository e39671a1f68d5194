"""Batches out of windows that lie end to end on the device: one small table goes there, one kernel
gathers, nothing is read on the host.

Shapes: N tokens of all windows of a data set, B windows of the batch, T tokens of the batch.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from span_kernels.arguments import check_shape


def gather_windows(
    tokens_N: Tensor,
    types_N: Tensor,
    firsts_B: Tensor,
    bounds_B1: Tensor,
    total: int,
    *,
    first_position: int = 0,
    pad_id: int = 0,
) -> Tensor:
    """Token ids, segment ids and positions of a batch of windows packed end to end.

    Args:
        tokens_N, types_N: integer [N], token and segment ids of all windows.
        firsts_B: int64 [B], where each window of the batch begins in them.
        bounds_B1: int32 [B + 1], 0, then the end of each window in the batch.
        total: T, at least the last bound; what lies behind it gets `pad_id`, segment 0 and the
            first position.
        first_position: position of a window's first token.

    Returns:
        int32 [3, T] on the device of the tokens: token ids, segment ids, positions.

    Raises:
        ValueError: a shape does not fit.
    """
    check_shape("tokens_N", tokens_N, (None,))
    check_shape("types_N", types_N, (tokens_N.shape[0],))
    check_shape("bounds_B1", bounds_B1, (firsts_B.shape[0] + 1,))
    return _gather(tokens_N, types_N, firsts_B, bounds_B1, total, first_position, pad_id)


@custom_op("span_kernels::gather_windows", mutates_args=(), device_types="cpu")
def _gather(
    tokens_N: Tensor,
    types_N: Tensor,
    firsts_B: Tensor,
    bounds_B1: Tensor,
    total: int,
    first_position: int,
    pad_id: int,
) -> Tensor:
    out_3T = tokens_N.new_zeros((3, total), dtype=torch.int32)
    out_3T[0] = pad_id
    out_3T[2] = first_position
    bounds_B1 = bounds_B1.long()
    lengths_B, used = bounds_B1.diff(), int(bounds_B1[-1])
    place_T = torch.arange(used) - torch.repeat_interleave(bounds_B1[:-1], lengths_B)
    index_T = torch.repeat_interleave(firsts_B, lengths_B) + place_T
    out_3T[0, :used], out_3T[1, :used] = tokens_N[index_T].int(), types_N[index_T].int()
    out_3T[2, :used] += place_T.int()
    return out_3T


@_gather.register_kernel("cuda")
def _gather_triton(
    tokens_N: Tensor,
    types_N: Tensor,
    firsts_B: Tensor,
    bounds_B1: Tensor,
    total: int,
    first_position: int,
    pad_id: int,
) -> Tensor:
    from span_kernels.gather_kernel import gather

    return gather(tokens_N, types_N, firsts_B, bounds_B1, total, first_position, pad_id)


@_gather.register_fake
def _(tokens_N, types_N, firsts_B, bounds_B1, total, first_position, pad_id):
    return tokens_N.new_empty((3, total), dtype=torch.int32)
