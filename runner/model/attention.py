"""Attention over windows packed end to end, each token seeing the tokens of its own window alone.

Registered with transformers under PACKED_ATTENTION, so that a model's own layers run unchanged on a
batch [1, T]; no mask is ever made. On a GPU it is PyTorch's flash attention over the windows'
bounds, with dropout where the model has it; on a CPU each window by itself.

Legend: T tokens of the batch, H heads, D width of a head, S windows (segments), L tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from runner.data.collate import Bounds, Packing
from runner.errors import JobError
from runner.model.dropout import CpuDropout, DropoutMasks, keep_scale, masked
from runner.model.structure import first_position

PACKED_ATTENTION = "spantune_packed"

# Families whose layers look at other tokens through attention alone, and take positions as given;
# tests hold each of them, packed, against its windows one by one.
FAMILIES = ("bert", "distilbert", "roberta", "electra", "xlm-roberta", "camembert")

ROUND_TO = 128  # tokens of a packed batch on a GPU come in steps of this, as matrices are tiled


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    packed: Bounds | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, D] three times, to [1, T, H, D].

    `packed` travels as a keyword argument of the model's forward pass.
    """
    if packed is None or attention_mask is not None:
        raise AssertionError(f"{PACKED_ATTENTION} attention takes packed batches and no mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Of a squeeze the gradient is a view too; that of `x[0]` would be filled up and copied.
    parts_THD = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    return attend(module, parts_THD, packed, dropout, scale).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def attend(
    module: nn.Module, parts_THD: Sequence[Tensor], packed: Bounds, dropout: float, scale: float
) -> Tensor:
    """The attention of query, key and value, [T, H, D]; `module` has the dropout, whose rate is
    given."""
    query_THD, key_THD, value_THD = parts_THD
    if query_THD.device.type == "cpu":
        return _by_window(module, query_THD, key_THD, value_THD, packed.ends, scale, dropout)
    return _flash(query_THD, key_THD, value_THD, packed, dropout, scale)


def _flash(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    packed: Bounds,
    dropout: float,
    scale: float,
) -> Tensor:
    bounds_S1, longest = packed.bounds_S1, packed.longest
    if dropout == 0.0 and scale == query_THD.shape[-1] ** -0.5:  # the scale it has by itself
        found: Any = varlen_attn(
            query_THD, key_THD, value_THD, bounds_S1, bounds_S1, longest, longest
        )
        return found
    # The public function has no dropout; what it calls does.
    return torch.ops.aten._flash_attention_forward(
        query_THD,
        key_THD,
        value_THD,
        bounds_S1,
        bounds_S1,
        longest,
        longest,
        dropout,
        False,  # causal
        False,  # return the mask
        scale=scale,
    )[0]


def _each_window(
    module: nn.Module,
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    ends: tuple[int, ...],
    scale: float,
    dropout: float,
) -> Tensor:
    if dropout > 0.0 and isinstance(drop := module.get_submodule("dropout"), CpuDropout):
        inputs = (query_THD, key_THD, value_THD, ends, scale, dropout, drop.masks)
        return _CpuAttention.apply(*inputs)  # type: ignore[return-value]
    parts = []
    for low, high in pairwise(ends):
        query, key, value = (
            x[low:high].transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD)
        )
        out = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


# Not for the compiler: the windows' lengths would make another program of every batch.
_by_window: Any = torch.compiler.disable(_each_window)


