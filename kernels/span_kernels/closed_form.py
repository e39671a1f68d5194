"""The same loss with its gradient written out, in plain PyTorch: what a CPU runs.

Autograd would record about twenty operations for the reference; the closed form computes the loss
and d loss / d logits together, as the Triton kernels do, and serves every device without Triton.

Shapes: T tokens, B rows (segments), D hidden width, 2 = (start, end).
"""

import torch
from torch import Tensor

from span_kernels.launch import wide_dtype
from span_kernels.segments import owners, valid_labels


def span_loss(
    logits_T2: Tensor, segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d logits_T2, both in the dtype of the statistics.

    d loss / d z_blk = (softmax(z_bk)_l - [l is the label]) / (2 * valid rows of side k).
    """
    tokens, rows = logits_T2.shape[0], segments_B2.shape[0]
    logits_T2 = logits_T2.to(wide_dtype(logits_T2))
    labels_B2, valid_B2 = valid_labels(segments_B2, starts_B, ends_B)
    scale_B2 = valid_B2 / (2.0 * valid_B2.sum(0).clamp(min=1)).to(logits_T2.dtype)
    # Row `rows` is nobody's: tokens between segments belong to it and weigh nothing.
    scale_C2 = torch.cat((scale_B2, scale_B2.new_zeros(1, 2)))
    owner_T = owners(segments_B2, tokens)
    scale_T2 = scale_C2.index_select(0, owner_T)
    owner_T2 = owner_T[:, None].expand(-1, 2)

    logits_T2 = logits_T2.masked_fill(scale_T2 == 0, -torch.inf)
    peak_C2 = torch.full_like(scale_C2, -torch.inf).scatter_reduce(0, owner_T2, logits_T2, "amax")
    peak_C2 = peak_C2.masked_fill(peak_C2 == -torch.inf, 0.0)
    power_T2 = (logits_T2 - peak_C2.index_select(0, owner_T)).exp()
    total_C2 = torch.zeros_like(scale_C2).index_add(0, owner_T, power_T2)

    # One spare token takes what ignored rows would read and write.
    label_token_B2 = (segments_B2[:, :1] + labels_B2).masked_fill(~valid_B2, tokens)
    spare_12 = logits_T2.new_zeros(1, 2)
    picked_B2 = torch.cat((logits_T2, spare_12)).gather(0, label_token_B2)
    lse_B2 = total_C2[:rows].masked_fill(~valid_B2, 1.0).log() + peak_C2[:rows]
    loss = (scale_B2 * (lse_B2 - picked_B2)).sum()

    share_T2 = power_T2 / total_C2.masked_fill(scale_C2 == 0, 1.0).index_select(0, owner_T)
    grad_S2 = torch.cat((share_T2 * scale_T2, spare_12))
    grad_S2 = grad_S2.scatter_add(0, label_token_B2, -scale_B2)
    return loss, grad_S2[:tokens].contiguous()


def qa_head_loss(
    hidden_TD: Tensor,
    weight_2D: Tensor,
    bias_2: Tensor,
    segments_B2: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d loss / d logits_T2 and d loss / d weight_2D, all in the dtype of the statistics."""
    dtype = wide_dtype(hidden_TD)
    _, valid_B2 = valid_labels(segments_B2, starts_B, ends_B)
    used_C = torch.cat((valid_B2.any(1), valid_B2.new_zeros(1)))
    used_T1 = used_C.index_select(0, owners(segments_B2, hidden_TD.shape[0]))[:, None]
    # 0 * NaN is NaN, so hidden states that nothing depends on must not enter a product.
    wide_TD = hidden_TD.to(dtype).masked_fill(~used_T1, 0.0)
    logits_T2 = torch.nn.functional.linear(wide_TD, weight_2D.to(dtype), bias_2.to(dtype))
    loss, grad_T2 = span_loss(logits_T2, segments_B2, starts_B, ends_B)
    return loss, grad_T2, grad_T2.T @ wide_TD


def qa_head_grad(
    grad_output: Tensor, grad_T2: Tensor, grad_2D: Tensor, weight_2D: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """d loss / d hidden_TD of the given dtype and d loss / d weight_2D, times `grad_output`."""
    hidden_grad_TD = (grad_T2 * grad_output) @ weight_2D.to(grad_T2.dtype)
    return hidden_grad_TD.to(dtype), (grad_2D * grad_output).to(weight_2D.dtype, copy=True)


def norm_and_finite(flat_N: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norm in the dtype of the statistics, and whether every element is finite."""
    dtype = wide_dtype(flat_N)
    # vector_norm adds one by one, which costs 1e-3 over ten million numbers; rows of 512 do not.
    whole = flat_N.numel() // 512 * 512
    norms = torch.linalg.vector_norm(flat_N[:whole].view(-1, 512), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat_N[whole:], dtype=dtype)
    # Smallest and largest, both NaN if any element is: fifteen times as fast as the largest size.
    # The spare zero keeps them defined for an empty gradient.
    low, high = torch.aminmax(torch.cat((flat_N[whole:], flat_N.new_zeros(1))))
    finite = low.isfinite() & high.isfinite()
    if whole:
        low, high = torch.aminmax(flat_N[:whole])
        finite &= low.isfinite() & high.isfinite()
    return norms.square().sum() + rest.square(), finite
