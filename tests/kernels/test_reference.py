"""The specification itself: against a loop over cross_entropy, against transformers, and traced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from span_kernels import reference_qa_head_loss, reference_span_loss
from torch._subclasses.fake_tensor import FakeTensorMode


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 9), st.integers(-2, 10), st.integers(-2, 10)), max_size=6
    ),
    layout=st.sampled_from(["packed", "padded", "scattered"]),
)
def test_it_is_the_mean_cross_entropy_of_every_side_halved(rows, layout):
    # Hypothesis refuses fixtures that are made anew for every test, so these come by a global.
    make_batch, by_cross_entropy, differentiate = HELPERS
    batch = make_batch(
        [n for n, _, _ in rows],
        labels=[(s, e) for _, s, e in rows],
        layout=layout,
        dtype=torch.float64,
    )
    torch.testing.assert_close(
        differentiate(reference_span_loss, [batch.logits_T2], *batch.rows),
        differentiate(by_cross_entropy, [batch.logits_T2], *batch.rows),
        rtol=1e-12,
        atol=1e-14,
    )


HELPERS: tuple = ()


@pytest.fixture(autouse=True, scope="module")
def _helpers(kernel_helpers):
    global HELPERS
    HELPERS = kernel_helpers


def test_it_equals_transformers_on_windows_without_padding(make_batch):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(config).eval()
    batch = make_batch((37, 37, 37), labels=[(3, 5), (36, 36), (0, 37)])
    ids_BL = torch.randint(0, 50, (3, 37))
    with torch.no_grad():
        # 37 is the length: transformers ignores a label there, as we do.
        out = model(ids_BL, start_positions=batch.starts_B, end_positions=batch.ends_B)
        hidden_TD = model.bert(ids_BL).last_hidden_state.view(-1, 24)
        head = (hidden_TD, model.qa_outputs.weight, model.qa_outputs.bias)
        logits_T2 = torch.stack((out.start_logits, out.end_logits), dim=-1).view(-1, 2)
        torch.testing.assert_close(reference_span_loss(logits_T2, *batch.rows), out.loss)
        torch.testing.assert_close(reference_qa_head_loss(*head, *batch.rows), out.loss)


def test_autograd_of_the_head_is_its_derivative(make_batch):
    batch = make_batch(
        (4, 0, 3), width=5, labels=[(1, 9), (0, 0), (2, 0)], layout="scattered", dtype=torch.float64
    )
    leaves = [x.requires_grad_() for x in batch.head]
    assert torch.autograd.gradcheck(
        lambda *head: reference_qa_head_loss(*head, *batch.rows), leaves
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_a_half_precision_head_are_float32(
    dtype, make_batch, differentiate, by_cross_entropy
):
    batch = make_batch((384, 200), width=100, dtype=dtype, layout="scattered")
    got = reference_qa_head_loss(*batch.head, *batch.rows)
    wide = [x.double() for x in batch.head]
    exact = by_cross_entropy(torch.nn.functional.linear(*wide), *batch.rows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0.0)


def test_nan_that_does_not_count_reaches_no_gradient(make_batch, differentiate):
    batch = make_batch((4, 6), width=8, labels=[(1, 2), (-1, 6)], layout="scattered")
    clean = differentiate(reference_qa_head_loss, batch.head, *batch.rows)
    offset, length = batch.segments_B2[0].tolist()
    dirty_TD = torch.full_like(batch.hidden_TD, float("nan"))
    dirty_TD[offset : offset + length] = batch.hidden_TD[offset : offset + length]
    dirty = differentiate(reference_qa_head_loss, (dirty_TD, *batch.head[1:]), *batch.rows)
    torch.testing.assert_close(dirty, clean, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("lengths", [(), (0,), (5, 3)], ids=str)
def test_without_a_valid_row_the_loss_and_every_gradient_are_zero(
    lengths, make_batch, differentiate
):
    batch = make_batch(lengths, labels=[(-1, 99)] * len(lengths))
    # Anomaly mode also refuses a NaN that a later step of the backward pass would mask.
    with torch.autograd.set_detect_anomaly(True):
        got = differentiate(reference_qa_head_loss, batch.head, *batch.rows)
    assert got.loss == 0
    assert not any(grad.any() for grad in got.grads)


def test_it_never_reads_a_value_on_the_host(make_batch):
    batch = make_batch((5, 0, 7), width=8, layout="scattered")
    # Fake tensors have no values: .item(), a boolean index or a branch on data would raise.
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x).requires_grad_(x.is_floating_point()) for x in batch]
        hidden_TD, weight_2D, bias_2, logits_T2, *rows = fake
        reference_span_loss(logits_T2, *rows).backward()
        reference_qa_head_loss(hidden_TD, weight_2D, bias_2, *rows).backward()
        assert hidden_TD.grad.shape == hidden_TD.shape
