"""What only a GPU can show: packed attention's numbers, a step that waits for nothing, one result
from every way to take it. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from span_kernels import reference_span_loss

from runner.data.collate import collate
from runner.data.loader import WindowLoader, pack, pad, to_device, tokens_on_device
from runner.distributed.engine import deepspeed_config, start_engine
from runner.distributed.process_group import start_distributed
from runner.job.schema import Model, Train, Zero, batch_layout
from runner.model.attention import FAMILIES, choose_packing
from runner.model.dropout import DropoutMasks
from runner.model.forward import SpanModel, span_logits
from runner.model.freeze import optimiser_groups
from runner.model.loss import choose_span_loss
from runner.train.plan import choose_plan, compare_packing
from runner.utils.ranks import Rank
from tests.bench.training_loop import train_batches
from tests.small_models import model_of, takes_types, windows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)
LENGTHS = (7, 1, 23, 12, 40, 33, 5, 18)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trainer(*, zero=None, model=None, section=None, resident=False, recompute=False):
    """A tiny BERT in bf16: its model, loss, dropout, windows, and the job's [train]."""
    device = start_distributed(Rank(0, 1, 0, 1))
    zero = zero or Zero()
    section = section or Model(name="x", precision="bf16")
    model = (model or model_of("bert", **STILL)).train()
    train = Train(epochs=1, batch_size=8, learning_rate=1e-3)
    dropout, windows = DropoutMasks(1, 0), windows_of(LENGTHS)
    computing = choose_plan(
        section, zero, model, device, "bf16",
        longest=40, tokens=10**6, dropout=dropout, recompute=recompute,
    )  # fmt: skip
    trained = sum(p.numel() for p in model.parameters())
    config = deepspeed_config(zero, train, batch_layout(train, 1), "bf16", trained)
    span_loss = choose_span_loss("auto", model, device, zero.stage)
    groups = optimiser_groups(model, 0.01)
    engine = start_engine(model, device, groups, train, config, 10**6, computing.optimiser)
    there = tokens_on_device([windows], device) if resident else ()
    fed = SpanModel(engine, WindowLoader(device, 0, computing.packing, 8, there), True)
    engine.train()
    return fed, span_loss, dropout, windows, train


def steps(count, **way):
    """Train on the same batches: the losses, and a function that takes one more step and returns
    its loss, on the device."""
    fed, span_loss, dropout, windows, _ = trainer(**way)

    def step(number):
        dropout.reseed(0, number, 0)
        logits = fed(fed.batch(windows, np.roll(np.arange(8), number)))
        loss = span_loss(logits)
        fed.engine.backward(loss)
        fed.engine.step()
        return loss.detach(), logits.accuracy()

    return [float(step(n)[0]) for n in range(count)], step


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_the_cpus(family):
    plain, packed_model = model_of(family), model_of(family).to(CUDA, torch.bfloat16)
    packing, reason = choose_packing("on", packed_model, CUDA, "bf16", 40)
    assert packing is not None, reason
    batch = collate(windows_of(LENGTHS), np.arange(8))
    padded = pad(batch, 0)
    expected = span_logits(plain, padded, segment_ids=takes_types(family))
    packed = to_device(pack(batch, 0, packing), CUDA)
    assert packed.ids_RL.shape == (1, 256)
    found = span_logits(packed_model, packed, segment_ids=takes_types(family))
    reference_span_loss(found, packed.segments_B2, packed.starts_B, packed.ends_B).backward()
    for parameter in packed_model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    scale = expected.abs().max()
    for (mine, length), (theirs, _) in zip(
        packed.segments_B2.tolist(), padded.segments_B2.tolist(), strict=True
    ):
        apart = found[mine : mine + length].float().cpu() - expected[theirs : theirs + length]
        assert apart.abs().max() <= 0.05 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_the_known_families_stand_the_comparison(family):
    how = {"pad_id": 0, "segment_ids": takes_types(family)}
    assert compare_packing(model_of(family), windows_of(LENGTHS), CUDA, "bf16", **how) is None


def test_attention_dropout_drops_and_repeats_after_a_restart():
    model = model_of("bert", **STILL | {"attention_probs_dropout_prob": 0.5})
    model = model.to(CUDA, torch.bfloat16).train()
    packing, _ = choose_packing("on", model, CUDA, "bf16", 40)
    fed, dropout = SpanModel(model, WindowLoader(CUDA, 0, packing, 8), True), DropoutMasks(1, 0)
    windows, found = windows_of(LENGTHS), []
    for position in (1, 2, 1):
        dropout.reseed(0, position, 0)
        found.append(fed(fed.batch(windows, np.arange(8))).logits_T2[:100])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("resident", [False, True])
def test_a_step_waits_for_nothing(resident):
    """Assembly, copy, forward, backward, norm, clipping, update: the host reads nothing."""
    _, step = steps(3, resident=resident)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("resident", [False, True])
def test_the_loop_waits_for_nothing_between_two_rows(resident):
    """As a run has it: look-ahead, accuracy, health, and what follows each step."""
    fed, span_loss, dropout, windows, train = trainer(resident=resident)
    train = train.model_copy(update={"log_every": 10})

    def follow(done, note=""):
        # The first row warms up; the second one is written, and waits, after step 20.
        torch.cuda.set_sync_debug_mode("error" if 10 <= done < 19 else "default")

    batches = [np.sort(np.roll(np.arange(8), number)) for number in range(20)]
    try:
        written = train_batches(fed, span_loss, dropout, windows, train, batches, follow)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert written == [10, 20]


def test_every_way_to_take_a_step_has_the_same_result():
    expected, _ = steps(8)
    assert expected[-1] < expected[0]
    ways = {
        "tokens on the device": {"resident": True},
        "ZeRO-1": {"zero": Zero(stage=1)},
        "DeepSpeed's optimiser": {"zero": Zero(optimizer="deepspeed")},
        "padded": {"section": Model(name="x", precision="bf16", packing="off")},
        "computed twice": {"recompute": True},
        "compiled": {"section": Model(name="x", precision="bf16", compile="on")},
    }
    for name, way in ways.items():
        found, _ = steps(8, **way)
        assert found == pytest.approx(expected, rel=0.05), name


def test_a_gradient_that_overflows_leaves_the_weights_alone():
    model = model_of("bert", **STILL)
    _, step = steps(1, model=model)
    with torch.no_grad():
        model.qa_outputs.weight.fill_(float("nan"))
    before = model.bert.embeddings.word_embeddings.weight.clone()
    step(1)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, before)
