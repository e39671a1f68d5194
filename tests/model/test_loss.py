"""Which implementation a run uses, and that a kernel which disagrees stops it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from span_kernels import reference_span_loss, span_loss
from torch import nn

from runner.data.loader import DeviceBatch
from runner.errors import RunnerError
from runner.model.forward import SpanLogits
from runner.model.loss import choose_span_loss, compare_with_reference
from tests.small_models import assert_same_gradients, gradients_of

CPU = torch.device("cpu")


def load(folder: Path):
    from transformers import AutoModelForQuestionAnswering

    return AutoModelForQuestionAnswering.from_pretrained(folder)


@pytest.mark.parametrize(
    ("wanted", "stage", "path"),
    [
        ("reference", 2, "reference"),
        ("auto", 2, "reference"),
        ("fused", 2, "fused head"),
        ("fused", 3, "fused logits"),
    ],
)
def test_choice_on_a_cpu(tiny, wanted, stage, path):
    chosen = choose_span_loss(wanted, load(tiny("bert")), CPU, stage)
    assert chosen.path == path
    assert chosen.reason in chosen.described()


def test_model_without_a_linear_head_falls_back_to_its_logits(tiny):
    model = load(tiny("bert"))
    model.qa_outputs = nn.Sequential(model.qa_outputs)
    chosen = choose_span_loss("fused", model, CPU, 2)
    assert chosen.path == "fused logits"
    assert "no single linear head" in chosen.reason


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "albert"])
@pytest.mark.parametrize("wanted", ["fused", "reference"])
def test_every_way_gives_the_models_own_loss_and_gradients(tiny, kind, wanted):
    """DistilBERT drops hidden states before its head: the same seed must drop the same ones."""
    model = load(tiny(kind)).train()
    ids_BL = torch.randint(5, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    segments_B2 = torch.tensor([[0, 12], [12, 9], [24, 12]])
    labels = torch.tensor([2, 8, 0]), torch.tensor([3, 8, 11])
    chosen = choose_span_loss(wanted, model, CPU, 2)

    def run(loss_of):
        torch.manual_seed(5)
        output = model(input_ids=ids_BL)
        logits_T2 = torch.stack([output.start_logits, output.end_logits], -1).reshape(-1, 2)
        batch = DeviceBatch(ids_BL, ids_BL, segments_B2, *labels, np.arange(3), 3)
        loss = loss_of(SpanLogits(logits_T2, batch))
        model.zero_grad()
        loss.backward()
        return loss.detach(), gradients_of(model)

    loss, gradients = run(chosen)
    wanted, wanted_gradients = run(lambda r: reference_span_loss(r.logits_T2, segments_B2, *labels))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0.0)
    assert_same_gradients(gradients, wanted_gradients)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_kernel_that_disagrees_stops_the_run(fault):
    logits_T2 = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 12], [12, 8]]), torch.tensor([1, 2]), torch.tensor([3, 2])

    def broken(logits_T2, *labels):
        loss = span_loss(logits_T2, *labels)
        # Same value with half the gradient, or another value with the same gradient.
        return loss / 2 + loss.detach() / 2 if fault == "gradient" else loss + 0.01

    compare_with_reference(span_loss, reference_span_loss, (logits_T2,), labels)
    with pytest.raises(RunnerError, match="disagrees with plain PyTorch on the first batch"):
        compare_with_reference(broken, reference_span_loss, (logits_T2,), labels)
