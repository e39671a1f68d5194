"""The plans by which the host cuts the work."""

import pytest
import torch
from span_kernels.launch import (
    MAX_WIDTH,
    head_plan,
    power_of_two,
    power_of_two_below,
    row_block,
    wide_dtype,
)


@pytest.mark.parametrize(("columns", "budget"), [(64, 208), (32, 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 8, 24, 100, 384, 768, 1024, 1280, 2048, 5000, MAX_WIDTH])
def test_plans_keep_within_the_registers(width, dtype, columns, budget):
    plan = head_plan(12_288, width, dtype, columns)
    for size in (plan.tile, plan.group, plan.lanes, plan.chunk, plan.warps):
        assert size == power_of_two(size) > 0
    # Two pooled vectors, two of the weight and the group's hidden states, spread over the threads
    # of one lane: the rest of 255 registers is for addresses and sums.
    threads = 32 * plan.warps // plan.lanes
    assert (4 + plan.group) * max(width // threads, 1) <= budget


def test_sizes_of_bert_waste_no_column():
    for width in (384, 768, 1024, 1280):
        assert width % head_plan(10_000, width, torch.float32).chunk == 0
    assert head_plan(12_288, 768, torch.bfloat16).chunk * 3 == 768


def test_a_small_batch_is_cut_finer_so_that_every_multiprocessor_works():
    tiles = [
        head_plan(n, 768, torch.bfloat16).tile for n in (1, 1000, 12_288, 45_056, 98_304, 10**7)
    ]
    assert tiles == [16, 16, 32, 64, 128, 128]


def test_powers_of_two():
    assert [power_of_two(n) for n in (0, 1, 2, 3, 384, 512)] == [1, 1, 2, 4, 512, 512]
    assert [power_of_two_below(n) for n in (0, 1, 2, 3, 384, 512)] == [1, 1, 2, 2, 256, 512]
    assert [row_block(n) for n in (1, 33, 5000)] == [32, 64, 1024]


def test_statistics_are_float32_but_for_float64():
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    wide = [wide_dtype(torch.empty(0, dtype=d)) for d in dtypes]
    assert wide == [torch.float32] * 3 + [torch.float64]
