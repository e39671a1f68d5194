"""What the host functions launch compiles for every GPU we name, and what the machine code shows.

The functions run on meta tensors, which have shapes but no values: a host read would raise. Only
collected in the process that `test_ahead_of_time.py` starts.
"""

import re

import pytest
import torch
from span_kernels import gather_windows, grad_norm_and_finite, ops, qa_head_loss, span_loss
from span_kernels.gather import _gather, _gather_triton
from span_kernels.warm import launch_all

SHAPES = [
    (32, 384, 768, torch.bfloat16),
    pytest.param((256, 384, 1024, torch.bfloat16), marks=pytest.mark.slow),
    (3, 100, 100, torch.float32),
]
MORE_SHAPES = [
    (32, 384, 768, torch.float16),
    (32, 384, 768, torch.float32),
    (4, 37, 24, torch.bfloat16),
    (4, 2000, 4096, torch.bfloat16),
]


def _inputs(rows, length, width, dtype, index_dtype=torch.int64):
    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    table = (meta(rows, 2, dtype=index_dtype), *(meta(rows, dtype=index_dtype) for _ in range(2)))
    return (meta(rows * length, width), meta(2, width), meta(2)), table


def _train(head, table):
    loss, grad_T2, grad_2D = ops._qa_head_loss_triton(*head, *table)
    ops._qa_head_grad_triton(loss, grad_T2, grad_2D, head[1], head[0].dtype)


def _check(compiled, target):
    for kernel in compiled:
        assert kernel.spilled == 0, kernel.name
        assert kernel.shared <= target.shared_limit, kernel.name
        # One program of 4 or 8 warps must fit: 255 is the hardware's end on NVIDIA, 512 on AMD.
        assert kernel.registers <= (512 if target.gpu.backend == "hip" else 255), kernel.name


