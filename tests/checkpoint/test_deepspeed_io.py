"""DeepSpeed's state, saved and loaded to the bit, at every ZeRO stage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from runner.checkpoint.deepspeed_io import _differences, load_tensors
from runner.errors import DataError
from tests.forked import forked

WORKER = Path(__file__).parents[1] / "workers" / "shard_cells.py"
CELLS = [f"{s}-{p}-{n}" for s in range(4) for p in ("fp32", "bf16") for n in (1, 2)]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, zygote) -> dict[str, dict[str, object]]:
    # DeepSpeed finds its files by a pattern: signs of patterns in a path are names there.
    folder = tmp_path_factory.mktemp("shards") / "lr[3e-5] a?b*[!c]["
    folder.mkdir()
    *_, last = forked(zygote, WORKER, folder)
    return json.loads(last)


@pytest.mark.xdist_group("shards")
@pytest.mark.parametrize("cell", CELLS)
def test_an_engine_comes_back_to_the_bit(cells, cell):
    """Frozen parameters and buffers too, whatever the other engine had; and goes on alike."""
    found = cells[cell]
    assert found["before"] is False
    assert found["loaded"] is True
    assert found["after"] is True
    assert found["rates"] is True
    assert found["steps"] == 8
    assert any("model_states" in name for name in found["files"])
    assert found["strange"] == []


@pytest.mark.xdist_group("shards")
@pytest.mark.parametrize("cell", CELLS)
def test_a_state_that_is_loaded_wrong_is_found_out(cells, cell):
    assert "DeepSpeed loads another state than it saved: " in str(cells[cell]["caught"])


def test_differences_are_named_by_their_place():
    one = {"a": torch.tensor([1.0, float("nan")]), "b": [1, (2.0, "x")], "c": None}
    other = {"a": torch.tensor([1.0, float("nan")]), "b": [1, (2.0, "x")], "c": None}
    assert _differences(one, other, "f") == []
    other["a"] = torch.tensor([1.0, 0.0])
    other["b"] = [1, (2.5, "x")]
    assert _differences(one, other, "f") == ["f: a", "f: b[1][0]"]
    assert _differences(one, {"a": one["a"]}, "f") == ["f"]
    assert _differences(torch.zeros(2), torch.zeros(2, dtype=torch.float64), "f") == ["f"]
    assert _differences(torch.tensor(0.0), torch.tensor(-0.0), "f") == ["f"]
    assert _differences(float("nan"), float("nan"), "f") == []
    assert _differences(1, True, "f") == []


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("x"), print, os.system])
def test_what_is_no_plain_data_is_refused(tmp_path, value):
    path = tmp_path / "x.pt"
    torch.save({"tensor": torch.zeros(2), "other": value}, path)
    with pytest.raises(DataError) as caught:
        load_tensors(path)
    assert str(caught.value).startswith(f"{path}: is refused: ")
    assert "\n" not in str(caught.value)


def test_a_dynamic_loss_scale_comes_back(tmp_path):
    """fp16 is not to be had on a CPU; what its checkpoints hold besides tensors is."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    scaler = DynamicLossScaler(2**16, 1000, 1, 2, False, dtype=torch.half)
    scaler.cur_iter, scaler.cur_hysteresis = 17, 1
    saved = {"loss_scaler": scaler, "zero_stage": ZeroStageEnum.gradients, "dtype": torch.half}
    torch.save(saved, tmp_path / "x.pt")
    found = load_tensors(tmp_path / "x.pt")
    assert vars(found["loss_scaler"]) == vars(scaler)
    assert _differences(saved, found, "f") == []
    found["loss_scaler"].cur_iter = 18
    assert _differences(saved, found, "f") == ["f: loss_scaler: cur_iter"]


def test_a_file_that_is_none_is_refused(tmp_path):
    for content in (b"", b"PK\x03\x04", b"x" * 1000):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(DataError, match="is refused"):
            load_tensors(tmp_path / "x.pt")
    with pytest.raises(DataError, match="No such file"):
        load_tensors(tmp_path / "gone.pt")
