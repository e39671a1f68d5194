"""Where encoders keep what others look for: their layers, their position embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn


def layer_stack(model: Any) -> Any | None:
    """The module whose `layer` lists an encoder's layers, from the bottom; None where it is built
    in another way."""
    base = model.base_model
    stack = getattr(base, "encoder", None) or getattr(base, "transformer", None)
    return stack if isinstance(getattr(stack, "layer", None), nn.ModuleList) else None


def encoder_layers(model: Any) -> list[nn.Module]:
    """The layers of an encoder's stack; none where it has no such stack."""
    stack = layer_stack(model)
    return [] if stack is None else list(stack.layer)


def position_tables(model: Any) -> list[nn.Embedding]:
    """Every table of position embeddings."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]


def first_position(table: nn.Embedding) -> int:
    """Row of a window's first token: RoBERTa and its kin count from behind the padding's."""
    return 0 if table.padding_idx is None else table.padding_idx + 1
