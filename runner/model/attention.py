"""Attention over windows packed end to end, each token seeing the tokens of its own window alone.

Registered with transformers under PACKED_ATTENTION, so that a model's own layers run unchanged on a
batch [1, T]; no mask of the batch is ever made. On a GPU it is PyTorch's flash attention over the
windows' bounds, with dropout where the model has it; on a CPU each window by itself.

A layer may be local: its tokens see `reach` tokens to either side, the last one included.

Legend: T tokens of the batch, H heads, D width of a head, S windows (segments), L tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

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
# tests hold each of them, packed, against its windows one by one. Any other is compared first.
FAMILIES = (
    *("bert", "distilbert", "roberta", "electra", "xlm-roberta", "camembert"),
    *("albert", "ernie", "modernbert"),
)

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
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, D] three times, to [1, T, H, D].

    `packed` travels as a keyword argument of the model's forward pass. `sliding_window` counts the
    token itself, as all that transformers hands to flash attention does.
    """
    if packed is None or attention_mask is not None:
        raise AssertionError(f"{PACKED_ATTENTION} attention takes packed batches and no mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Of a squeeze the gradient is a view too; that of `x[0]` would be filled up and copied.
    parts_THD = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    reach = None if sliding_window is None else sliding_window - 1
    return attend(module, parts_THD, packed, dropout, scale, reach).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def attend(
    module: nn.Module,
    parts_THD: Sequence[Tensor],
    packed: Bounds,
    dropout: float,
    scale: float,
    reach: int | None = None,
) -> Tensor:
    """The attention of query, key and value, [T, H, D]; `module` has the dropout, whose rate is
    given."""
    query_THD, key_THD, value_THD = parts_THD
    if query_THD.device.type == "cpu":
        return _by_window(module, query_THD, key_THD, value_THD, packed.ends, scale, dropout, reach)
    return _flash(query_THD, key_THD, value_THD, packed, dropout, scale, reach)


def _flash(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    packed: Bounds,
    dropout: float,
    scale: float,
    reach: int | None = None,
) -> Tensor:
    bounds_S1, longest = packed.bounds_S1, packed.longest
    # The scale and the reach that it has by itself.
    if dropout == 0.0 and scale == query_THD.shape[-1] ** -0.5 and reach is None:
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
        window_size_left=reach,
        window_size_right=reach,
    )[0]


def _each_window(
    module: nn.Module,
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    ends: tuple[int, ...],
    scale: float,
    dropout: float,
    reach: int | None,
) -> Tensor:
    if dropout > 0.0 and (masks := _masks_of(module)) is not None:
        inputs = (query_THD, key_THD, value_THD, ends, scale, dropout, masks, reach)
        return _CpuAttention.apply(*inputs)  # type: ignore[return-value]
    parts = []
    for low, high in pairwise(ends):
        query, key, value = (
            x[low:high].transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD)
        )
        seen_LL = _seen(high - low, reach)
        out = scaled_dot_product_attention(query, key, value, seen_LL, dropout, scale=scale)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _seen(length: int, reach: int | None) -> Tensor | None:
    """Which token of a window sees which, bool [L, L]; None where all see all."""
    if reach is None or length <= reach + 1:
        return None
    places_L = torch.arange(length)
    return (places_L[:, None] - places_L).abs() <= reach