def _copied(ptx):
    """Sizes in bytes, as PTX writes them, of a thread's copies into shared memory."""
    return set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_head_compiles_without_spills_in_four_launches(shape, launches, target):
    compiled = launches(lambda: _train(*_inputs(*shape)))
    assert [kernel.name for kernel in compiled] == [
        "_pool_kernel",
        "_window_kernel",
        "_weight_grad_kernel",
        "_hidden_grad_kernel",
    ]
    _check(compiled, target)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_further_shapes_on_hopper(shape, launches, target):
    _check(launches(lambda: _train(*_inputs(*shape, index_dtype=torch.int32))), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_from_logits_and_norm(dtype, launches, target):
    (logits_T2, _, _), table = _inputs(32, 384, 2, dtype)
    compiled = launches(lambda: ops._span_loss_triton(logits_T2, *table))
    assert len(compiled) == 1
    _check(compiled, target)
    flat = torch.empty(1_000_000, dtype=dtype, device="meta")
    compiled = launches(lambda: ops._norm_and_finite_triton(flat))
    assert [kernel.name for kernel in compiled] == ["_partial_kernel", "_total_kernel"]
    _check(compiled, target)


@pytest.mark.parametrize(
    "windows", [32, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 300))]
)
def test_gathering_a_batch(windows, launches, target):
    def meta(size, dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    inputs = (meta(100_000, torch.int32), meta(100_000, torch.uint8))
    table = (meta(windows, torch.int64), meta(windows + 1, torch.int32))
    for total in (1, 170 * windows):
        compiled = launches(lambda total=total: _gather_triton(*inputs, *table, total, 2, 0))
        assert [kernel.name for kernel in compiled] == ["_gather_kernel"]
        _check(compiled, target)


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, torch.float32),
        pytest.param((1, 5, 8, torch.bfloat16), marks=pytest.mark.slow),
        pytest.param((3, 1, 8, torch.float32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sizes_of_one_which_triton_turns_into_constants(shape, launches, target):
    """An int argument equal to 1 becomes a Python int, on which .to() and the like fail."""
    (hidden_TD, *_), table = inputs = _inputs(*shape)
    _check(launches(lambda: _train(*inputs)), target)
    logits_T2 = hidden_TD[:, :1].expand(-1, 2)
    _check(launches(lambda: ops._span_loss_triton(logits_T2, *table)), target)
    flat = torch.empty(1, device="meta")
    _check(launches(lambda: ops._norm_and_finite_triton(flat)), target)


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_the_streams_move_sixteen_bytes_a_thread_and_no_float_is_added_atomically(launches, target):
    compiled = launches(lambda: _train(*_inputs(*SHAPES[0])))
    pool, _, _, hidden_grad = (kernel.kernel.asm["ptx"] for kernel in compiled)
    assert _copied(pool) == {"0x10"}
    assert "st.global.v4" in hidden_grad
    assert not re.search(r"st\.global\.(b16|b32)", hidden_grad.split("st.global.v4", 1)[0])
    for kernel in compiled:
        assert not re.search(r"\b(atom|red)\.", kernel.kernel.asm["ptx"]), kernel.name


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [108_893_186, 1_000_001])
def test_a_norm_moves_sixteen_bytes_a_thread_whatever_the_size(size, dtype, launches, target):
    """Triton knows of a number no more than whether 16 divides it; BERT-base's length is not so."""
    flat = torch.empty(size, dtype=dtype, device="meta")
    partial, _ = launches(lambda: ops._norm_and_finite_triton(flat))
    assert _copied(partial.kernel.asm["ptx"]) == {"0x10"}
    assert partial.registers <= 64  # 4 programs of 256 threads: all of 65,536
    assert partial.spilled == 0


@pytest.fixture
def on_cpu_tensors(monkeypatch):
    """The operators launch kernels for tensors that have addresses; what they write stays unset."""
    for operator, launcher in (
        (ops._span_loss, ops._span_loss_triton),
        (ops._qa_head_loss, ops._qa_head_loss_triton),
        (ops._qa_head_grad, ops._qa_head_grad_triton),
        (ops._norm_and_finite, ops._norm_and_finite_triton),
        (_gather, _gather_triton),
    ):
        operator.register_kernel("cpu")(launcher)


def _steps(sizes, width, dtype):
    """Training steps on batches of (rows, tokens), whose tables lie one after another in a buffer
    as they were sent."""
    for rows, tokens in sizes:
        total = tokens * rows
        sent = torch.zeros(5 * rows + 1, dtype=torch.int64)
        firsts_B, segments, starts_B, ends_B, _ = sent.split([rows, 2 * rows, rows, rows, 1])
        table = (segments.view(rows, 2), starts_B, ends_B)
        tokens_N, types_N = torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.uint8)
        bounds_B1 = torch.zeros(rows + 2, dtype=torch.int32)[:-1]
        gather_windows(tokens_N, types_N, firsts_B, bounds_B1, total, first_position=2, pad_id=1)
        head = [torch.zeros(*shape, dtype=dtype) for shape in ((total, width), (2, width), (2,))]
        head = [x.requires_grad_() for x in head]
        torch.autograd.grad(qa_head_loss(*head, *table), head)
        span_loss(torch.zeros(total, 2), *table)
    for size in (1, 2_000, 7_000_016, 7_000_001):
        grad_norm_and_finite(torch.zeros(size, dtype=dtype))
        grad_norm_and_finite(torch.zeros(size))


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("longest", [384, pytest.param(2000, marks=pytest.mark.slow)])
def test_after_the_warm_up_no_batch_compiles(longest, launches, target, on_cpu_tensors):
    """The last batch of an epoch is short, and its table lies at another address."""
    width, dtype = 64, torch.bfloat16
    ready = launches(lambda: launch_all(torch.device("cpu"), dtype, 48, longest, width))
    assert {kernel.name for kernel in ready} == {
        *("_pool_kernel", "_window_kernel", "_weight_grad_kernel", "_hidden_grad_kernel"),
        *("_partial_kernel", "_total_kernel", "_gather_kernel"),
    }
    rows = (48, 47, 33, 32, 16, 13, 2, 1)
    sizes = [(n, tokens) for n in rows for tokens in (1, 16, 173, longest)]
    launched = launches(lambda: _steps(sizes, width, dtype))
    assert {kernel.name for kernel in launched} == {kernel.name for kernel in ready}
    known = {id(kernel.kernel) for kernel in ready}
    assert not {kernel.name for kernel in launched if id(kernel.kernel) not in known}


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_a_dry_run_that_keeps_no_graph_warms_up_too(launches, target, on_cpu_tensors):
    """Scoring runs in inference mode; the kernels of the backward pass are compiled even there."""
    with torch.inference_mode():
        ready = launches(lambda: launch_all(torch.device("cpu"), torch.float32, 1, 4, 64))
    assert "_hidden_grad_kernel" in {kernel.name for kernel in ready}
