"""Trains some steps on a GPU that is not there, in the loop of a run, and prints what a steady one
of them asked of the device. Run as a fork of the zygote; its arguments: the library, and the way as
JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForQuestionAnswering

from runner.data.loader import WindowLoader, tokens_on_device
from runner.distributed import process_group
from runner.distributed.engine import deepspeed_config, start_engine
from runner.job.schema import Model, Train, Zero, batch_layout
from runner.model.dropout import DropoutMasks
from runner.model.forward import SpanLogits, SpanModel
from runner.model.freeze import freeze, optimiser_groups
from runner.model.loss import choose_span_loss
from runner.train import plan
from runner.train.setup import cache_frozen_layers
from runner.train.state import compute_strictly
from runner.utils.ranks import Rank, current_rank
from tests.bench.training_loop import train_batches
from tests.gpu.device import Device, install, pretend_group
from tests.small_models import takes_types, windows_of

STEPS = 3  # the last is steady: the optimiser's state is there, the next batch is under way
BATCH = 32
LONGEST = 384
SHAPES: dict[str, dict[str, int]] = {
    "bert": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "distilbert": {"dim": 768, "n_heads": 12, "hidden_dim": 3072},
}
SHAPES |= {"roberta": SHAPES["bert"], "electra": SHAPES["bert"] | {"embedding_size": 768}}
SHAPES |= {"ernie": SHAPES["bert"], "albert": SHAPES["electra"]}
SHAPES |= {"modernbert": SHAPES["bert"] | {"intermediate_size": 1152, "attention_dropout": 0.1}}


class Enough(Exception):
    """As many steps were taken as are looked at."""


def model_of(family: str, layers: int, device: torch.device) -> Any:
    depth = {"n_layers" if family == "distilbert" else "num_hidden_layers": layers}
    config = AutoConfig.for_model(family, **SHAPES[family], **depth)
    with torch.device("meta"):
        model = AutoModelForQuestionAnswering.from_config(config)
    return model.to_empty(device=device).train()


def train(device: Device, way: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """Train with [model], [train] and [zero] as `way` has them."""
    gpu = process_group.start_distributed(rank)
    draw = np.random.default_rng(1)
    lengths_N = draw.integers(35, LONGEST + 1, BATCH * (STEPS + 2))
    windows = windows_of(lengths_N)
    section = Model.model_validate({"name": "x", "precision": "bf16", **way.get("model", {})})
    values = {"epochs": 1, "batch_size": BATCH * rank.world, "learning_rate": 3e-5}
    train = Train.model_validate({**values, "log_every": 10**6, **way.get("train", {})})
    if train.deterministic:
        compute_strictly()
    zero = Zero.model_validate(way.get("zero", {}))
    model = model_of(way.get("family", "bert"), way["layers"], gpu)
    freeze(model, section.freeze)
    dropout = DropoutMasks(1, rank.index)
    chosen = plan.choose_plan(
        section,
        zero,
        model,
        gpu,
        section.precision,
        longest=LONGEST,
        tokens=way.get("tokens", 10**6),
        dropout=dropout,
        recompute=train.gradient_checkpointing,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layout = batch_layout(train, rank.world)
    config = deepspeed_config(zero, train, layout, section.precision, trained)
    span_loss = choose_span_loss("auto", model, gpu, zero.stage)
    span_loss.checked = True  # there are no numbers to compare
    broken = compile(way.get("break", "None"), "way", "eval")

    def loss_of(logits: SpanLogits) -> torch.Tensor:
        loss = span_loss(logits)
        eval(broken, {"loss": loss, "torch": torch})
        return loss

    groups = optimiser_groups(model, 0.01)
    engine = start_engine(model, gpu, groups, train, config, 10**6, chosen.optimiser)
    there = tokens_on_device([windows], gpu) if way.get("resident", True) else ()
    types = takes_types(way.get("family", "bert"))
    fed = SpanModel(engine, WindowLoader(gpu, 0, chosen.packing, 8, there), types)
    with tempfile.TemporaryDirectory() as folder:
        fed, _ = cache_frozen_layers(fed, chosen.frozen, [windows], BATCH, Path(folder), rank)
    engine.train()
    marks = [device.marks()]

    def follow(done: int, note: str = "") -> None:
        marks.append(device.marks())
        if done == STEPS:
            raise Enough

    batches = np.split(np.arange(len(windows)), len(windows) // BATCH)
    with contextlib.suppress(Enough):
        train_batches(fed, loss_of, dropout, windows, train, batches, follow)  # type: ignore[arg-type]
    return {**device.between(marks[-2], marks[-1]), "choices": chosen.record()}


def main() -> None:
    library, way = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ |= way.get("environment", {})
    device, rank = install(library), current_rank()
    told = pretend_group(rank.index, rank.world)
    process_group.meet = lambda *_: (None, rank.index, rank.world)
    torch.set_num_threads(1)
    # There is no Triton for a GPU that is not there; what it would be given is traced as for it.
    plan.compile_encoder = partial(plan.compile_encoder, backend="aot_eager")
    with device:
        found = train(device, way, rank)
    graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    found["graphs"], found["breaks"] = graphs
    found["nccl"] = {name: str(value) for name, value in told.items()}
    os.write(1, f"{json.dumps(found)}\n".encode())


try:
    main()
except Exception:
    traceback.print_exc()  # a fork ends without a word
    raise
