"""Packed batches are their windows one by one: logits, loss and gradients of every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from span_kernels import reference_span_loss

from runner.data.collate import Packing, collate
from runner.data.loader import pack
from runner.data.windows import Windows
from runner.errors import JobError
from runner.model.attention import FAMILIES, PACKED_ATTENTION, choose_packing
from runner.model.dropout import DropoutMasks, install_dropout
from runner.model.forward import span_logits
from runner.model.qkv import FusedSelfAttention, choose_projections
from tests.small_models import (
    assert_same_gradients,
    gradients_of,
    model_of,
    takes_types,
    windows_of,
)

CPU = torch.device("cpu")
LENGTHS = (7, 1, 23, 12, 40)
# Families whose self-attention is not three linear layers in a stack of layers.
UNLIKE_BERT = ("albert", "modernbert")
# What the families call their rates of dropout.
RATES = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("mlp_dropout", "embedding_dropout", "qa_dropout"),
)


def one_by_one(model, windows: Windows, rows, family: str) -> list[torch.Tensor]:
    """What a plain model says to each window alone."""
    found = []
    for n in rows:
        low, high = windows.firsts_N1[n : n + 2]
        inputs = {"input_ids": torch.from_numpy(windows.tokens_T[low:high].astype(np.int64))[None]}
        if takes_types(family):
            types = torch.from_numpy(windows.types_T[low:high].astype(np.int64))[None]
            inputs["token_type_ids"] = types
        output = model(**inputs)
        found.append(torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1))
    return found


@pytest.mark.parametrize(("multiple", "fused"), [(1, "off"), (16, "off"), (16, "on")])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_windows_are_the_same_windows_one_by_one(family, multiple, fused):
    """Positions begin anew in each window, attention stays inside it, what fills up changes
    nothing; nor does it that three projections are one product."""
    plain, packed_model = model_of(family), model_of(family)
    windows, rows = windows_of(LENGTHS), np.array([3, 0, 4, 1, 2])
    packing, reason = choose_packing("on", packed_model, CPU, "fp32", 40)
    assert packing is not None
    assert packing.first_position == (2 if "roberta" in family or family == "camembert" else 0)
    assert "by itself" in reason
    if fused == "on" and family in UNLIKE_BERT:
        with pytest.raises(JobError, match="three projections"):
            choose_projections(fused, packed_model, CPU, packed=True, zero_stage=2)
        return
    choose_projections(fused, packed_model, CPU, packed=True, zero_stage=2)
    replaced = [m for m in packed_model.modules() if isinstance(m, FusedSelfAttention)]
    assert len(replaced) == (2 if fused == "on" else 0)
    packing = Packing(packing.first_position, multiple, packing.longest)
    batch = collate(windows, rows)
    packed = pack(batch, 0, packing)
    total = int(windows.lengths_N.sum())
    assert packed.ids_RL.shape[1] == (total if multiple == 1 else total // 16 * 16 + 16)
    assert set(packed.positions_RL[0, total:].tolist()) <= {packing.first_position}
    if multiple > 1:  # what a GPU is given; on this CPU the layout is read off the bounds
        ends = tuple(packed.bounds.bounds_S1.tolist())
        packed = type(packed)(**{**vars(packed), "bounds": packed.bounds._replace(ends=ends)})

    logits_T2 = span_logits(packed_model, packed, segment_ids=takes_types(family))
    loss = reference_span_loss(logits_T2, packed.segments_B2, batch.starts_B, batch.ends_B)
    loss.backward()
    alone = one_by_one(plain, windows, rows, family)
    for logits_L2, (offset, length) in zip(alone, packed.segments_B2.tolist(), strict=True):
        torch.testing.assert_close(
            logits_T2[offset : offset + length], logits_L2, rtol=1e-5, atol=2e-5
        )
    spread = torch.cat(alone).std()
    assert spread > 0.1, "logits that are all alike would prove nothing"
    reference_span_loss(
        torch.cat(alone), packed.segments_B2, batch.starts_B, batch.ends_B
    ).backward()
    assert_same_gradients(gradients_of(packed_model), gradients_of(plain))


class MasksByWindow(DropoutMasks):
    """Draws a window's part of a mask from the window and the mask's number in a forward pass: a
    window has the same dropout wherever it stands."""

    def __init__(self) -> None:
        super().__init__(1, 0)
        self.number = self.part = self.drawn = 0
        self.windows: list[tuple[int, int]] = []

    def read(self, *windows: tuple[int, int]) -> None:
        """A forward pass begins over these: (window, length)."""
        self.windows, self.number, self.part = [*windows], 0, 0

    def keep_mask(self, shape, p):
        self.drawn += 1
        if shape[0] > 1:  # an attention's weights [H, L, L], one window after another
            keep = self._of(self.windows[self.part][0], shape, p)
            self.part = (self.part + 1) % len(self.windows)
            self.number += self.part == 0
            return keep
        parts = [self._of(window, (1, length, shape[2]), p) for window, length in self.windows]
        self.number += 1
        return np.concatenate(parts, axis=1)

    def _of(self, window, shape, p):
        return np.random.default_rng((window, self.number)).random(shape) >= p


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_windows_train_as_one_by_one_with_dropout(family):
    """The same masks, packed and alone: logits and gradients are the same."""
    windows, rows = windows_of(LENGTHS), np.array([3, 0, 4, 1, 2])
    found = {}
    for how, batches in (("packed", [rows]), ("alone", [rows[n : n + 1] for n in range(5)])):
        model, masks = model_of(family, **dict.fromkeys(RATES, 0.4)).train(), MasksByWindow()
        packing, _ = choose_packing("on", model, CPU, "fp32", 40)
        assert install_dropout(model, masks) > 0
        parts = []
        for part in batches:
            masks.read(*((n, LENGTHS[n]) for n in part.tolist()))
            packed = pack(collate(windows, part), 0, packing)
            parts.append(span_logits(model, packed, segment_ids=takes_types(family)))
        batch = collate(windows, rows)
        logits_T2 = torch.cat(parts)
        reference_span_loss(logits_T2, batch.segments_B2, batch.starts_B, batch.ends_B).backward()
        assert masks.drawn > 6
        plain = model.eval()
        packed = pack(batch, 0, packing)
        still_T2 = span_logits(plain, packed, segment_ids=takes_types(family))
        assert not torch.allclose(logits_T2, still_T2, rtol=0.1, atol=0.1)
        found[how] = logits_T2, gradients_of(model)
    torch.testing.assert_close(found["packed"][0], found["alone"][0], rtol=1e-4, atol=1e-4)
    assert_same_gradients(found["packed"][1], found["alone"][1])


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_packed_models_train_with_their_dropout(dropout):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = model_of("bert", **off | {dropout: 0.5}).train()
    choose_packing("on", model, CPU, "fp32", 40)
    packed = pack(collate(windows_of(LENGTHS), np.arange(5)), 0, Packing())
    first, second = (span_logits(model, packed, segment_ids=True) for _ in range(2))
    assert not torch.allclose(first, second)
    model.eval()
    first, second = (span_logits(model, packed, segment_ids=True) for _ in range(2))
    assert torch.equal(first, second)


def test_a_packed_model_refuses_a_batch_that_is_not():
    """It makes no mask: a padded batch would be read wrongly, and nobody would notice."""
    model = model_of("bert")
    choose_packing("on", model, CPU, "fp32", 40)
    with pytest.raises(AssertionError, match="packed batches"):
        model(input_ids=torch.ones(2, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("family", "device", "precision", "words"),
    [
        ("data2vec-text", "cpu", "fp32", "data2vec-text is not among"),
        ("bert", "cuda", "fp32", "bf16 or fp16, not fp32"),
        ("bert", "meta", "fp32", "no packed attention on meta"),
    ],
)
def test_what_cannot_be_packed_is_padded_with_a_reason(family, device, precision, words):
    model = model_of(family)
    packing, reason = choose_packing("auto", model, torch.device(device), precision, 40)
    assert packing is None
    assert words in reason
    assert model.config._attn_implementation != PACKED_ATTENTION
    with pytest.raises(JobError, match="not possible"):
        choose_packing("on", model, torch.device(device), precision, 40)
    assert choose_packing("off", model, CPU, "fp32", 40) == (None, "as the job says")


def test_an_exported_model_says_nothing_of_packing(tmp_path: Path):
    model = model_of("bert")
    choose_packing("on", model, CPU, "fp32", 40)
    model.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()
