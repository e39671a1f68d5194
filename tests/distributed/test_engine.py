"""The DeepSpeed configuration, the division of a batch, the schedule, and starting an engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runner.distributed.engine import deepspeed_config, learning_rate_factor, start_engine
from runner.errors import JobError
from runner.job.schema import BatchLayout, Train, Zero, batch_layout

GOLDEN = Path(__file__).parents[1] / "golden"


def train_section(**values: object) -> Train:
    return Train.model_validate({"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, **values})


@pytest.mark.parametrize(
    ("batch_size", "micro", "world", "expected"),
    [
        (16, None, 1, BatchLayout(1, 16, 1)),
        (16, None, 2, BatchLayout(2, 8, 1)),
        (16, 4, 2, BatchLayout(2, 4, 2)),
        (16, 2, 8, BatchLayout(8, 2, 1)),
        (6, None, 3, BatchLayout(3, 2, 1)),
    ],
)
def test_batch_is_divided_over_ranks(batch_size, micro, world, expected):
    section = train_section(batch_size=batch_size, micro_batch_size=micro)
    layout = batch_layout(section, world)
    assert layout == expected
    assert layout.world * layout.micro_batch_size * layout.micro_batches == batch_size


@pytest.mark.parametrize(
    ("batch_size", "micro", "world", "words"),
    [
        (16, None, 3, "1, 2, 4 or 8 ranks, or a batch_size of 15 or 18"),
        (2, None, 4, "1 or 2 ranks, or a batch_size of 4"),
        (16, 16, 2, "micro_batch_size may be 1, 2, 4 or 8"),
    ],
)
def test_batch_that_does_not_divide_lists_what_would(batch_size, micro, world, words):
    with pytest.raises(JobError) as caught:
        batch_layout(train_section(batch_size=batch_size, micro_batch_size=micro), world)
    assert words in str(caught.value)


def test_deepspeed_config_is_the_recorded_one():
    """If a change of the configuration is meant, write the golden file anew and say why."""
    zero = Zero.model_validate(
        {"stage": 2, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}}
    )
    section = train_section(micro_batch_size=4, max_grad_norm=0.5)
    config = deepspeed_config(zero, section, batch_layout(section, 2), "bf16", 2_000)
    recorded = json.loads((GOLDEN / "deepspeed.json").read_text(encoding="utf-8"))
    assert config == recorded


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_switches_one_section_on(precision):
    section = train_section()
    config = deepspeed_config(Zero(), section, batch_layout(section, 1), precision, 2_000)
    enabled = {name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")}
    assert enabled == ({precision} - {"fp32"})


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_rises_then_follows_its_schedule(schedule):
    section = train_section(warmup=0.1, schedule=schedule)
    factor = learning_rate_factor(section, 100)
    values = [factor(step) for step in range(101)]
    assert values[0] == 0
    assert values[5] == pytest.approx(0.5)
    assert values[10] == 1 == max(values)
    if schedule == "constant":
        assert set(values[10:]) == {1.0}
    else:
        assert values[100] == pytest.approx(0, abs=1e-12)
        assert values[10:] == sorted(values[10:], reverse=True)
        assert values[55] == pytest.approx(0.5)  # both curves are at half their height half way


def test_without_warmup_the_first_step_is_at_the_peak():
    assert learning_rate_factor(train_section(), 10)(0) == 1


def test_linear_schedule_is_the_one_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    section = train_section(warmup=0.25)
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimiser, 10, 40)
    factor = learning_rate_factor(section, 40)
    for step in range(40):
        assert factor(step) == pytest.approx(theirs.get_last_lr()[0])
        optimiser.step()
        theirs.step()


def refused(monkeypatch, extra: dict, error: Exception) -> None:
    """Start an engine where DeepSpeed raises this."""

    def initialize(**_: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(initialize=initialize))
    section, model = train_section(), torch.nn.Linear(1, 1)
    config = deepspeed_config(
        Zero(deepspeed=extra), section, batch_layout(section, 1), "fp32", 2_000
    )
    groups = [{"params": list(model.parameters())}]
    start_engine(model, torch.device("cpu"), groups, section, config, 10, extra=extra)


EXTRA = {"zero_optimization": {"zero_quantized_weights": True}, "data_types": {}}


@pytest.mark.parametrize(
    "error",
    [
        ValueError("This op had not been\n implemented"),
        AssertionError("This op had not been implemented"),
        Exception("This op had not been implemented"),  # the kind of its own errors
        TypeError("This op had not been implemented"),
        NotImplementedError("This op had not been implemented"),
    ],
)
def test_what_deepspeed_refuses_is_a_mistake_of_the_job_with_key_and_reason(monkeypatch, error):
    told = "refuses zero_optimization.zero_quantized_weights: This op had not been implemented"
    with pytest.raises(JobError, match=told):
        refused(monkeypatch, EXTRA, error)


def test_of_several_keys_the_one_is_named_that_deepspeed_speaks_of(monkeypatch):
    extra = {"prescale_gradients": True, "zero_optimization": {"reduce_bucket_size": 1.5}}
    error = ValueError("reduce_bucket_size: should be a whole number")
    with pytest.raises(JobError, match=r"refuses zero_optimization\.reduce_bucket_size: red"):
        refused(monkeypatch, extra, error)
    with pytest.raises(JobError, match=r"refuses prescale_gradients or zero_optimization\."):
        refused(monkeypatch, extra, ValueError("no"))


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ({}, ValueError("a fault of ours")),
        (EXTRA, torch.OutOfMemoryError("CUDA out of memory")),
        (EXTRA, RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        (EXTRA, OSError("No space left on device")),
        (EXTRA, RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")),
    ],
)
def test_what_no_key_is_to_blame_for_stays_what_it_is(monkeypatch, extra, error):
    with pytest.raises(type(error)) as caught:
        refused(monkeypatch, extra, error)
    assert caught.value is error
