"""What `python -m span_kernels.bench` compares: batches, rivals and the bytes they must move.

Everything here runs on any device, so that the tests can hold the rivals against each other on a
CPU; only the clock in `bench.py` needs a GPU.

Shapes: T tokens, B windows, L tokens of the longest window, D hidden width, 2 = (start, end).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from span_kernels.ops import grad_norm_and_finite, qa_head_loss, span_loss

Contestant = Callable[[], object]
"""Runs forward and backward once on inputs it holds, and returns (loss, gradients)."""


class Case(NamedTuple):
    """One batch: `rows` windows of at most `length` tokens; packed ones hold 176 on average."""

    name: str
    rows: int
    length: int
    width: int
    packed: bool
    dtype: torch.dtype = torch.bfloat16


CASES = (
    Case("base padded", 32, 384, 768, packed=False),
    Case("base packed", 32, 384, 768, packed=True),
    Case("large padded", 256, 384, 1024, packed=False),
    Case("large packed", 256, 384, 1024, packed=True),
)

BERT_BASE_PARAMETERS = 108_893_186
"""Of `BertForQuestionAnswering` at base size: the length of the flat gradient."""


class Inputs(NamedTuple):
    hidden_TD: Tensor
    weight_2D: Tensor
    bias_2: Tensor
    logits_T2: Tensor
    segments_B2: Tensor
    starts_B: Tensor
    ends_B: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.segments_B2, self.starts_B, self.ends_B


def make_inputs(case: Case, device: str) -> Inputs:
    """Random inputs, the same for every device and run."""
    generator = torch.Generator().manual_seed(0)
    length_B = torch.full((case.rows,), case.length)
    if case.packed:
        # SQuAD's windows: 176 of 384 tokens on average, few full ones (performance notes, 2.3).
        spread_B = torch.randn(case.rows, generator=generator) * case.length / 6
        length_B = (spread_B + case.length * 176 / 384).round().long().clamp(1, case.length)
    offset_B = length_B.cumsum(0) - length_B
    tokens = int(length_B.sum())

    def labels() -> Tensor:
        return (torch.rand(case.rows, generator=generator) * length_B).long().to(device)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=generator) * scale
        return x.to(device, case.dtype).requires_grad_()

    return Inputs(
        normal(tokens, case.width),
        normal(2, case.width, scale=case.width**-0.5),
        normal(2),
        normal(tokens, 2),
        torch.stack((offset_B, length_B), dim=1).to(device),
        labels(),
        labels(),
    )


def head_bytes(inputs: Inputs) -> int:
    """The least that the head can move: hidden states read once, their gradient written once."""
    return 2 * inputs.hidden_TD.numel() * inputs.hidden_TD.element_size()


def logits_bytes(inputs: Inputs) -> int:
    """The least that the loss from given logits can move."""
    return 2 * inputs.logits_T2.numel() * inputs.logits_T2.element_size()


def head_contestants(case: Case, inputs: Inputs) -> dict[str, Contestant]:
    """The head with its loss: eager as the model classes write it, the same compiled, fused."""
    leaves = (inputs.hidden_TD, inputs.weight_2D, inputs.bias_2)
    to_loss = _padded_loss(case, inputs)

    def eager(hidden_TD: Tensor, weight_2D: Tensor, bias_2: Tensor) -> Tensor:
        return to_loss(linear(hidden_TD, weight_2D, bias_2))

    def fused(hidden_TD: Tensor, weight_2D: Tensor, bias_2: Tensor) -> Tensor:
        return qa_head_loss(hidden_TD, weight_2D, bias_2, *inputs.rows)

    return _rivals(eager, fused, leaves)


def logits_contestants(case: Case, inputs: Inputs) -> dict[str, Contestant]:
    """The loss from given logits: eager, compiled, fused."""

    def fused(logits_T2: Tensor) -> Tensor:
        return span_loss(logits_T2, *inputs.rows)

    return _rivals(_padded_loss(case, inputs), fused, (inputs.logits_T2,))


def norm_contestants(flat: Tensor) -> dict[str, Contestant]:
    """Squared norm and finiteness of a flat gradient: eager, compiled, fused."""

    def eager(flat: Tensor) -> tuple[Tensor, Tensor]:
        return flat.float().square().sum(), flat.isfinite().all()

    compiled = torch.compile(eager, dynamic=False)
    return {
        "eager": lambda: eager(flat),
        "compile": lambda: compiled(flat),
        "fused": lambda: grad_norm_and_finite(flat),
    }


def _rivals(
    eager: Callable[..., Tensor], fused: Callable[..., Tensor], leaves: tuple[Tensor, ...]
) -> dict[str, Contestant]:
    def training_step(function: Callable[..., Tensor]) -> Contestant:
        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = function(*leaves)
            return loss.detach(), torch.autograd.grad(loss, leaves)

        return run

    compiled = torch.compile(eager, dynamic=False)
    return {name: training_step(f) for name, f in zip(NAMES, (eager, compiled, fused), strict=True)}


NAMES = ("eager", "compile", "fused")


def _padded_loss(case: Case, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """The loss of transformers' question-answering classes, operation by operation.

    Packed logits are first spread to [B, L] through an index made beforehand, with -inf behind
    every window: what one writes today to keep the encoder free of padding.
    """
    offset_B, length_B = inputs.segments_B2.unbind(1)
    place_L = torch.arange(case.length, device=offset_B.device)
    index_BL = (offset_B[:, None] + place_L).clamp(max=inputs.logits_T2.shape[0] - 1)
    real_BL = place_L < length_B[:, None]

    def loss(logits_T2: Tensor) -> Tensor:
        if case.packed:
            spread_BL2 = logits_T2.index_select(0, index_BL.view(-1)).view(*index_BL.shape, 2)
            logits_BL2 = torch.where(real_BL[:, :, None], spread_BL2, -torch.inf)
        else:
            logits_BL2 = logits_T2.view(case.rows, case.length, 2)
        start_BL1, end_BL1 = logits_BL2.split(1, dim=-1)
        start_BL = start_BL1.squeeze(-1).contiguous()
        end_BL = end_BL1.squeeze(-1).contiguous()
        starts_B = inputs.starts_B.clamp(0, case.length)
        ends_B = inputs.ends_B.clamp(0, case.length)
        start_loss = cross_entropy(start_BL, starts_B, ignore_index=case.length)
        end_loss = cross_entropy(end_BL, ends_B, ignore_index=case.length)
        return (start_loss + end_loss) / 2

    return loss
