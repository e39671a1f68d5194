"""A pytest plugin that runs the Triton kernels on CPU tensors, under TRITON_INTERPRET=1.

The variable must be set before Triton is first imported, and rules out compiling in the same
process, so `test_interpreter.py` one level up starts a process of its own with this plugin.

What it changes:
- bfloat16: the interpreter truncates float32 -> bfloat16 and computes with the bit patterns as
  integers. Here conversions round to nearest even, and arithmetic on raw bfloat16 is refused: our
  kernels must convert after every load, because a GPU's tl.sum(bf16) would really add in bfloat16.
- speed: a device function patches the language anew at every call (2 ms each); here once a launch.
- the Triton launchers become the CPU implementation of the operators, so that the tests written
  for the operators run the kernels.
- Triton 3.6 reads bounds of loops by a conversion that numpy 2.5 no longer has: here they are read
  as Triton 3.7 does.
- memory from torch.empty holds NaN, so a kernel that leaves an element unwritten is found out.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from span_kernels import gather, ops
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.array(values, np.float32, ndmin=1)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(values))


def _bf16_values(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


_stock_cast = Builder.cast_impl
_stock_fp_to_fp = Builder.create_fp_to_fp


def _cast(self, source, target):
    have, want = source.dtype.scalar, target.scalar
    if have == want or tl.bfloat16 not in (have, want):
        return _stock_cast(self, source, target)
    if have == tl.bfloat16:
        wide = TensorHandle(_bf16_values(source.data), tl.float32)
        return wide if want == tl.float32 else _stock_cast(self, wide, target)
    wide = source if have == tl.float32 else _stock_cast(self, source, tl.float32)
    return TensorHandle(_bf16_bits(wide.data), tl.bfloat16)


def _fp_to_fp(self, source, target, rounding):
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return _cast(self, source, target)
    return _stock_fp_to_fp(self, source, target, rounding)


def _refuse_bf16(function):
    def checked(self, *operands, **options):
        for x in operands:
            if isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16:
                raise TypeError("arithmetic on raw bfloat16: convert after the load")
        return function(self, *operands, **options)

    return checked


Builder.cast_impl = _cast
Builder.create_fp_to_fp = _fp_to_fp
for _name in ("binary_op", "unary_op", "create_fma", "create_dot"):
    setattr(Builder, _name, _refuse_bf16(getattr(Builder, _name)))

_stock_apply = interpreter.ReduceScanOpInterface.apply


def _apply(self, operand):
    for x in operand if isinstance(operand, tuple) else (operand,):
        if x.dtype.scalar == tl.bfloat16:
            raise TypeError("reduction of raw bfloat16: convert after the load")
    return _stock_apply(self, operand)


interpreter.ReduceScanOpInterface.apply = _apply

_stock_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope):
    _stock_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor

_stock_patch = interpreter._patch_lang
_stock_launch = interpreter.GridExecutor.__call__
_patched: set[int] = set()


def _patch_once(function):
    # Launching patches through the stock function, so what it patched is undone at the end.
    if id(function.__globals__) not in _patched:
        _patched.add(id(function.__globals__))
        _inner_scopes.append(_stock_patch(function))


_inner_scopes: list = []


def _call(self, *arguments, **options):
    try:
        return self.rewrite()(*arguments, **options)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _device_call(self, *arguments, **options):
    _patch_once(self.fn)
    return _call(self, *arguments, **options)


def _launch(self, *arguments, **options):
    _patched.clear()
    try:
        return _stock_launch(self, *arguments, **options)
    finally:
        while _inner_scopes:
            _inner_scopes.pop().restore()


interpreter.InterpretedFunction.__call__ = _device_call
interpreter.GridExecutor.__call__ = _launch

ops._span_loss.register_kernel("cpu")(ops._span_loss_triton)
ops._qa_head_loss.register_kernel("cpu")(ops._qa_head_loss_triton)
ops._qa_head_grad.register_kernel("cpu")(ops._qa_head_grad_triton)
ops._norm_and_finite.register_kernel("cpu")(ops._norm_and_finite_triton)
gather._gather.register_kernel("cpu")(gather._gather_triton)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """PyTorch fills torch.empty with NaN while deterministic algorithms are asked for."""
    # Not by use_deterministic_algorithms, which imports the compiler of torch.compile for a second.
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode("default")
