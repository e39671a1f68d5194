"""Chooses how a run computes, each choice with its reason: packed or padded batches, whose step,
compiled or not, frozen layers' outputs cached or not.

Legend: L tokens of a window, T tokens of windows end to end, R rows of a batch, S windows of one.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from runner.data.collate import Bounds, Packing, collate
from runner.data.loader import DeviceBatch, pack, pad, to_device
from runner.data.window_cache import cache_root
from runner.data.windows import Windows
from runner.distributed.flat_zero import choose_optimiser
from runner.errors import JobError
from runner.export.verify import beyond_rounding
from runner.job.schema import Model, Zero
from runner.model.attention import attend_packed, choose_packing, packing_of
from runner.model.dropout import DropoutMasks, install_dropout
from runner.model.forward import span_logits
from runner.model.frozen import FrozenLayers, check_cacheable
from runner.model.qkv import choose_projections
from runner.model.structure import encoder_layers, layer_stack, recomputable_layers
from runner.train.state import random_state, restore_random_state
from runner.utils.text import first_line

# Where compiling pays: a first start costs a minute or less, later ones find it done, and some
# tenths of each step are saved. Until that is measured on a GPU: in jobs of more arithmetic than a
# minute's at 200 TFLOP/s.
_WORTH_COMPILING = 1.2e16

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ExecutionPlan:
    """How a run computes.

    Attributes:
        packing: how batches are packed; None pads them.
        dropout: where dropout masks come from.
        optimiser: "flat" or "deepspeed".
        frozen: the frozen layers whose outputs are cached; None computes them in every pass.
        choices: name to (choice, reason), for the log and for provenance.
        recomputed: layers whose activations the backward pass computes again, which changes no bit:
            two starts of a run may differ in it.
    """

    packing: Packing | None
    dropout: DropoutMasks
    optimiser: str
    frozen: FrozenLayers | None
    choices: dict[str, tuple[str, str]]
    recomputed: int = 0

    def lines(self) -> list[str]:
        """One line a choice."""
        found = [f"{name}: {choice} ({reason})" for name, (choice, reason) in self.choices.items()]
        if self.recomputed:
            found.append(
                f"activations: of {self.recomputed} layers computed twice (as the job says)"
            )
        return found

    def choice(self) -> str:
        """All choices in a few words, without the reasons."""
        return ", ".join(f"{name}: {choice}" for name, (choice, _) in self.choices.items())

    def record(self) -> dict[str, dict[str, str]]:
        """The same for provenance.json."""
        return {
            name: {"choice": choice, "reason": reason}
            for name, (choice, reason) in self.choices.items()
        }


def was_packed(choices: str) -> bool:
    """Whether batches are packed by `ExecutionPlan.choice`, as checkpoints note it."""
    return "batches: packed" in choices.split(", ")


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
    recompute: bool = False,
    compare: Callable[[], str | None] | None = None,
    packed_before: bool | None = None,
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
        recompute: the job's train.gradient_checkpointing.
        compare, packed_before: as `choose_packing` takes them.

    Raises:
        JobError: if the job asks for what cannot be.
    """
    choices: dict[str, tuple[str, str]] = {}
    where = (model, device, precision, longest)
    packing, reason = choose_packing(section.packing, *where, compare=compare, before=packed_before)
    choices["batches"] = ("padded" if packing is None else "packed", reason)
    fused, reason = choose_projections(
        section.fused_qkv, model, device, packed=packing is not None, zero_stage=zero.stage
    )
    if fused or device.type != "cpu":
        choices["projections"] = ("fused" if fused else "separate", reason)
    optimiser, reason = choose_optimiser(zero.optimizer, zero.stage, zero.deepspeed)
    choices["step"] = (optimiser, reason)
    compiled, reason = _choose_compile(
        section.compile, model, device, tokens, zero.stage, recompute=recompute
    )
    choices["compile"] = ("whole encoder" if compiled else "off", reason)
    frozen, described = _choose_frozen(model, zero.stage, keep=section.cache_frozen)
    if described is not None:
        choices["frozen"] = described
    if device.type == "cpu":
        install_dropout(model, dropout)
        choices["dropout"] = ("16 bits an element", "torch's own takes a fifth of a step on a CPU")
    recomputed = recompute_activations(model, dropout) if recompute else 0
    if compiled:
        compile_encoder(model)
    return ExecutionPlan(packing, dropout, optimiser, frozen, choices, recomputed)


def _choose_frozen(
    model: Any, zero_stage: int, *, keep: bool
) -> tuple[FrozenLayers | None, tuple[str, str] | None]:
    """The frozen layers whose outputs are kept; and what is said of those that there are."""
    frozen = FrozenLayers.of(model)
    if keep:
        frozen = check_cacheable(frozen, zero_stage)
        reason = "as the job says; dropout in them is off"
        return frozen, (f"embeddings and {frozen.depth} layers once", reason)
    if frozen is None:
        return None, None
    return None, (f"embeddings and {frozen.depth} layers forward only", "nothing to train")


