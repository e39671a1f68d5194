"""Block sizes, grid order and memory bounds of the Triton kernels, interpreted.

Programs that usually need large inputs to loop are given tiny blocks here. Only collected in the
process that `test_interpreter.py` starts.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from span_kernels import (
    grad_kernels,
    grad_norm_and_finite,
    loss_kernel,
    norm_kernel,
    ops,
    pool_kernel,
    qa_head_loss,
    reference_qa_head_loss,
    reference_span_loss,
    span_loss,
)
from span_kernels.launch import HeadPlan
from triton.runtime.interpreter import InterpreterBuilder as Builder

LENGTHS = (21, 1, 0, 34, 16)


def _close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("block", "table"),
    [(4, 2), (16, 1), (16, 8), (64, 2), pytest.param(1, 1, marks=pytest.mark.slow)],
)
def test_window_blocks_and_row_tables_of_any_size(
    block, table, make_batch, differentiate, monkeypatch
):
    batch = make_batch(LENGTHS, layout="scattered", dtype=torch.float64)
    want = differentiate(reference_span_loss, [batch.logits_T2], *batch.rows)
    monkeypatch.setattr(loss_kernel, "row_block", lambda rows: table)
    rows = [x.contiguous() for x in batch.rows]  # the operator does that for its launcher
    statistics, grad_T2 = loss_kernel.span_loss_forward(batch.logits_T2, *rows, block=block)
    _close(statistics.losses_B.sum(), want.loss)
    _close(grad_T2, want.grads[0])


@pytest.mark.parametrize(
    "plan",
    [
        HeadPlan(tile=16, group=1, lanes=1, chunk=32, stages=1, warps=4),
        HeadPlan(tile=16, group=2, lanes=4, chunk=8, stages=3, warps=4),
        HeadPlan(tile=64, group=8, lanes=2, chunk=16, stages=2, warps=8),
        HeadPlan(tile=5, group=2, lanes=4, chunk=32, stages=2, warps=4),
    ],
    ids=str,
)
def test_head_plans_of_any_shape(plan, make_batch, differentiate, monkeypatch):
    batch = make_batch(LENGTHS, width=24, layout="scattered", dtype=torch.float64)
    want = differentiate(reference_qa_head_loss, batch.head, *batch.rows)
    monkeypatch.setattr(ops, "head_plan", lambda *size: plan)
    monkeypatch.setattr(pool_kernel, "row_block", lambda rows: 2)
    monkeypatch.setattr(grad_kernels, "BLOCK_TILES", 2)
    monkeypatch.setattr(grad_kernels, "BLOCK_TOKENS", 8)
    got = differentiate(qa_head_loss, batch.head, *batch.rows)
    _close(got.loss, want.loss)
    _close(got.grads[:2], want.grads[:2])


@pytest.mark.parametrize(("programs", "block"), [(1, 16), (3, 16), (7, 64)])
def test_norm_blocks_of_any_size(programs, block):
    flat = torch.randn(200, dtype=torch.float64)
    squared, finite = norm_kernel.norm_and_finite(flat, programs=programs, block=block)
    _close(squared, flat.square().sum())
    assert finite
    for position in (0, 47, 48, 199):
        dirty = flat.clone()
        dirty[position] = float("nan")
        assert not norm_kernel.norm_and_finite(dirty, programs=programs, block=block)[1]


@pytest.fixture
def backwards(monkeypatch):
    """A function that makes every later launch visit its grid from the last program on."""
    stock = Builder.set_grid_idx

    def turn_round():
        def set_grid_idx(self, x, y, z):
            nx, ny, nz = self.grid_dim
            stock(self, nx - 1 - x, ny - 1 - y, nz - 1 - z)

        monkeypatch.setattr(Builder, "set_grid_idx", set_grid_idx)

    return turn_round


@triton.jit
def _racing_kernel(out):
    tl.store(out, tl.load(out) * 2.0 + tl.program_id(0))


def test_programs_run_in_any_order_give_the_same_bits(backwards, make_batch, differentiate):
    batch = make_batch(LENGTHS, width=24, layout="scattered")
    flat = torch.randn(30_000)

    def run():
        racing = torch.zeros(1)
        _racing_kernel[(3,)](racing)
        head = differentiate(qa_head_loss, batch.head, *batch.rows)
        logits = differentiate(span_loss, [batch.logits_T2], *batch.rows)
        norm = grad_norm_and_finite(flat)
        return racing, (head.loss, *head.grads, logits.loss, *logits.grads, *norm)

    racing_forwards, forwards = run()
    backwards()
    racing_backwards, reverse = run()
    # The planted race shows that turning the grid round can tell.
    assert racing_forwards != racing_backwards
    assert all(torch.equal(x, y) for x, y in zip(forwards, reverse, strict=True))


def test_nothing_is_written_outside_the_outputs(make_batch, differentiate, monkeypatch):
    batch = make_batch(LENGTHS, width=24, layout="scattered")
    made = []
    stock = torch.empty
    zone = 64  # elements before and behind every output

    def guarded(*shape, dtype=torch.float32, **options):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        size = int(np.prod(shape, dtype=np.int64))
        flat = stock(size + 2 * zone, dtype=dtype).fill_(77)
        made.append((flat, flat.clone(), size))
        return flat[zone : zone + size].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    differentiate(qa_head_loss, batch.head, *batch.rows)
    # An impossible table: one window starts before the batch, one ends behind it.
    outside_B2 = batch.segments_B2 + torch.tensor([(-200, 0), (0, 0), (0, 0), (90, 9), (0, 999)])
    qa_head_loss(*batch.head, outside_B2, *batch.rows[1:])
    span_loss(batch.logits_T2, outside_B2, *batch.rows[1:])
    grad_norm_and_finite(batch.bias_2)
    monkeypatch.undo()
    assert len(made) > 20
    for flat, untouched, size in made:
        assert torch.equal(flat[:zone], untouched[:zone])
        assert torch.equal(flat[zone + size :], untouched[zone + size :])


@triton.jit
def _round_trip_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    wide = tl.load(source + at).to(tl.float32)
    tl.store(target + at, wide.to(target.dtype.element_ty))


@triton.jit
def _raw_sum_kernel(source, target, BLOCK: tl.constexpr):
    tl.store(target, tl.sum(tl.load(source + tl.arange(0, BLOCK)), 0))


def test_the_plugin_rounds_bfloat16_as_a_gpu_does():
    wide = torch.randn(4096) * torch.logspace(-38, 38, 4096)
    for source in (wide, wide.bfloat16(), wide.half()):
        target = torch.empty(4096, dtype=torch.bfloat16)
        _round_trip_kernel[(1,)](source, target, BLOCK=4096)
        assert torch.equal(target.view(torch.int16), source.bfloat16().view(torch.int16))


def test_the_plugin_refuses_arithmetic_on_raw_bfloat16():
    with pytest.raises(Exception, match="raw bfloat16"):
        _raw_sum_kernel[(1,)](torch.ones(8).bfloat16(), torch.zeros(1), BLOCK=8)
