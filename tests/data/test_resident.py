"""Batches gathered from tokens on the device are those assembled on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runner.data.collate import Packing, collate
from runner.data.loader import DeviceTokens, WindowLoader, tokens_on_device
from runner.model.attention import choose_packing
from tests.small_models import model_of, windows_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("rows", [[3, 0, 4], [1], []])
def test_a_gathered_batch_is_the_assembled_one(multiple, rows):
    windows = windows_of((7, 1, 23, 12, 40))
    packing, rows = Packing(2, multiple, 40), np.array(rows, dtype=np.int64)
    sent = WindowLoader(CPU, 9, packing).batch(windows, rows)
    there = (DeviceTokens.copy(windows, CPU),)
    found = WindowLoader(CPU, 9, packing, on_device=there).batch(windows, rows)
    assert vars(found).keys() == vars(sent).keys()
    for name in ("ids_RL", "types_RL", "positions_RL", "segments_B2", "starts_B", "ends_B"):
        mine, theirs = getattr(found, name), getattr(sent, name)
        assert torch.equal(mine, theirs), name
        assert mine.dtype == theirs.dtype
    assert torch.equal(found.bounds.bounds_S1, sent.bounds.bounds_S1)
    assert found.bounds[1:] == sent.bounds[1:]
    assert (found.counted, found.longest) == (sent.counted, sent.longest) == (len(rows), 40)


def test_other_data_sets_are_sent():
    windows, others = windows_of((7, 5)), windows_of((7, 5), seed=1)
    model = model_of("bert")
    packing, _ = choose_packing("on", model, CPU, "fp32", 40)
    loader = WindowLoader(CPU, 0, packing, on_device=(DeviceTokens.copy(windows, CPU),))
    found = loader.batch(others, np.array([0]))
    assert found.ids_RL[0].tolist() == others.tokens_T[:7].tolist()


def test_nothing_is_copied_to_a_cpu():
    assert tokens_on_device([windows_of((7, 5))], CPU) == ()


def test_an_outline_without_rows_counts_nothing():
    found = collate(windows_of((9, 3, 7)), np.array([], dtype=np.int64), tokens=False)
    assert found.tokens_T is None
    assert found.counted == 0
    assert found.segments_B2.tolist() == [[0, 3]]
    assert found.starts_B.tolist() == found.ends_B.tolist() == [-1]
