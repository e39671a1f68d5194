"""How a run computes: each choice has a reason, and preparing a model changes no number."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from runner.data.collate import Bounds
from runner.data.loader import WindowLoader
from runner.errors import JobError, StorageError
from runner.job.schema import Model, Zero
from runner.model.attention import PACKED_ATTENTION
from runner.model.dropout import CpuDropout, DropoutMasks
from runner.model.forward import SpanModel
from runner.model.freeze import freeze
from runner.train.plan import choose_plan, compile_layers, encoder_layers
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
    monkeypatch.setattr("runner.train.plan.compile_layers", seen.append)
    section = Model(name="x", compile=wanted, packing="off")
    computing = chosen(model_of("bert"), section, device=torch.device(device), tokens=tokens)
    assert (computing.choices["compile"][0] == "each layer") is compiled
    assert bool(seen) is compiled


def test_zero_3_is_never_compiled(monkeypatch):
    monkeypatch.delattr("runner.train.plan.compile_layers")  # whoever compiles fails
    zero, cuda = Zero(stage=3), torch.device("cuda")
    section = Model(name="x", packing="off")
    computing = chosen(model_of("bert"), section, zero, cuda, "bf16", tokens=10**15)
    assert computing.choices["compile"] == ("off", "ZeRO-3 gathers weights between operations")
    with pytest.raises(JobError, match=r"model\.compile.*ZeRO-3"):
        chosen(model_of("bert"), Model(name="x", compile="on"), zero)


@pytest.mark.parametrize("tokens", [10**9, 10**14])
def test_a_gpu_compiles_long_jobs(tokens, monkeypatch):
    monkeypatch.setattr("runner.train.plan.compile_layers", lambda model: None)
    cuda = torch.device("cuda")
    computing = chosen(model_of("bert"), Model(name="x", packing="off"), None, cuda, "bf16", tokens)
    choice, reason = computing.choices["compile"]
    assert choice == ("each layer" if tokens == 10**14 else "off")
    assert "operations" in reason


@pytest.mark.xdist_group("compiler")  # which is imported for seconds
@pytest.mark.parametrize("family", ["bert", pytest.param("distilbert", marks=pytest.mark.slow)])
def test_compiled_layers_say_the_same_of_any_batch(family):
    model = model_of(family)
    computing = chosen(model)
    fed = SpanModel(model, WindowLoader(CPU, 0, computing.packing), family == "bert")
    windows = windows_of((7, 1, 23, 12, 40))
    batches = [np.array([0, 2]), np.array([4]), np.array([3, 1, 2])]
    before = [fed(fed.batch(windows, rows)).logits_T2 for rows in batches]
    compile_layers(model, backend="eager")
    assert len(encoder_layers(model)) == 2
    for rows, wanted in zip(batches, before, strict=True):
        found = fed(fed.batch(windows, rows)).logits_T2
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        found.sum().backward()
    assert all(layer._compiled_call_impl is not None for layer in encoder_layers(model))


@pytest.mark.xdist_group("compiler")
@pytest.mark.parametrize(
    ("family", "dropout"),
    [("bert", 0.0), ("bert", 0.1), ("distilbert", 0.1), ("roberta", 0.1), ("electra", 0.1)],
)
def test_a_compiled_layer_is_one_program_for_all_batches(family, dropout):
    """On what a GPU runs: no break in the graph, none anew for another number of tokens or windows.
    Tensors without values show it."""
    model = model_of(family).to(torch.bfloat16).train()
    chosen(model, device=CPU)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    layer = encoder_layers(model)[0].to("meta")
    for parent in list(layer.modules()):  # as on a GPU, where there is no CpuDropout
        for name, child in parent.named_children():
            if isinstance(child, CpuDropout):
                parent.register_module(name, torch.nn.Dropout(child.p))
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    made = 0
    for tokens, windows in ((1024, 5), (1536, 9), (2048, 5)):
        hidden = torch.empty(1, tokens, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
        bounds = Bounds(torch.zeros(windows, dtype=torch.int32, device="meta"), 512, ())
        found = compiled(hidden, None, packed=bounds)
        assert found.shape == hidden.shape
        found.sum().backward()
        made = len(counter.graphs) if tokens == 1024 else made
    assert len(counter.graphs) == made


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
