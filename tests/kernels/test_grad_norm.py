"""grad_norm_and_finite: the sum is accurate, the flag is not fooled by an overflow."""

import os

import pytest
import torch
from span_kernels import grad_norm_and_finite


@pytest.mark.parametrize("size", [0, 1, 5, 4096, 4097, 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_squared_norm(size, dtype, device):
    torch.manual_seed(size)
    flat = torch.randn(size).to(device, dtype)
    squared, finite = grad_norm_and_finite(flat)
    assert squared.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert squared.device == finite.device == flat.device
    exact = flat.double().square().sum()
    torch.testing.assert_close(squared.double(), exact, rtol=1e-6, atol=0.0)
    assert finite.dtype == torch.bool
    assert finite


def test_many_equal_numbers_lose_nothing_to_the_order_of_the_sum(device):
    # Interpreted, a block costs milliseconds; there the kernel's order is tested with few blocks.
    size = 100_000 if os.environ.get("TRITON_INTERPRET") == "1" else 10_000_000
    squared, _ = grad_norm_and_finite(torch.full((size,), 1e-3, device=device))
    exact = size * torch.tensor(1e-3).double().square()
    torch.testing.assert_close(squared.cpu().double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 4095, 4096, 9_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_element_is_found(bad, position, dtype, device):
    flat = torch.zeros(10_000, dtype=dtype, device=device)
    flat[position] = bad
    squared, finite = grad_norm_and_finite(flat)
    assert not finite
    assert not squared.isfinite()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, under the interpreter
def test_a_finite_gradient_whose_square_overflows_is_still_finite(device):
    squared, finite = grad_norm_and_finite(torch.full((5000,), 1e30, device=device))
    assert squared == float("inf")
    assert finite


def test_a_strided_view_is_refused(device):
    with pytest.raises(ValueError, match="contiguous"):
        grad_norm_and_finite(torch.zeros(10, device=device)[::2])


def test_the_same_gradient_gives_the_same_bits(device):
    flat = torch.randn(30_000).to(device)
    first, _ = grad_norm_and_finite(flat)
    for _ in range(100 if device == "cuda" else 2):
        assert torch.equal(grad_norm_and_finite(flat)[0], first)
