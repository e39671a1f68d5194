"""Every kernel that a training may launch, compiled before it is needed. Needs torch alone."""

from importlib.util import find_spec

import torch
from torch import Tensor

from span_kernels.gather import gather_windows
from span_kernels.launch import MAX_ROW_BLOCK, MIN_ROW_BLOCK
from span_kernels.ops import grad_norm_and_finite, qa_head_loss, span_loss


def warm_up(
    device: torch.device, dtype: torch.dtype, *, rows: int, longest: int, width: int | None = None
) -> None:
    """Compile all that training launches on this GPU, so that no step waits for a compiler.

    Call it once on every rank before the first step; nobody's numbers change. Some seconds where
    Triton's cache on disk is empty, else tenths of one. On a CPU, and without Triton, nothing is
    done. What a batch may vary from step to step, its rows, its tokens and where its table lies,
    makes no other kernel; what is asked for here does.

    Args:
        device: of the model.
        dtype: of hidden states, of the head's weight and bias, of the logits where there is no
            fused head, and of the flat gradient, which may be float32 as well.
        rows: the most windows of a batch (a micro-batch of one rank). Fewer need nothing more.
        longest: the most tokens of a window.
        width: of the hidden states, for `qa_head_loss`; None if the loss begins with logits.
    """
    if device.type == "cuda" and find_spec("triton") is not None:
        launch_all(device, dtype, rows, longest, width)


def launch_all(
    device: torch.device, dtype: torch.dtype, rows: int, longest: int, width: int | None
) -> None:
    """Launch each kernel once in every form, on as few numbers as make it take that form."""

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    with torch.inference_mode(False), torch.enable_grad():  # a dry run may ask for neither
        block = MIN_ROW_BLOCK // 2
        while block == MIN_ROW_BLOCK // 2 or block < min(rows, MAX_ROW_BLOCK):
            count = min(block + 1, rows)  # the fewest rows of the next power of two
            table_B2, label_B = zeros(count, 2, dtype=torch.int64), zeros(count, dtype=torch.int64)
            if width is not None:
                hidden_TD, weight_2D = (zeros(n, width).requires_grad_() for n in (count, 2))
                loss = qa_head_loss(hidden_TD, weight_2D, zeros(2), table_B2, label_B, label_B)
                torch.autograd.grad(loss, (hidden_TD, weight_2D))
            for tokens in {count, count * min(longest, 513)}:  # `loss_kernel` has two blocks
                logits_T2 = zeros(tokens, 2, dtype=torch.float32 if width else dtype)
                span_loss(logits_T2, table_B2, label_B, label_B)
            block *= 2
        for kind in dict.fromkeys((dtype, torch.float32)):  # several passes are added up in float32
            grad_norm_and_finite(zeros(1, dtype=kind))
        types_N, bounds_B1 = zeros(1, dtype=torch.uint8), zeros(2, dtype=torch.int32)
        firsts_B = zeros(1, dtype=torch.int64)
        gather_windows(zeros(1, dtype=torch.int32), types_N, firsts_B, bounds_B1, 1)