class _CpuAttention(torch.autograd.Function):
    """Softmax attention with dropout of its weights, window by window, so that a window's scores
    stay in the core's cache from one pass over them to the next.

    The gradient of the scores is P (M dP - D), with M the scaled mask and D the row sums of dO O
    (Dao et al., arXiv:2205.14135, appendix B.4).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        ends: tuple[int, ...],
        scale: float,
        dropout: float,
        dropout_masks: DropoutMasks,
    ) -> Tensor:
        out_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
        keep_factor = keep_scale(dropout)
        probabilities: list[Tensor] = []
        masks: list[np.ndarray] = []
        for low, high in pairwise(ends):
            query, key, value = (
                x[low:high].transpose(0, 1) for x in (query_THD, key_THD, value_THD)
            )
            weights_HLL = torch.softmax((query * scale) @ key.transpose(1, 2), dim=-1)
            keep_HLL = dropout_masks.keep_mask(weights_HLL.shape, dropout)
            out = masked(weights_HLL, keep_HLL) @ value
            torch.mul(out.transpose(0, 1), keep_factor, out=out_THD[low:high])
            probabilities.append(weights_HLL)
            masks.append(keep_HLL)
        ctx.save_for_backward(query_THD, key_THD, value_THD, out_THD, *probabilities)
        ctx.masks, ctx.ends, ctx.scale, ctx.keep_factor = masks, ends, scale, keep_factor
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_THD, key_THD, value_THD, out_THD, *probabilities = ctx.saved_tensors
        grad_THD = grads[0]
        spread_TH1 = (grad_THD * out_THD).sum(-1, keepdim=True)
        grad_THD = grad_THD * ctx.keep_factor
        found = [torch.empty_like(out_THD) for _ in range(3)]
        for (low, high), weights_HLL, keep_HLL in zip(
            pairwise(ctx.ends), probabilities, ctx.masks, strict=True
        ):
            query, key, value, grad, spread = (
                x[low:high].transpose(0, 1)
                for x in (query_THD, key_THD, value_THD, grad_THD, spread_TH1)
            )
            value_grad = masked(weights_HLL, keep_HLL).transpose(1, 2) @ grad
            scores_HLL = masked(grad @ value.transpose(1, 2), keep_HLL)
            scores_HLL.sub_(spread).mul_(weights_HLL)
            products = (scores_HLL @ key, scores_HLL.transpose(1, 2) @ query, value_grad)
            for place, product, factor in zip(
                found, products, (ctx.scale, ctx.scale, 1.0), strict=True
            ):
                torch.mul(product.transpose(0, 1), factor, out=place[low:high])
        return (*found, None, None, None, None)


def choose_packing(
    wanted: str, model: Any, device: torch.device, precision: str, longest: int
) -> tuple[Packing | None, str]:
    """Decide for a run, and make the model's attention the packed one where it is chosen.

    Args:
        wanted: the job's model.packing: "auto", "on" or "off".
        model: a transformers question-answering model, before DeepSpeed wraps it.
        device: where it runs.
        precision: "bf16", "fp16" or "fp32".
        longest: tokens of the longest window that it will read.

    Returns:
        How to pack, or None for padded batches; and the reason, for the log and for provenance.

    Raises:
        JobError: if "on" is asked for where it cannot be.
    """
    if wanted == "off":
        return None, "as the job says"
    obstacle = _obstacle(model, device, precision)
    if obstacle is not None:
        if wanted == "on":
            raise JobError([f'model.packing: "on" is not possible: {obstacle}'])
        return None, obstacle
    model.set_attn_implementation(PACKED_ATTENTION)
    first = first_position(model)
    if device.type == "cuda":
        return Packing(first, ROUND_TO, longest), "flash attention over each window's own tokens"
    return Packing(first, 1, longest), "each window's attention by itself"


def _obstacle(model: Any, device: torch.device, precision: str) -> str | None:
    config = model.config
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not among {', '.join(FAMILIES)}"
    if getattr(config, "is_decoder", False):
        return "the model is a decoder"
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"positions are {config.position_embedding_type}"
    if device.type != "cuda":
        return None if device.type == "cpu" else f"no packed attention on {device.type}"
    if precision == "fp32":
        return "flash attention computes in bf16 or fp16, not fp32"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no flash attention (compute capability 8)"
    width = config.hidden_size // config.num_attention_heads
    if width % 8 or width > 256:
        return f"flash attention needs heads of a multiple of 8 up to 256, not {width}"
    return None
