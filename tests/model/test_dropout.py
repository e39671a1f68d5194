"""Dropout masks: their probability, their independence of what came before, and their gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from runner.model.dropout import CpuDropout, DropoutMasks, install_dropout, keep_scale


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.99999])
def test_elements_are_dropped_with_the_probability_asked_for(p):
    kept = DropoutMasks(3, 0).keep_mask((1000, 1001), p)
    wanted = 1 - 1 / keep_scale(p)
    assert wanted == pytest.approx(p, abs=1 / 65536)
    share = 1 - kept.mean()
    assert abs(share - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / kept.size) + 1e-12
    # Neighbours, which share a 64-bit number, know nothing of each other.
    if p in (0.1, 0.5):
        flat = kept.reshape(-1).astype(float)
        for lag in (1, 2, 3, 4, 1001):
            assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 0.005


def test_masks_depend_on_seed_rank_and_position_alone():
    def mask(seed, rank, *position, before=0):
        masks = DropoutMasks(seed, rank)
        masks.keep_mask((before,), 0.5)
        masks.reseed(*position)
        return masks.keep_mask((64,), 0.5).tobytes()

    assert mask(1, 0, 2, 30, 0, before=100) == mask(1, 0, 2, 30, 0)
    places = [(1, 0, 2, 30, 0), (2, 0, 2, 30, 0), (1, 1, 2, 30, 0), (1, 0, 3, 30, 0)]
    places += [(1, 0, 2, 31, 0), (1, 0, 2, 30, 1)]
    assert len({mask(*place) for place in places}) == len(places)


def test_torchs_own_dropout_is_a_function_of_the_position_too():
    """Models that draw with torch, on any device, repeat after a restart."""
    masks, drop = DropoutMasks(1, 0), nn.Dropout(0.5)
    masks.reseed(0, 1, 0)
    first = drop(torch.ones(64))
    masks.reseed(0, 1, 0)
    assert torch.equal(drop(torch.ones(64)), first)
    masks.reseed(0, 2, 0)
    assert not torch.equal(drop(torch.ones(64)), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_kept_elements_are_scaled_and_gradients_follow(dtype, transposed):
    drop = CpuDropout(0.25, DropoutMasks(1, 0))
    values = torch.randn(40, 30).to(dtype)
    values = (values.T if transposed else values).detach().requires_grad_(True)
    found = drop(values)
    assert found.dtype == dtype
    kept = found != 0
    assert 0.6 < kept.float().mean() < 0.9
    wanted = torch.where(kept, values * (65536 / 49152), 0)
    torch.testing.assert_close(found, wanted.to(dtype))
    weights = torch.randn(found.shape).to(dtype)
    (gradient,) = torch.autograd.grad(found, values, weights)
    torch.testing.assert_close(gradient, torch.where(kept, weights * (65536 / 49152), 0).to(dtype))


def test_nothing_is_dropped_in_evaluation_or_without_probability():
    values = torch.randn(8)
    drop = CpuDropout(0.5, DropoutMasks(1, 0))
    assert drop.eval()(values) is values
    assert CpuDropout(0.0, DropoutMasks(1, 0))(values) is values


def test_install_replaces_every_dropout_and_no_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2)))
    names = list(model.state_dict())
    model[2].eval()
    assert install_dropout(model, DropoutMasks(1, 0)) == 2
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [(type(drop), drop.p) for drop in found] == [(CpuDropout, 0.1), (CpuDropout, 0.2)]
    assert [drop.training for drop in found] == [True, False]
    assert list(model.state_dict()) == names
    assert install_dropout(model, DropoutMasks(1, 0)) == 0