def _masks_of(module: nn.Module) -> DropoutMasks | None:
    """Where an attention's masks come from: the modules that it has for dropout, whatever their
    names, draw from one source. None: torch draws."""
    return next((m.masks for m in module.modules() if isinstance(m, CpuDropout)), None)


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
        reach: int | None,
    ) -> Tensor:
        out_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
        keep_factor = keep_scale(dropout)
        probabilities: list[Tensor] = []
        masks: list[Tensor] = []
        for low, high in pairwise(ends):
            query, key, value = (
                x[low:high].transpose(0, 1) for x in (query_THD, key_THD, value_THD)
            )
            scores_HLL = (query * scale) @ key.transpose(1, 2)
            if (seen_LL := _seen(high - low, reach)) is not None:
                scores_HLL.masked_fill_(~seen_LL, -torch.inf)
            weights_HLL = torch.softmax(scores_HLL, dim=-1)
            keep_HLL = dropout_masks.keep_mask(weights_HLL.shape, dropout)
            out = masked(weights_HLL, keep_HLL) @ value
            torch.mul(out.transpose(0, 1), keep_factor, out=out_THD[low:high])
            probabilities.append(weights_HLL)
            masks.append(torch.from_numpy(keep_HLL))
        # Saved as tensors are, the masks too: gradient checkpointing lets go of what is.
        ctx.save_for_backward(query_THD, key_THD, value_THD, out_THD, *probabilities, *masks)
        ctx.ends, ctx.scale, ctx.keep_factor = ends, scale, keep_factor
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_THD, key_THD, value_THD, out_THD, *kept = ctx.saved_tensors
        probabilities, masks = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        grad_THD = grads[0]
        spread_TH1 = (grad_THD * out_THD).sum(-1, keepdim=True)
        grad_THD = grad_THD * ctx.keep_factor
        found = [torch.empty_like(out_THD) for _ in range(3)]
        for (low, high), weights_HLL, mask_HLL in zip(
            pairwise(ctx.ends), probabilities, masks, strict=True
        ):
            keep_HLL = mask_HLL.numpy()
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
        return (*found, None, None, None, None, None)


def choose_packing(
    wanted: str,
    model: Any,
    device: torch.device,
    precision: str,
    longest: int,
    *,
    compare: Callable[[], str | None] | None = None,
    before: bool | None = None,
) -> tuple[Packing | None, str]:
    """Decide for a run, and make the model's attention the packed one where it is chosen.

    Args:
        wanted: the job's model.packing: "auto", "on" or "off".
        model: a transformers question-answering model, before DeepSpeed wraps it.
        device: where it runs.
        precision: "bf16", "fp16" or "fp32".
        longest: tokens of the longest window that it will read.
        compare: for a model of another family: says in what its packed windows are other than its
            windows one by one, None if in nothing; None pads those that are not known.
        before: how earlier starts of the run have decided; None for its first.

    Returns:
        How to pack, or None for padded batches; and the reason, for the log and for provenance.

    Raises:
        JobError: if "on" is asked for where it cannot be.
    """
    if wanted == "off":
        return None, "as the job says"
    if before is False:
        return None, "as the run began"
    kind, reason = model.config.model_type, "each window's attention by itself"
    if device.type == "cuda":
        reason = "flash attention over each window's own tokens"
    own = model.config._attn_implementation
    other = None if attend_packed(model) else f"{kind} takes no attention but its own"
    model.set_attn_implementation(own)
    known = _is_known(model.config)
    if before and not known:
        reason = "as the run began"
    elif other is None and not known:  # all ranks ask together, whatever each has for a device
        other = "nothing compares it" if compare is None else compare()
        other = other and f"{kind} is not among {', '.join(FAMILIES)}; {other}"
        reason += f"; {kind} was compared with its windows one by one"
    obstacle = _obstacle(model, device, precision) or other
    if obstacle is None:
        attend_packed(model)
        return packing_of(model, device, longest), reason
    if wanted == "on":
        raise JobError([f'model.packing: "on" is not possible: {obstacle}'])
    return None, obstacle


def attend_packed(model: Any) -> bool:
    """Make a model's attention the packed one; returns whether it lets us."""
    model.set_attn_implementation(PACKED_ATTENTION)
    return model.config._attn_implementation == PACKED_ATTENTION


def packing_of(model: Any, device: torch.device, longest: int) -> Packing:
    """How windows are packed for a model on a device."""
    return Packing(first_position(model), ROUND_TO if device.type == "cuda" else 1, longest)


def _is_known(config: Any) -> bool:
    return (
        config.model_type in FAMILIES
        and not getattr(config, "is_decoder", False)
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
    )


def _obstacle(model: Any, device: torch.device, precision: str) -> str | None:
    """What keeps any model of this kind from being packed on a device."""
    if device.type != "cuda":
        return None if device.type == "cpu" else f"no packed attention on {device.type}"
    if precision == "fp32":
        return "flash attention computes in bf16 or fp16, not fp32"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no flash attention (compute capability 8)"
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % 8 or width > 256:
        return f"flash attention needs heads of a multiple of 8 up to 256, not {width}"
    return None
