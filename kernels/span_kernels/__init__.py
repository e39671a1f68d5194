"""The loss of an extractive question-answering head. `kernels/README.md` derives it.

Importing this package imports torch and nothing else; Triton is first touched by the first call
that runs on a GPU.
"""

from span_kernels.reference import reference_qa_head_loss, reference_span_loss

__all__ = ["reference_qa_head_loss", "reference_span_loss"]
