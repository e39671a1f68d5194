"""Which implementation computes the training loss, why, and the proof of its first batch.

Legend: B windows, L padded length, T = B * L tokens, D hidden width, 2 = (start, end).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from span_kernels import (
    qa_head_loss,
    reference_qa_head_loss,
    reference_span_loss,
    span_loss,
)
from torch import Tensor, nn

from runner.errors import JobError, RunnerError
from runner.model.forward import SpanLogits

# Share of the largest gradient by which a kernel may differ from plain PyTorch in the same dtype.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass
class SpanLoss:
    """The span loss of the batch that the model has just run over.

    Attributes:
        path: "fused head" (hidden states to loss), "fused logits", or "reference" (plain PyTorch).
        reason: why this one, for the log and for provenance.
        head: the model's linear head, where it is fused.
    """

    path: str
    reason: str
    head: nn.Linear | None = None
    checked: bool = False

    def __post_init__(self) -> None:
        self._hidden_BLD: Tensor | None = None
        if self.head is not None:
            # What the head is given, after any dropout of the model's own.
            self.head.register_forward_pre_hook(self._remember)

    def _remember(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden_BLD = inputs[0]

    def __call__(self, logits: SpanLogits) -> Tensor:
        """Mean loss in nats over the batch's windows, a scalar on its device.

        Raises:
            RunnerError: if the kernel disagrees with plain PyTorch on the run's first batch.
        """
        batch = logits.batch
        labels = (batch.segments_B2, batch.starts_B, batch.ends_B)
        kernel: Any
        reference: Any
        inputs: tuple[Tensor, ...]
        if self.path == "reference":
            return reference_span_loss(logits.logits_T2, *labels)
        if self.head is None:
            inputs = (logits.logits_T2,)
            kernel, reference = span_loss, reference_span_loss
        else:
            if self._hidden_BLD is None:
                raise AssertionError("the head has seen no batch")
            inputs = (self._hidden_BLD.flatten(0, 1), self.head.weight, self.head.bias)
            kernel, reference = qa_head_loss, reference_qa_head_loss
            self._hidden_BLD = None
        if not self.checked:
            compare_with_reference(kernel, reference, inputs, labels)
            self.checked = True
        return kernel(*inputs, *labels)

    def described(self) -> str:
        """One line for the log."""
        return f"span loss: {self.path} ({self.reason})"


def choose_span_loss(wanted: str, model: Any, device: torch.device, zero_stage: int) -> SpanLoss:
    """Decide once for a run how its loss is computed.

    Args:
        wanted: the job's model.span_loss: "auto", "fused" or "reference".
        model: the transformers model, before DeepSpeed wraps it.
        device: where it is trained.
        zero_stage: ZeRO-3 shares out the head's weights, which the fused head reads whole.

    Raises:
        JobError: if "fused" is asked for on a GPU without Triton.
    """
    if wanted == "reference":
        return SpanLoss("reference", "as the job says")
    on_gpu = device.type == "cuda"
    if wanted == "auto" and not on_gpu:
        return SpanLoss("reference", "no GPU")
    if on_gpu and importlib.util.find_spec("triton") is None:
        if wanted == "fused":
            raise JobError(['model.span_loss: "fused" needs Triton on a GPU: pip install triton'])
        return SpanLoss("reference", "Triton is not installed")
    how = "Triton" if on_gpu else "closed form on the CPU"
    head = getattr(model, "qa_outputs", None)
    if not (isinstance(head, nn.Linear) and head.out_features == 2 and head.bias is not None):
        return SpanLoss(
            "fused logits", f"{how}; {model.config.model_type} has no single linear head"
        )
    if zero_stage == 3:
        return SpanLoss("fused logits", f"{how}; ZeRO-3 shares out the head's weights")
    return SpanLoss("fused head", how, head)


def compare_with_reference(
    kernel: Any, reference: Any, inputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]
) -> None:
    """Hold a kernel's loss and gradients against plain PyTorch's on one batch.

    Raises:
        RunnerError: naming what differs, by how much.
    """
    found = _with_gradients(kernel, inputs, labels)
    right = _with_gradients(reference, inputs, labels)
    tolerance = LOSS_TOLERANCE.get(inputs[0].dtype, 1e-4)
    names = (
        ("loss", "logits' gradient") if len(inputs) == 1 else ("loss", "hidden", "weight", "bias")
    )
    for name, mine, theirs in zip(names, found, right, strict=True):
        # The bias's gradient is exactly zero in theory, rounding noise in plain PyTorch.
        scale = right[-2 if name == "bias" else names.index(name)].abs().max().clamp(min=1e-6)
        apart = float((mine.float() - theirs.float()).abs().max() / scale)
        if not apart <= tolerance:
            raise RunnerError(
                f"the span-loss kernel disagrees with plain PyTorch on the first batch: {name} "
                f"differs by {apart:.1e} of the largest (allowed {tolerance:.0e}); set "
                'model.span_loss = "reference" and please report your GPU and versions'
            )


def _with_gradients(
    function: Any, inputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]
) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_(True) for tensor in inputs]
    with torch.enable_grad():
        loss = function(*leaves, *labels)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]
