"""The packed attention on a CPU: its dropout held against plain PyTorch with the same masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runner.data.collate import Bounds
from runner.model.attention import _flash, packed_attention
from runner.model.dropout import CpuDropout, DropoutMasks, keep_scale

ENDS = (0, 5, 6, 29, 41)


class Module(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.dropout = drop


def inputs(dtype=torch.float32, width=8):
    torch.manual_seed(0)
    # Strided as in a model: [1, T, H, D] seen as [1, H, T, D].
    return [
        torch.randn(1, ENDS[-1], 3, width, dtype=dtype).transpose(1, 2).requires_grad_(True)
        for _ in range(3)
    ]


def bounds():
    return Bounds(torch.tensor(ENDS, dtype=torch.int32), 23, ENDS)


def by_hand(query, key, value, p, masks, scale, reach=99):
    """The formula, window by window, out of differentiable operations."""
    parts = []
    for low, high in pairwise(ENDS):
        q, k, v = (x[0, :, low:high] for x in (query, key, value))
        place = torch.arange(high - low)
        far = (place[:, None] - place).abs() > reach
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(far, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        kept = torch.from_numpy(masks.keep_mask(weights.shape, p))
        parts.append((weights * kept * keep_scale(p)) @ v)
    return torch.cat(parts, dim=1).transpose(0, 1)[None]


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_and_its_gradients_are_the_formula(p):
    query, key, value = inputs(torch.float64)
    module = Module(CpuDropout(p, DropoutMasks(5, 0)))
    found, weights = packed_attention(
        module, query, key, value, None, dropout=p, scaling=0.3, packed=bounds()
    )
    assert weights is None
    wanted = by_hand(query, key, value, p, DropoutMasks(5, 0), 0.3)
    torch.testing.assert_close(found, wanted)
    above = torch.randn_like(wanted)
    mine = torch.autograd.grad(found, (query, key, value), above)
    theirs = torch.autograd.grad(wanted, (query, key, value), above)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("reach", [0, 3, 21, 22])
def test_a_local_layer_sees_so_many_tokens_to_either_side(p, reach):
    """transformers counts the token itself in `sliding_window`."""
    query, key, value = inputs(torch.float64)
    module = Module(CpuDropout(p, DropoutMasks(5, 0)))
    options = {"dropout": p, "scaling": 0.3, "packed": bounds(), "sliding_window": reach + 1}
    found, _ = packed_attention(module, query, key, value, None, **options)
    wanted = by_hand(query, key, value, p, DropoutMasks(5, 0), 0.3, reach)
    torch.testing.assert_close(found, wanted)
    everything = by_hand(query, key, value, p, DropoutMasks(5, 0), 0.3)
    assert torch.allclose(wanted, everything) is (reach == 22)  # the longest window has 23 tokens
    above = torch.randn_like(wanted)
    mine = torch.autograd.grad(found, (query, key, value), above)
    theirs = torch.autograd.grad(wanted, (query, key, value), above)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_stays_near(dtype):
    query, key, value = inputs(dtype)
    module = Module(CpuDropout(0.1, DropoutMasks(5, 0)))
    found, _ = packed_attention(module, query, key, value, None, dropout=0.1, packed=bounds())
    wide = [x.detach().double() for x in (query, key, value)]
    wanted = by_hand(*wide, 0.1, DropoutMasks(5, 0), 8**-0.5)
    assert found.dtype == dtype
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_windows_do_not_see_each_other():
    query, key, value = inputs()
    module = Module(nn.Dropout(0.1))
    before, _ = packed_attention(module, query, key, value, None, packed=bounds())
    with torch.no_grad():
        for x in (query, key, value):
            x[:, :, 6:29] += 1.0
    after, _ = packed_attention(module, query, key, value, None, packed=bounds())
    assert torch.equal(before[:, :6], after[:, :6])
    assert torch.equal(before[:, 29:], after[:, 29:])
    assert not torch.allclose(before[:, 6:29], after[:, 6:29])


def test_plain_dropout_modules_draw_with_torch():
    query, key, value = inputs()
    module = Module(nn.Dropout(0.5))
    torch.manual_seed(1)
    first, _ = packed_attention(module, query, key, value, None, dropout=0.5, packed=bounds())
    torch.manual_seed(1)
    again, _ = packed_attention(module, query, key, value, None, dropout=0.5, packed=bounds())
    other, _ = packed_attention(module, query, key, value, None, dropout=0.5, packed=bounds())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("window", [None, 65])
@pytest.mark.parametrize(("p", "scale"), [(0.0, 32**-0.5), (0.0, 0.2), (0.1, 0.2)])
def test_the_gpus_branch_has_the_right_shapes(p, scale, window):
    """What can be known without a GPU: PyTorch's own shape functions take the arguments, forward
    and backward."""
    with FakeTensorMode(), torch.no_grad():
        shape = {"dtype": torch.bfloat16, "device": "cuda"}
        fake = [torch.empty(1, 64, 4, 32, **shape).transpose(1, 2) for _ in range(3)]
        where = Bounds(torch.zeros(5, dtype=torch.int32, device="cuda"), 384, ())
        module = Module(nn.Dropout(p))
        options = {"dropout": p, "scaling": scale, "packed": where, "sliding_window": window}
        found, _ = packed_attention(module, *fake, None, **options)
        assert found.shape == (1, 64, 4, 32)
        assert found.device.type == "cuda"
        assert found.is_contiguous()
    shape = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    meta = [torch.empty(64, 4, 32, **shape) for _ in range(3)]
    where = Bounds(torch.zeros(5, dtype=torch.int32, device="meta"), 384, ())
    reach = None if window is None else window - 1
    gradients = torch.autograd.grad(_flash(*meta, where, p, scale, reach).sum(), meta)
    assert [g.shape for g in gradients] == [(64, 4, 32)] * 3


def test_a_local_layer_reaches_a_gpus_kernel_as_transformers_says_it(monkeypatch):
    """flash attention sees `left` and `right` tokens besides the token itself."""
    seen = []
    kernel = torch.ops.aten._flash_attention_forward

    def spy(*arguments, **options):
        seen.append(options)
        return kernel(*arguments, **options)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", spy)
    shape = {"dtype": torch.bfloat16, "device": "meta"}
    meta = [torch.empty(1, 64, 4, 32, **shape).transpose(1, 2) for _ in range(3)]
    where = Bounds(torch.zeros(5, dtype=torch.int32, device="meta"), 384, ())
    packed_attention(Module(nn.Dropout()), *meta, None, packed=where, sliding_window=65)
    assert [(one["window_size_left"], one["window_size_right"]) for one in seen] == [(64, 64)]
