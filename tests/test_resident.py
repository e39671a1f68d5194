"""Batches gathered from tokens on the device are those assembled on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runner.data.collate import Packing, outline
from runner.data.loader import copied, make_resident
from runner.model.attention import choose_packing
from runner.model.forward import Reader
from tests.small_models import model_of, windows_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("rows", [[3, 0, 4], [1], []])
def test_a_gathered_batch_is_the_assembled_one(multiple, rows):
    windows = windows_of((7, 1, 23, 12, 40))
    packing, rows = Packing(2, multiple, 40), np.array(rows, dtype=np.int64)
    reader = Reader(None, CPU, 9, True, 1, packing)
    sent = reader.prepare(windows, rows)
    resident = copied(windows, CPU)
    found = Reader(None, CPU, 9, True, 1, packing, residents=(resident,)).prepare(windows, rows)
    assert vars(found).keys() == vars(sent).keys()
    for name in ("input_ids_1T", "types_1T", "positions_1T", "segments_B2"):
        mine, theirs = getattr(found.batch, name), getattr(sent.batch, name)
        assert torch.equal(mine, theirs), name
        assert mine.dtype == theirs.dtype
    assert torch.equal(found.batch.bounds.bounds_S1, sent.batch.bounds.bounds_S1)
    assert found.batch.bounds[1:] == sent.batch.bounds[1:]
    assert torch.equal(found.starts_B, sent.starts_B)
    assert torch.equal(found.ends_B, sent.ends_B)
    assert (found.counted, found.longest) == (sent.counted, sent.longest) == (len(rows), 40)


def test_other_data_sets_are_sent():
    windows, others = windows_of((7, 5)), windows_of((7, 5), seed=1)
    model = model_of("bert")
    packing, _ = choose_packing("on", model, CPU, "fp32", 40)
    reader = Reader(model, CPU, 0, True, 1, packing, residents=(copied(windows, CPU),))
    found = reader.prepare(others, np.array([0]))
    assert found.batch.input_ids_1T[0].tolist() == others.tokens_T[:7].tolist()


def test_nothing_is_copied_to_a_cpu():
    assert make_resident([windows_of((7, 5))], CPU) == ()


def test_an_outline_without_rows_counts_nothing():
    found = outline(windows_of((9, 3, 7)), np.array([], dtype=np.int64))
    assert found.counted == 0
    assert found.segments_B2.tolist() == [[0, 3]]
    assert found.starts_B.tolist() == found.ends_B.tolist() == [-1]
