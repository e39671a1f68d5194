"""How a run computes: each choice has a reason, and preparing a model changes no number."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from runner.data.collate import Bounds
from runner.data.loader import WindowLoader
from runner.data.sampler import epoch_batches
from runner.errors import JobError, StorageError
from runner.job.schema import Model, Zero
from runner.model.attention import PACKED_ATTENTION, ROUND_TO
from runner.model.dropout import CpuDropout, DropoutMasks
from runner.model.forward import SpanModel
from runner.model.freeze import freeze
from runner.model.structure import layer_stack
from runner.train.plan import choose_plan, compile_encoder
from runner.train.setup import cache_frozen_layers
from runner.utils.ranks import Rank
from tests.small_models import model_of, windows_of

CPU = torch.device("cpu")


def chosen(model, section=None, zero=None, device=CPU, precision="fp32", tokens=10**6):
    section = Model(name="x") if section is None else section
    return choose_plan(
        section,
        zero or Zero(),
        model,
        device,
        precision,
        longest=40,
        tokens=tokens,
        dropout=DropoutMasks(1, 0),
    )


def test_a_cpu_packs_and_draws_its_own_dropout():
    model = model_of("bert")
    computing = chosen(model)
    assert computing.packing is not None
    assert computing.optimiser == "flat"
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert sum(type(m) is CpuDropout for m in model.modules()) == 1 + 3 * 2
    assert {name: choice for name, (choice, _) in computing.choices.items()} == {
        "batches": "packed",
        "step": "flat",
        "compile": "off",
        "dropout": "16 bits an element",
    }
    assert all(reason for _, reason in computing.choices.values())
    assert len(computing.lines()) == 4


@pytest.mark.parametrize(
    ("wanted", "device", "tokens", "compiled"),
    [
        ("auto", "cpu", 10**15, False),
        ("auto", "meta", 10**15, False),
        ("off", "cpu", 10**15, False),
        ("on", "cpu", 1, True),
    ],
)
def test_compiling_is_decided_by_device_and_work(wanted, device, tokens, compiled, monkeypatch):
    seen = []
    monkeypatch.setattr("runner.train.plan.compile_encoder", seen.append)
    section = Model(name="x", compile=wanted, packing="off")
    computing = chosen(model_of("bert"), section, device=torch.device(device), tokens=tokens)
    assert (computing.choices["compile"][0] == "whole encoder") is compiled
    assert bool(seen) is compiled


def test_zero_3_is_never_compiled(monkeypatch):
    monkeypatch.delattr("runner.train.plan.compile_encoder")  # whoever compiles fails
    zero, cuda = Zero(stage=3), torch.device("cuda")
    section = Model(name="x", packing="off")
    computing = chosen(model_of("bert"), section, zero, cuda, "bf16", tokens=10**15)
    assert computing.choices["compile"] == ("off", "ZeRO-3 gathers weights between operations")
    with pytest.raises(JobError, match=r"model\.compile.*ZeRO-3"):
        chosen(model_of("bert"), Model(name="x", compile="on"), zero)


@pytest.mark.parametrize("tokens", [10**9, 10**14])
def test_a_gpu_compiles_long_jobs(tokens, monkeypatch):
    monkeypatch.setattr("runner.train.plan.compile_encoder", lambda model: None)
    cuda = torch.device("cuda")
    computing = chosen(model_of("bert"), Model(name="x", packing="off"), None, cuda, "bf16", tokens)
    choice, reason = computing.choices["compile"]
    assert choice == ("whole encoder" if tokens == 10**14 else "off")
    assert "operations" in reason


@pytest.mark.slow
@pytest.mark.xdist_group("compiler")  # which is imported for seconds
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_compiled_encoder_trains_on_any_batch_and_scores_as_it_did(family):
    model = model_of(family)
    computing = chosen(model)
    fed = SpanModel(model, WindowLoader(CPU, 0, computing.packing), family == "bert")
    windows = windows_of((7, 1, 23, 12, 40))
    batches = [np.array([0, 2]), np.array([4]), np.array([3, 1, 2])]
    before = [fed(fed.batch(windows, rows)).logits_T2 for rows in batches]
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    compile_encoder(model, backend=backend)
    scored = [fed(fed.batch(windows, rows)).logits_T2 for rows in batches]
    assert all(map(torch.equal, scored, before))
    assert not made
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for rows, wanted in zip(batches, before, strict=True):
        found = fed(fed.batch(windows, rows)).logits_T2
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        found.sum().backward()
    assert made


@pytest.mark.xdist_group("compiler")
@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("bert", 0.1),
        pytest.param("bert", 0.0, marks=pytest.mark.slow),
        pytest.param("distilbert", 0.1, marks=pytest.mark.slow),
        pytest.param("roberta", 0.1, marks=pytest.mark.slow),
        pytest.param("electra", 0.1, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_encoder_is_one_program_for_all_batches(family, dropout, monkeypatch):
    """On what a GPU runs: no break in the graph, none anew over an epoch of real lengths and its
    short last batch. Tensors without values show it."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    from training_modes import QUANTILES

    model = model_of(family).to(torch.bfloat16).train()
    chosen(model, Model(name="x", fused_qkv="on"))
    stack = layer_stack(model).to("meta")
    for parent in list(stack.modules()):  # as on a GPU, where there is no CpuDropout
        for name, child in parent.named_children():
            if isinstance(child, CpuDropout):
                parent.register_module(name, torch.nn.Dropout(dropout))
    torch.compiler.reset()
    counters.clear()
    compile_encoder(model, backend="aot_eager")
    places = np.random.default_rng(1).random(32 * 40 + 5) * (len(QUANTILES) - 1)
    lengths_N = np.interp(places, np.arange(len(QUANTILES)), QUANTILES).astype(np.int64)
    tokens = set()
    for rows in epoch_batches(lengths_N, 32, seed=1, epoch=0):
        ends = np.cumsum(lengths_N[rows])
        fill = -ends[-1] % ROUND_TO
        tokens.add(int(ends[-1] + fill))
        hidden = torch.empty(1, ends[-1] + fill, 32, dtype=torch.bfloat16, device="meta")
        bounds_S1 = torch.empty(1 + len(rows) + bool(fill), dtype=torch.int32, device="meta")
        bounds = Bounds(bounds_S1, 384, ())
        found = stack(hidden.requires_grad_(), None, packed=bounds).last_hidden_state
        assert found.shape == hidden.shape
        found.sum().backward()
    assert len(tokens) > 10
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_frozen_layers_are_told_of_and_kept_on_demand(tmp_path):
    bottom = ("embeddings", "encoder.layer.0")
    model = model_of("bert", layers=3)
    freeze(model, bottom)
    computing = chosen(model)
    assert computing.choices["frozen"] == (
        "embeddings and 1 layers forward only",
        "nothing to train",
    )
    assert computing.frozen is None
    computing = chosen(model, Model(name="x", freeze=bottom, cache_frozen=True))
    assert computing.frozen is not None
    assert "once" in computing.choices["frozen"][0]
    windows, validation = windows_of((7, 5, 9)), windows_of((4,), seed=1)
    fed = SpanModel(model, WindowLoader(CPU, 0, computing.packing), True)
    alone = Rank(0, 1, 0, 1)
    found, lines = cache_frozen_layers(
        fed, computing.frozen, (windows, validation), 2, tmp_path, alone
    )
    assert [cache.windows for cache in found.hidden_caches] == [windows, validation]
    assert all(cache.hidden_TD.abs().sum(1).all() for cache in found.hidden_caches)
    assert "GiB in memory" in lines[0]
    assert cache_frozen_layers(fed, None, (windows,), 2, tmp_path, alone) == (fed, [])
    batches = []
    cache_frozen_layers(
        fed, computing.frozen, (windows,), 2, tmp_path, alone, lambda: batches.append(1)
    )
    assert len(batches) == 2
    endless = dataclasses.replace(windows, tokens_T=np.broadcast_to(np.int32(0), 10**15))
    with pytest.raises(StorageError, match="fit neither"):
        cache_frozen_layers(fed, computing.frozen, (endless,), 2, tmp_path, alone)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(JobError, match="cache_frozen"):
        chosen(model_of("bert"), Model(name="x", cache_frozen=True))
