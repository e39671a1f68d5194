"""The training step as a GPU is asked for it: no host read, no mix of devices, and no more launches
than are written down here. The GPU is not there; shapes and operations are real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forked
from tests.gpu.device import build

WORKER = Path(__file__).with_name("steps.py")
pytestmark = pytest.mark.xdist_group("fake GPU")
Way = dict[str, Any]
BOTTOM = ["embeddings", "encoder.layer.0-5"]


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake GPU's library, kept in pytest's cache."""
    cache = getattr(request.config, "cache", None)
    folder = tmp_path_factory.mktemp("gpu") if cache is None else cache.mkdir("fake_gpu")
    found = build(Path(folder))
    if found is None:
        pytest.skip("no g++ to build the fake GPU with")
    return found


@pytest.fixture
def step(zygote, library) -> Callable[[Way], dict[str, Any]]:
    """`step(way)` is what a steady step asked of the device."""

    def taken(way: Way) -> dict[str, Any]:
        (line,) = forked(zygote, WORKER, library, json.dumps({"layers": 12, **way}))
        return json.loads(line)

    return taken


# A step's launches for BERT-base: 32 windows, packed and resident, bf16, ZeRO-2, or what differs.
# Who raises one of them says why. What is compiled is one graph here, its operations not yet fused.
CEILINGS: dict[str, tuple[int, Way]] = {
    "default": (494, {}),
    "fp16": (495, {"model": {"precision": "fp16"}}),
    "ZeRO-1": (494, {"zero": {"stage": 1}}),
    "sent": (496, {"resident": False}),
    "micro-batches": (1896, {"train": {"micro_batch_size": 8}}),
    "frozen": (361, {"model": {"freeze": BOTTOM}}),
    "frozen and cached": (273, {"model": {"freeze": BOTTOM, "cache_frozen": True}}),
    "deterministic": (494, {"train": {"deterministic": True}}),
    "compiled": (494, {"model": {"compile": "on"}}),
    "compiled, frozen": (361, {"model": {"compile": "on", "freeze": BOTTOM}}),
    "compiled, cached": (273, {"model": {"compile": "on", "freeze": BOTTOM, "cache_frozen": True}}),
    "compiled, padded": (943, {"model": {"compile": "on", "packing": "off"}}),
    "padded": (988, {"model": {"packing": "off"}}),
    "separate projections": (578, {"model": {"fused_qkv": "off"}}),
    "DistilBERT": (470, {"family": "distilbert"}),
    "RoBERTa": (496, {"family": "roberta"}),
    "ELECTRA": (494, {"family": "electra"}),
    "ERNIE": (494, {"family": "ernie"}),
    "ALBERT": (936, {"family": "albert"}),
    "ModernBERT": (899, {"family": "modernbert"}),
    "computed twice": (662, {"train": {"gradient_checkpointing": True}}),
}


def held(found: dict[str, Any], ceiling: int) -> None:
    """A steady step waits for nothing, and asks for no more than this."""
    assert found["waits"] == []
    assert found["pageable"] == []
    assert sum(found["launches"].values()) <= ceiling, found["launches"]


def test_a_step_waits_for_nothing_on_a_rank_that_is_shown_its_own_gpu_alone(step):
    """As by gpu-bind, --gpus-per-task and CUDA_VISIBLE_DEVICES: the second rank's is number 0."""
    second = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    found = step({"layers": 2, "environment": second})
    held(found, 144)
    assert found["nccl"]["device_id"] == "cuda:0"


@pytest.mark.slow
@pytest.mark.parametrize("name", CEILINGS)
def test_a_step_waits_for_nothing(step, name):
    ceiling, way = CEILINGS[name]
    found = step(way)
    if name == "fp16":  # whose scale is the host's to change
        assert len(found["waits"]) == 1
        assert "overflow" in found["waits"].pop()
    held(found, ceiling)
    assert (found["graphs"], found["breaks"]) == (int(name.startswith("compiled")), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "noted", "words"),
    [
        ({"break": "loss.item()"}, "waits", "a number is read"),
        ({"break": "loss.cpu()"}, "waits", "copies to the host"),
        ({"break": "torch.cuda.synchronize()"}, "waits", "a synchronisation"),
        ({"break": "torch.ones(9).to(loss.device)"}, "pageable", "9 numbers"),
    ],
)
def test_what_makes_a_step_wait_is_seen(step, way, noted, words):
    found = step({"layers": 1, **way})
    assert any(words in line for line in found[noted])


@pytest.mark.slow
def test_a_mix_of_devices_is_refused(step):
    with pytest.raises(AssertionError, match="on the same device"):
        step({"layers": 1, "break": "loss + torch.ones(2)"})
