"""The loss of an extractive question-answering head, and what surrounds it. `kernels/README.md`
derives it.

    span_loss                 from given logits
    qa_head_loss              the linear head and its loss, hidden states read once
    reference_span_loss       the specification of both, in plain PyTorch
    reference_qa_head_loss
    grad_norm_and_finite      squared norm and finiteness of a flat gradient in one pass
    gather_windows            a packed batch out of windows that lie on the device
    warm_up                   compiles all of these for a training, before its first step

Importing this package imports torch and nothing else; Triton is first touched by the first call
that runs on a GPU.
"""

from span_kernels.gather import gather_windows
from span_kernels.ops import grad_norm_and_finite, qa_head_loss, span_loss
from span_kernels.reference import reference_qa_head_loss, reference_span_loss
from span_kernels.warm import warm_up

__all__ = [
    "gather_windows",
    "grad_norm_and_finite",
    "qa_head_loss",
    "reference_qa_head_loss",
    "reference_span_loss",
    "span_loss",
    "warm_up",
]
