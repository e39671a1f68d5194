"""Self-attention whose three projections are one product: a third of the launches, fuller matrices.

The weights stay three parameters under their names, in memory and in every file; they are laid end
to end in each pass, which costs as little as reading them.

Legend: T tokens of a packed batch, H heads, D width of a head, 3 = (query, key, value), M width of
the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runner.data.collate import Bounds
from runner.errors import JobError
from runner.model.attention import FAMILIES, attend
from runner.model.structure import encoder_layers

# What families call the three.
_NAMES = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


class FusedSelfAttention(nn.Module):
    """Takes the place of a layer's self-attention, with the same submodules, for packed batches."""

    def __init__(self, attention: nn.Module, names: tuple[str, ...], heads: int) -> None:
        """
        Args:
            attention: the module that is replaced, of BERT's kind or of DistilBERT's.
            names: of its three projections.
            heads: of the model.
        """
        super().__init__()
        for name, child in attention.named_children():
            self.register_module(name, child)
        self.names, self.heads = names, heads
        self.train(attention.training)

    def forward(
        self, hidden_states: Tensor, *_: Any, packed: Bounds | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        """[1, T, M] to the same, as the replaced module is called."""
        if packed is None:
            raise AssertionError("fused projections are for packed batches")
        parts: list[Any] = [self.get_submodule(name) for name in self.names]
        weight_3MM = torch.cat([part.weight for part in parts])
        bias_3M = torch.cat([part.bias for part in parts])
        joined = nn.functional.linear(hidden_states.squeeze(0), weight_3MM, bias_3M)
        joined_T3HD = joined.view(len(joined), 3, self.heads, -1)
        drop: Any = self.get_submodule("dropout")
        out_THD = attend(
            self,
            joined_T3HD.unbind(1),
            packed,
            drop.p if self.training else 0.0,
            joined_T3HD.shape[-1] ** -0.5,
        )
        out = out_THD.flatten(1).unsqueeze(0)
        # DistilBERT's has the product that follows, too.
        return (self.get_submodule("out_lin")(out) if hasattr(self, "out_lin") else out), None


def choose_projections(
    wanted: str, model: Any, device: torch.device, *, packed: bool, zero_stage: int
) -> tuple[bool, str]:
    """Decide for a run, and fuse the model's projections where it is chosen.

    Args:
        wanted: the job's model.fused_qkv: "auto", "on" or "off".
        model: a transformers question-answering model, before DeepSpeed wraps it.
        device: where it runs.
        packed: whether batches are.
        zero_stage: ZeRO-3 shares out the weights.

    Returns:
        Whether they are fused; and the reason, for the log and for provenance.

    Raises:
        JobError: if "on" is asked for where it cannot be.
    """
    if wanted == "off":
        return False, "as the job says"
    found = [list(_attentions(layer)) for layer in encoder_layers(model)]
    obstacle = None
    if not packed:
        obstacle = "batches are padded"
    elif zero_stage == 3:
        obstacle = "ZeRO-3 shares out the weights"
    elif model.config.model_type not in FAMILIES:  # whose attention does nothing else besides
        obstacle = f"{model.config.model_type} is not among {', '.join(FAMILIES)}"
    elif not found or not all(len(each) == 1 for each in found):
        obstacle = f"{model.config.model_type} has no stack of layers with three projections each"
    if wanted == "on" and obstacle:
        raise JobError([f'model.fused_qkv: "on" is not possible: {obstacle}'])
    if obstacle or (wanted == "auto" and device.type == "cpu"):
        return False, obstacle or "a CPU launches nothing"
    for ((parent, name, attention, names),) in found:
        heads = model.config.num_attention_heads
        setattr(parent, name, FusedSelfAttention(attention, names, heads))
    return True, "query, key and value by one product"


def _attentions(layer: nn.Module) -> Any:
    """Each self-attention of a layer: its parent, its name there, itself, its projections."""
    for parent in layer.modules():
        for name, child in parent.named_children():
            for names in _NAMES:
                parts = [getattr(child, each, None) for each in names]
                if all(isinstance(part, nn.Linear) and part.bias is not None for part in parts):
                    yield parent, name, child, names