def recompute_activations(model: Any, dropout: DropoutMasks) -> int:
    """Let a model's layers keep their inputs alone while training, and compute all else again, with
    the same dropout, in the backward pass; returns how many do.

    Raises:
        JobError: if there are none that can.
    """
    layers = recomputable_layers(model)
    for layer in layers:
        # transformers' own enabling would let gradients flow through frozen layers too.
        layer._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, context_fn=dropout.repeated
        )
        layer.gradient_checkpointing = True
    return len(layers)


def _choose_compile(
    wanted: str,
    model: Any,
    device: torch.device,
    tokens: int,
    zero_stage: int,
    *,
    recompute: bool,
) -> tuple[bool, str]:
    obstacle = None
    if recompute:  # the compiler would decide by itself what is computed twice
        obstacle = "train.gradient_checkpointing computes layers twice"
    elif zero_stage == 3:  # whose hooks break a program into dozens
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


@torch.no_grad()
def compare_packing(
    model: Any,
    windows: Windows,
    device: torch.device,
    precision: str,
    *,
    pad_id: int,
    segment_ids: bool,
) -> str | None:
    """Say in what a model's packed windows are other than its windows one by one; None if in
    nothing.

    A copy of the model reads four windows, the shortest and the longest among them:

    - Packed, none may change by a bit with what stands in the others. That such a change is seen is
      tried with bounds that let windows see each other.
    - On a CPU, a window that is packed alone has to have the bits that it has by the model's own
      attention.
    - Among others, where the sums of products may be taken in another order, and on a GPU, it has
      to have the same logits up to rounding, by the rule of the export's check.

    Args:
        model: on the CPU, in float32; it stays as it is, and random numbers as they were.
        windows: of the job.
        device, precision: what it is to run on and in.
        pad_id: token that fills up.
        segment_ids: whether the model takes token_type_ids.
    """
    order = np.argsort(windows.lengths_N, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, 4).astype(int)][[1, 3, 0, 2]]
    generators = random_state(device)
    try:
        probe = copy.deepcopy(model).eval().to(device)
        # In float32 and as it is computed; then the same model, packed.
        alone = [pad(collate(windows, rows[n : n + 1]), pad_id) for n in range(len(rows))]
        read = partial(_logits, probe, device, segment_ids)
        exact = fresh = [read(batch)[0] for batch in alone]
        if precision != "fp32":
            probe.to(_PRECISIONS[precision])
            fresh = [read(batch)[0] for batch in alone]
        attend_packed(probe)
        packing = packing_of(model, device, int(windows.lengths_N.max()))
        lone = [pack(collate(windows, rows[n : n + 1]), pad_id, packing) for n in range(len(rows))]
        row = pack(collate(windows, rows), pad_id, packing)
        if any(_changed_by_others(read, row)):
            return "its windows see each other when they are packed"
        if not all(_changed_by_others(read, _joined(row))):
            return "windows that see each other could not be told from others by its logits"
        if device.type == "cpu" and not all(
            torch.equal(read(batch)[0], logits) for batch, logits in zip(lone, fresh, strict=True)
        ):
            return "a packed window has other logits, on a CPU, than by its own attention"
        share, excess = beyond_rounding(read(row), fresh, exact)
        return excess and f"packed windows have logits {share:.1e} of the largest from one by one"
    except MemoryError:
        raise
    except Exception as error:  # whatever its layers make of a batch that they were not written for
        return f"packed, it fails with {type(error).__name__}: {first_line(error)}"
    finally:
        restore_random_state(generators, device)


def _logits(
    probe: Any, device: torch.device, segment_ids: bool, batch: DeviceBatch
) -> list[Tensor]:
    """Of each window of a batch, float32 [L, 2] on the CPU."""
    found_T2 = span_logits(probe, to_device(batch, device), segment_ids=segment_ids).float().cpu()
    return [found_T2[first : first + length] for first, length in batch.segments_B2.tolist()]


def _changed_by_others(
    read: Callable[[DeviceBatch], list[Tensor]], batch: DeviceBatch
) -> list[bool]:
    """Whether logits of each window of a packed batch change with its neighbours' tokens."""
    before, found = read(batch), []
    for mine in (0, 1):
        ids_RL = batch.ids_RL.clone()
        for first, length in batch.segments_B2.tolist()[1 - mine :: 2]:
            ids_RL[0, first : first + length] = batch.ids_RL[0, 0]
        after = read(dataclasses.replace(batch, ids_RL=ids_RL))
        found += [not torch.equal(before[n], after[n]) for n in range(mine, len(before), 2)]
    return found


def _joined(batch: DeviceBatch) -> DeviceBatch:
    """A packed batch of four windows whose first two, and last two, see each other."""
    if batch.bounds is None:
        raise AssertionError("it is packed")
    bounds_S1 = batch.bounds.bounds_S1[[0, 2, *range(4, len(batch.bounds.bounds_S1))]]
    ends = tuple(bounds_S1.tolist()) if batch.bounds.ends else ()
    return dataclasses.replace(batch, bounds=Bounds(bounds_S1, int(bounds_S1.diff().max()), ends))
