"""Chooses how a run computes, each choice with its reason: packed or padded batches, whose step,
compiled or not, frozen layers' outputs cached or not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from runner.data.collate import Packing
from runner.data.window_cache import cache_root
from runner.distributed.flat_zero import choose_optimiser
from runner.errors import JobError
from runner.job.schema import Model, Zero
from runner.model.attention import choose_packing
from runner.model.dropout import DropoutMasks, install_dropout
from runner.model.frozen import FrozenLayers, check_cacheable
from runner.model.qkv import choose_projections
from runner.model.structure import encoder_layers, layer_stack

# Where compiling pays: a first start costs a minute or less, later ones find it done, and some
# tenths of each step are saved. Until that is measured on a GPU: in jobs of more arithmetic than a
# minute's at 200 TFLOP/s.
_WORTH_COMPILING = 1.2e16


@dataclass(frozen=True)
class ExecutionPlan:
    """How a run computes.

    Attributes:
        packing: how batches are packed; None pads them.
        dropout: where dropout masks come from.
        optimiser: "flat" or "deepspeed".
        frozen: the frozen layers whose outputs are cached; None computes them in every pass.
        choices: name to (choice, reason), for the log and for provenance.
    """

    packing: Packing | None
    dropout: DropoutMasks
    optimiser: str
    frozen: FrozenLayers | None
    choices: dict[str, tuple[str, str]]

    def lines(self) -> list[str]:
        """One line a choice."""
        return [f"{name}: {choice} ({reason})" for name, (choice, reason) in self.choices.items()]

    def choice(self) -> str:
        """All choices in a few words, without the reasons."""
        return ", ".join(f"{name}: {choice}" for name, (choice, _) in self.choices.items())

    def record(self) -> dict[str, dict[str, str]]:
        """The same for provenance.json."""
        return {
            name: {"choice": choice, "reason": reason}
            for name, (choice, reason) in self.choices.items()
        }


def choose_plan(
    section: Model,
    zero: Zero,
    model: Any,
    device: torch.device,
    precision: str,
    *,
    longest: int,
    tokens: int,
    dropout: DropoutMasks,
) -> ExecutionPlan:
    """Decide once for a run, and prepare the model for it.

    Parts of it are frozen before, and DeepSpeed wraps it afterwards.

    Args:
        section, zero: the job's [model] and [zero].
        model: a transformers question-answering model.
        device: where it runs.
        precision: "bf16", "fp16" or "fp32".
        longest: tokens of the longest window that it will read.
        tokens: tokens that it will be trained on, all epochs together.
        dropout: where dropout masks come from.

    Raises:
        JobError: if the job asks for what cannot be.
    """
    choices: dict[str, tuple[str, str]] = {}
    packing, reason = choose_packing(section.packing, model, device, precision, longest)
    choices["batches"] = ("padded" if packing is None else "packed", reason)
    fused, reason = choose_projections(
        section.fused_qkv, model, device, packed=packing is not None, zero_stage=zero.stage
    )
    if fused or device.type != "cpu":
        choices["projections"] = ("fused" if fused else "separate", reason)
    optimiser, reason = choose_optimiser(zero.optimizer, zero.stage, zero.deepspeed)
    choices["step"] = (optimiser, reason)
    compiled, reason = _choose_compile(section.compile, model, device, tokens, zero.stage)
    choices["compile"] = ("whole encoder" if compiled else "off", reason)
    frozen = FrozenLayers.of(model)
    if section.cache_frozen:
        frozen = check_cacheable(frozen, zero.stage)
        reason = "as the job says; dropout in them is off"
        choices["frozen"] = (f"embeddings and {frozen.depth} layers once", reason)
    elif frozen is not None:
        choices["frozen"] = (
            f"embeddings and {frozen.depth} layers forward only",
            "nothing to train",
        )
        frozen = None
    if device.type == "cpu":
        install_dropout(model, dropout)
        choices["dropout"] = ("16 bits an element", "torch's own takes a fifth of a step on a CPU")
    if compiled:
        compile_encoder(model)
    return ExecutionPlan(packing, dropout, optimiser, frozen, choices)


def _choose_compile(
    wanted: str, model: Any, device: torch.device, tokens: int, zero_stage: int
) -> tuple[bool, str]:
    obstacle = None
    if zero_stage == 3:  # whose hooks break a program into dozens
        obstacle = "ZeRO-3 gathers weights between operations"
    elif layer_stack(model) is None:
        obstacle = f"{model.config.model_type} has no stack of layers"
    if wanted == "on" and obstacle:
        raise JobError([f'model.compile: "on" is not possible: {obstacle}'])
    if wanted != "auto":
        return wanted == "on", "as the job says"
    if obstacle:
        return False, obstacle
    if device.type != "cuda":
        return False, "no GPU"
    layers = encoder_layers(model)
    weights = sum(p.numel() for layer in layers for p in layer.parameters())
    work = 6 * weights * tokens
    if work < _WORTH_COMPILING:
        return False, f"{work:.0e} operations are too few to pay for a compiler's start"
    return True, f"{work:.0e} operations"


def compile_encoder(model: Any, backend: str = "inductor") -> None:
    """Compile an encoder's layers as one program for training, whatever a batch's size. Scoring is
    computed as without: another program would take as long to make, and few passes need it.

    What the compiler makes is kept in spantune's cache folder for later runs.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
    stack: Any = layer_stack(model)
    plain = stack.forward
    compiled = torch.compile(plain, dynamic=True, backend=backend)

    def forward(*inputs: Any, **options: Any) -> Any:
        return (compiled if stack.training else plain)(*inputs, **options)

    stack.forward = forward
