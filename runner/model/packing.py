"""Decides whether a model's batches are packed end to end or padded in buckets, and says why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from runner.data.collate import Packing
from runner.errors import JobError
from runner.model.attention import NAME

# Families whose layers look at other tokens through attention alone, and take positions as given;
# tests hold each of them, packed, against its windows one by one.
FAMILIES = ("bert", "distilbert", "roberta", "electra", "xlm-roberta", "camembert")
ROUND_TO = 512  # tokens of a packed batch on a GPU come in steps of this: few shapes to compile


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
    model.set_attn_implementation(NAME)
    table = _position_table(model)
    first = 0 if table.padding_idx is None else table.padding_idx + 1
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


def _position_table(model: Any) -> nn.Embedding:
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    return tables[0]
