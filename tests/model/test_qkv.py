"""Three projections in one product: chosen with a reason, the same training, the same names.

Logits and gradients of every family: in test_packing.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from span_kernels import reference_span_loss

from runner.data.collate import collate
from runner.data.loader import pack
from runner.errors import JobError
from runner.model.attention import choose_packing
from runner.model.dropout import DropoutMasks, install_dropout
from runner.model.forward import span_logits
from runner.model.freeze import freeze
from runner.model.qkv import choose_projections
from tests.small_models import model_of, takes_types, windows_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def first_losses(family: str, fused: str, frozen: tuple[str, ...] = ()) -> list[float]:
    """Of 20 steps with dropout."""
    model, masks = model_of(family).train(), DropoutMasks(1, 0)
    freeze(model, frozen)
    packing, _ = choose_packing("on", model, CPU, "fp32", 40)
    assert packing is not None
    choose_projections(fused, model, CPU, packed=True, zero_stage=2)
    install_dropout(model, masks)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    batch = collate(windows_of((7, 1, 23, 12, 40)), np.arange(5))
    packed, losses = pack(batch, 0, packing), []
    for number in range(20):
        masks.reseed(0, number)
        logits_T2 = span_logits(model, packed, segment_ids=takes_types(family))
        loss = reference_span_loss(logits_T2, packed.segments_B2, batch.starts_B, batch.ends_B)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "ernie"])
def test_training_with_dropout_takes_the_same_steps(family):
    separate, fused = (first_losses(family, how) for how in ("off", "on"))
    assert sum(separate[-5:]) < 0.9 * sum(separate[:5])
    assert fused == pytest.approx(separate, rel=1e-4)


def test_a_projection_that_is_frozen_stays_as_it_is():
    frozen = ("encoder.layer.0", "encoder.layer.1.attention.self.key")
    separate, fused = (first_losses("bert", how, frozen) for how in ("off", "on"))
    assert fused == pytest.approx(separate, rel=1e-4)


def test_weights_keep_their_names_their_values_and_their_place():
    """Optimiser groups, freezing, checkpoints and exports see what they saw."""
    plain, model = model_of("bert"), model_of("bert")
    choose_projections("on", model, CPU, packed=True, zero_stage=2)
    pairs = zip(plain.named_parameters(), model.named_parameters(), strict=True)
    for (name, theirs), (other, mine) in pairs:
        assert name == other
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize(
    ("family", "device", "packed", "stage", "choice", "words"),
    [
        ("bert", CUDA, True, 2, True, "one product"),
        ("bert", CUDA, True, 0, True, "one product"),
        ("bert", CPU, True, 2, False, "a CPU launches nothing"),
        ("bert", CUDA, False, 2, False, "batches are padded"),
        ("bert", CUDA, True, 3, False, "ZeRO-3 shares out the weights"),
        ("albert", CUDA, True, 2, False, "albert has no stack of layers with three projections"),
        ("modernbert", CUDA, True, 2, False, "modernbert has no stack of layers"),
        # What its attention does besides is not known here.
        ("data2vec-text", CUDA, True, 2, False, "data2vec-text is not among"),
    ],
)
def test_it_is_chosen_with_a_reason(family, device, packed, stage, choice, words):
    options = {"packed": packed, "zero_stage": stage}
    found, reason = choose_projections("auto", model_of(family), device, **options)
    assert found is choice
    assert words in reason
    assert choose_projections("off", model_of(family), device, **options)[0] is False
    if not choice and device is CUDA:
        with pytest.raises(JobError, match="fused_qkv"):
            choose_projections("on", model_of(family), device, **options)
