"""The specification of the extractive question-answering loss, in plain PyTorch.

For window b with tokens l = 0 .. n_b - 1, and k = 0 (start) or 1 (end) with label y_bk:

    nll_bk = log(sum_l exp z_blk) - z_b,y_bk,k       if 0 <= y_bk < n_b, otherwise ignored
    loss   = (mean of nll_b0 over its valid rows + mean of nll_b1 over its valid rows) / 2

which is the loss of Devlin et al., "BERT", arXiv:1810.04805, section 4.2, with the halving of
`BertForQuestionAnswering` in transformers. It differs from transformers in three places, all on
purpose: the softmax runs over the window's own tokens and never over padding, statistics are kept
in float32 whatever the input, and a label outside the window is ignored on either side
(transformers moves a negative one to position 0).

Shapes: T tokens of the whole batch, B windows (segments), D hidden width, 2 = (start, end).
"""

import torch
from torch import Tensor

from span_kernels.segments import owners, valid_labels


def reference_span_loss(
    logits_T2: Tensor, segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor
) -> Tensor:
    """Mean negative log-likelihood of the labelled spans, differentiable by autograd.

    Args:
        logits_T2: floating [T, 2], column 0 for starts and 1 for ends; any strides.
        segments_B2: integer [B, 2], rows of (offset, length) into the T tokens. Segments are
            disjoint, in any order, with gaps allowed; an empty one is ignored. A padded batch of
            B windows of L tokens is offset = b * L.
        starts_B, ends_B: integer [B], counted from the segment's first token. A label outside
            [0, length) ignores that side of that row.

    Returns:
        Scalar, in nats: float64 for float64 logits, otherwise float32. A side without a valid row
        counts 0; without any valid row the loss is 0 and every gradient exactly 0. Logits of no
        segment, and those of an ignored side, never matter, whatever they hold.
        A label on a logit of -inf costs +inf. On a GPU the sums run in no fixed order unless
        `torch.use_deterministic_algorithms` asks for one.
    """
    tokens, rows = logits_T2.shape[0], segments_B2.shape[0]
    owner_T = owners(segments_B2, tokens)
    labels_B2, valid_B2 = valid_labels(segments_B2, starts_B, ends_B)
    nobody_12 = torch.zeros_like(valid_B2[:1]) if rows else valid_B2.new_zeros(1, 2)
    live_T2 = torch.cat((valid_B2, nobody_12)).index_select(0, owner_T)

    # Dead logits are replaced before any arithmetic, so a NaN among them reaches no gradient.
    scores_T2 = torch.where(live_T2, _wide(logits_T2), 0.0)
    index_T2 = owner_T[:, None].expand(-1, 2)
    floor_C2 = scores_T2.new_full((rows + 1, 2), -torch.inf)
    peak_C2 = floor_C2.scatter_reduce(
        0, index_T2, scores_T2.detach().masked_fill(~live_T2, -torch.inf), "amax"
    )
    # exp(-inf - -inf) would be NaN: a column of nothing but -inf is shifted by 0 instead.
    peak_C2 = torch.where(peak_C2 == -torch.inf, 0.0, peak_C2)
    powers_T2 = torch.where(live_T2, (scores_T2 - peak_C2.index_select(0, owner_T)).exp(), 0.0)
    total_C2 = torch.zeros_like(floor_C2).index_add(0, owner_T, powers_T2)
    # The logarithm of an ignored row's empty sum would turn its zero gradient into a NaN.
    lse_B2 = torch.where(valid_B2, total_C2[:rows], 1.0).log() + peak_C2[:rows]

    # Row T is a spare zero: ignored rows read it, and it exists even when T is 0.
    padded_S2 = torch.cat((scores_T2, scores_T2.new_zeros(1, 2)))
    position_B2 = torch.where(valid_B2, segments_B2[:, :1].long() + labels_B2, tokens)
    flat_B2 = position_B2 * 2 + torch.arange(2, device=position_B2.device)
    chosen_B2 = padded_S2.reshape(-1).index_select(0, flat_B2.reshape(-1)).view(rows, 2)
    nll_B2 = torch.where(valid_B2, lse_B2 - chosen_B2, 0.0)
    return (nll_B2.sum(0) / valid_B2.sum(0).clamp(min=1)).sum() / 2


def reference_qa_head_loss(
    hidden_TD: Tensor,
    weight_2D: Tensor,
    bias_2: Tensor,
    segments_B2: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
) -> Tensor:
    """`reference_span_loss` of the linear head `hidden_TD @ weight_2D.T + bias_2`.

    Args:
        hidden_TD: floating [T, D], the encoder's output; any strides.
        weight_2D, bias_2: floating [2, D] and [2], as in `torch.nn.Linear(D, 2)`.
        segments_B2, starts_B, ends_B: as in `reference_span_loss`.

    Returns:
        Scalar, in nats; the product and the softmax are taken in float32 (in float64 for float64
        hidden states), so a bfloat16 head does not round its logits. Hidden states of no segment,
        and those of a row ignored on both sides, never matter, whatever they hold.
    """
    tokens = hidden_TD.shape[0]
    _, valid_B2 = valid_labels(segments_B2, starts_B, ends_B)
    used_C = torch.cat((valid_B2.any(1), valid_B2.new_zeros(1)))
    used_T1 = used_C.index_select(0, owners(segments_B2, tokens))[:, None]
    # 0 * NaN is NaN: without this a NaN in padding would reach the weight's gradient.
    hidden_TD = torch.where(used_T1, _wide(hidden_TD), 0.0)
    logits_T2 = torch.nn.functional.linear(
        hidden_TD, weight_2D.to(hidden_TD.dtype), bias_2.to(hidden_TD.dtype)
    )
    return reference_span_loss(logits_T2, segments_B2, starts_B, ends_B)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
