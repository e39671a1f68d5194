"""The public functions, and their registration as PyTorch operators.

Every operator has a CPU implementation (`closed_form.py`), a CUDA one (Triton, imported when first
called), shapes for tracing and a gradient; autograd, torch.compile and opcheck see opaque operators
without side effects. Nothing here reads a tensor's values on the host. The gradients themselves
are not differentiable again.

Shapes: T tokens of the whole batch, B windows (segments), D hidden width, 2 = (start, end).
"""

import torch
from torch import Tensor
from torch.library import custom_op

from span_kernels import closed_form
from span_kernels.arguments import check_floating, check_rows, check_shape
from span_kernels.launch import MAX_WIDTH, head_plan, wide_dtype


def span_loss(logits_T2: Tensor, segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labelled spans, from given logits.

    The same function as `reference_span_loss`, whose docstring is the specification. On a GPU two
    launches forward and one backward, deterministic; the start and the end column together.

    Args:
        logits_T2: floating [T, 2], any strides.
        segments_B2: integer [B, 2], rows of (offset, length), disjoint.
        starts_B, ends_B: integer [B], counted from the segment's first token; outside
            [0, length) that side of that row is ignored.

    Returns:
        Scalar in nats, float64 for float64 logits and float32 otherwise.

    Raises:
        ValueError, TypeError: a shape or a dtype does not fit.
    """
    check_shape("logits_T2", logits_T2, (None, 2))
    check_floating(logits_T2=logits_T2)
    check_rows(segments_B2, starts_B, ends_B)
    return _span_loss(logits_T2, segments_B2, starts_B, ends_B)[0]


def qa_head_loss(
    hidden_TD: Tensor,
    weight_2D: Tensor,
    bias_2: Tensor,
    segments_B2: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
) -> Tensor:
    """`span_loss` of the linear head `hidden_TD @ weight_2D.T + bias_2`, fused with it.

    The same function as `reference_qa_head_loss`. The hidden states are read once; logits never
    leave float32; the gradient of the bias is exactly zero. On a GPU three launches forward and
    one backward (plus the zeros of the bias), deterministic.

    Args:
        hidden_TD: floating [T, D], any strides; fastest with the D columns adjacent.
        weight_2D, bias_2: floating [2, D] and [2], as in `torch.nn.Linear(D, 2)`.
        segments_B2, starts_B, ends_B: as in `span_loss`.

    Returns:
        Scalar in nats, float64 for float64 hidden states and float32 otherwise.

    Raises:
        ValueError, TypeError: a shape or a dtype does not fit.
    """
    check_shape("hidden_TD", hidden_TD, (None, None))
    check_shape("weight_2D", weight_2D, (2, hidden_TD.shape[1]))
    check_shape("bias_2", bias_2, (2,))
    check_floating(hidden_TD=hidden_TD, weight_2D=weight_2D, bias_2=bias_2)
    check_rows(segments_B2, starts_B, ends_B)
    return _qa_head_loss(hidden_TD, weight_2D, bias_2, segments_B2, starts_B, ends_B)[0]


def grad_norm_and_finite(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Squared 2-norm of a flat gradient and whether all of it is finite, in one read of it.

    Args:
        flat: floating [N], contiguous; N may be 0.

    Returns:
        The squared norm (float64 for float64, otherwise float32; inf where it overflows, nan or
        inf where an element is not finite) and a bool, both scalars on flat's device. The sum runs
        in a fixed order: the same gradient gives the same bits.

    Raises:
        ValueError: flat is not one contiguous dimension. TypeError: flat is not floating.
    """
    check_shape("flat", flat, (None,))
    check_floating(flat=flat)
    if not flat.is_contiguous():
        raise ValueError("flat: found a strided view, need a contiguous gradient")
    return _norm_and_finite(flat)


@custom_op("span_kernels::span_loss", mutates_args=(), device_types="cpu")
def _span_loss(
    logits_T2: Tensor, segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor
) -> tuple[Tensor, Tensor]:
    return closed_form.span_loss(logits_T2, segments_B2, starts_B, ends_B)


@_span_loss.register_kernel("cuda")
def _span_loss_triton(
    logits_T2: Tensor, segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor
) -> tuple[Tensor, Tensor]:
    from span_kernels.loss_kernel import span_loss_forward

    statistics, grad_T2 = span_loss_forward(
        logits_T2, segments_B2.contiguous(), starts_B.contiguous(), ends_B.contiguous()
    )
    return statistics.losses_B.sum(), grad_T2


@_span_loss.register_fake
def _(logits_T2, segments_B2, starts_B, ends_B):
    dtype = wide_dtype(logits_T2)
    return logits_T2.new_empty((), dtype=dtype), logits_T2.new_empty(
        (logits_T2.shape[0], 2), dtype=dtype
    )


def _span_loss_setup(ctx, inputs, output):
    # Without this a zero gradient of T rows would be made for grad_T2, which nobody asks for.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _span_loss_backward(ctx, grad_loss, _grad_of_grad_T2):
    if grad_loss is None:
        return None, None, None, None
    return _scaled(ctx.saved_tensors[0], grad_loss, ctx.dtype), None, None, None


_span_loss.register_autograd(_span_loss_backward, setup_context=_span_loss_setup)


@custom_op("span_kernels::qa_head_loss", mutates_args=(), device_types="cpu")
def _qa_head_loss(
    hidden_TD: Tensor,
    weight_2D: Tensor,
    bias_2: Tensor,
    segments_B2: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return closed_form.qa_head_loss(hidden_TD, weight_2D, bias_2, segments_B2, starts_B, ends_B)


@_qa_head_loss.register_kernel("cuda")
def _qa_head_loss_triton(
    hidden_TD: Tensor,
    weight_2D: Tensor,
    bias_2: Tensor,
    segments_B2: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from span_kernels.grad_kernels import weight_grad
    from span_kernels.loss_kernel import span_loss_forward
    from span_kernels.pool_kernel import THREAD_COLUMNS, pool

    tokens, width = hidden_TD.shape
    rows = (segments_B2.contiguous(), starts_B.contiguous(), ends_B.contiguous())
    if tokens == 0 or rows[0].shape[0] == 0 or width == 0 or width > MAX_WIDTH:
        return closed_form.qa_head_loss(hidden_TD, weight_2D, bias_2, *rows)
    plan = head_plan(tokens, width, hidden_TD.dtype, THREAD_COLUMNS)
    logits_T2, tiles = pool(hidden_TD, weight_2D, bias_2, rows[0], plan)
    statistics, grad_T2 = span_loss_forward(logits_T2, *rows)
    loss, grad_2D = weight_grad(hidden_TD, *rows, tiles, statistics)
    return loss, grad_T2, grad_2D


@_qa_head_loss.register_fake
def _(hidden_TD, weight_2D, bias_2, segments_B2, starts_B, ends_B):
    tokens, width = hidden_TD.shape
    shapes = ((), (tokens, 2), (2, width))
    return tuple(hidden_TD.new_empty(shape, dtype=wide_dtype(hidden_TD)) for shape in shapes)


def _qa_head_loss_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    hidden_TD, weight_2D, bias_2 = inputs[:3]
    # The hidden states are not kept: dW is ready, and dH does not depend on them.
    ctx.save_for_backward(weight_2D, output[1], output[2])
    ctx.hidden_dtype, ctx.bias_dtype = hidden_TD.dtype, bias_2.dtype


def _qa_head_loss_backward(ctx, grad_loss, _grad_of_grad_T2, _grad_of_grad_2D):
    grads = [None] * 6
    if grad_loss is None:
        return tuple(grads)
    weight_2D, grad_T2, grad_2D = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        grads[0], grads[1] = _qa_head_grad(grad_loss, grad_T2, grad_2D, weight_2D, ctx.hidden_dtype)
    elif ctx.needs_input_grad[1]:  # the encoder is frozen
        grads[1] = _scaled(grad_2D, grad_loss, weight_2D.dtype)
    if ctx.needs_input_grad[2]:
        grads[2] = weight_2D.new_zeros(2, dtype=ctx.bias_dtype)
    return tuple(grads)


_qa_head_loss.register_autograd(_qa_head_loss_backward, setup_context=_qa_head_loss_setup)


@custom_op("span_kernels::qa_head_grad", mutates_args=(), device_types="cpu")
def _qa_head_grad(
    grad_output: Tensor, grad_T2: Tensor, grad_2D: Tensor, weight_2D: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return closed_form.qa_head_grad(grad_output, grad_T2, grad_2D, weight_2D, dtype)


@_qa_head_grad.register_kernel("cuda")
def _qa_head_grad_triton(
    grad_output: Tensor, grad_T2: Tensor, grad_2D: Tensor, weight_2D: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from span_kernels.grad_kernels import hidden_grad

    return hidden_grad(grad_output, grad_T2, grad_2D, weight_2D, dtype)


@_qa_head_grad.register_fake
def _(grad_output, grad_T2, grad_2D, weight_2D, dtype):
    hidden_shape = (grad_T2.shape[0], weight_2D.shape[1])
    return grad_T2.new_empty(hidden_shape, dtype=dtype), weight_2D.new_empty(weight_2D.shape)


@custom_op("span_kernels::scaled", mutates_args=())
def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # `out` makes product and rounding one launch, and rounds once.
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


@_scaled.register_fake
def _(x, factor, dtype):
    return torch.empty_like(x, dtype=dtype)


@custom_op("span_kernels::grad_norm_and_finite", mutates_args=(), device_types="cpu")
def _norm_and_finite(flat: Tensor) -> tuple[Tensor, Tensor]:
    return closed_form.norm_and_finite(flat)


@_norm_and_finite.register_kernel("cuda")
def _norm_and_finite_triton(flat: Tensor) -> tuple[Tensor, Tensor]:
    from span_kernels.norm_kernel import norm_and_finite

    return norm_and_finite(flat)


@_norm_and_finite.register_fake
def _(flat):
    return flat.new_empty((), dtype=wide_dtype(flat)), flat.new_empty((), dtype=torch.bool)
