"""Where encoders keep what others look for: their layers, their position embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from runner.errors import JobError

# As families call their tables of learned or fixed positions. What is relative between two tokens
# has no end, and is called otherwise.
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")


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


def recomputable_layers(model: Any) -> list[Any]:
    """The layers whose activations can be computed again in the backward pass.

    Raises:
        JobError: if the model has none.
    """
    found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        raise JobError(
            [
                f"train.gradient_checkpointing: not possible: {model.config.model_type} has no"
                " layers that transformers can compute again; set it to false, or take smaller"
                " train.micro_batch_size or data.max_length"
            ]
        )
    return found


def first_position(model: Any) -> int:
    """Position of a window's first token: RoBERTa and its kin count from behind the padding's; 0
    where no table is called position_embeddings."""
    tables = [m for name, m in model.named_modules() if name.endswith(_POSITIONS[0])]
    return _before(tables[0]) if tables else 0


def longest_input(model: Any) -> int | None:
    """Tokens of the longest window that the model has positions for; None where none is too
    long: positions relative to each other, as those of DeBERTa-v2, T5 and XLNet, are clipped."""
    sizes = [
        len(module.weight) - _before(module)
        for name, module in model.named_modules()
        if name.endswith(_POSITIONS) and hasattr(module, "weight")
    ]
    sizes += [len(rows) for name, rows in model.named_buffers() if name.endswith(_POSITIONS)]
    # Some tables have more rows than the model ever reads.
    declared = getattr(model.config, "max_position_embeddings", None)
    if sizes and isinstance(declared, int):
        sizes.append(declared)
    return min(sizes, default=_rotary_positions(model))


def _rotary_positions(model: Any) -> int | None:
    """Tokens up to which a model that turns queries and keys by their positions (ModernBERT, and
    decoders) was trained or stretched; None for others. Beyond them it computes, and answers
    badly."""
    declared = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(declared, int) or not any("rotary" in n for n, _ in model.named_modules()):
        return None
    found = getattr(model.config, "rope_parameters", None)
    table = found if isinstance(found, Mapping) else {}
    # One for all layers, or one for each kind of layer.
    parts = [table, *(part for part in table.values() if isinstance(part, Mapping))]
    stretched = [
        int(part["factor"] * (part.get("original_max_position_embeddings") or declared))
        for part in parts
        if isinstance(part.get("factor"), int | float)
    ]
    return max([declared, *stretched])


def token_rows(model: Any) -> int | None:
    """Rows of the table of token embeddings; None for a model without one, such as CANINE."""
    try:
        return len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):
        return None


def _before(table: Any) -> int:
    """Rows of a position table that no token of a window has."""
    offset = getattr(table, "offset", None)  # BART and its kin
    padding = getattr(table, "padding_idx", None)
    return offset if isinstance(offset, int) else 0 if padding is None else padding + 1
