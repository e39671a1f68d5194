"""Batches prepared ahead of the one that is run."""

from __future__ import annotations

import numpy as np
import torch

from runner.data import loader as reading
from runner.data.loader import WindowLoader
from runner.model.forward import SpanModel
from tests.small_models import model_of, windows_of

LENGTHS = (7, 1, 23, 12, 40)


def test_one_batch_is_ahead_of_the_one_that_is_asked_for(monkeypatch):
    """Its copy is on the way while the device works; no more wait there, each takes memory. On the
    host they are assembled several in a row."""
    monkeypatch.setattr(reading, "TOGETHER", 3)
    model = SpanModel(model_of("bert"), WindowLoader(torch.device("cpu"), 0), True)
    windows, asked, sent = windows_of(LENGTHS), [], []

    def passes():
        for rows in ([3, 0], [4], [], [1, 2]):
            asked.append(rows)
            yield np.array(rows, dtype=np.int64)

    def to_device(batch, device):
        sent.append(batch)
        return plain(batch, device)

    plain = reading.to_device
    monkeypatch.setattr(reading, "to_device", to_device)
    found = []
    for number, prepared in enumerate(model.prefetch(windows, passes()), 1):
        assert len(sent) == min(number + 1, 4)
        assert len(asked) == (3 if number < 3 else 4)
        found.append(prepared)
    assert [prepared.counted for prepared in found] == [2, 1, 0, 2]
    for rows, prepared in zip(asked, found, strict=True):
        wanted = model.batch(windows, np.array(rows, dtype=np.int64))
        assert torch.equal(prepared.ids_RL, wanted.ids_RL)
        assert torch.equal(model(prepared).logits_T2, model(wanted).logits_T2)


def test_nothing_is_ahead_of_no_batch():
    loader = WindowLoader(torch.device("cpu"), 0)
    assert list(loader.prefetch(windows_of(LENGTHS), [])) == []
