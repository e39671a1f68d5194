"""What PyTorch demands of an operator, and what a caller is told when arguments do not fit."""

import shutil

import pytest
import torch
from span_kernels import ops, qa_head_loss, span_loss

from tests.apart import SLOW_INTERPRETED, slow_interpreted


@pytest.fixture
def batch(make_batch, device):
    return make_batch(
        (3, 0, 2),
        width=3,
        labels=[(1, 9), (0, 0), (1, 0)],
        layout="packed",
        dtype=torch.float64,
        device=device,
    )


# What opcheck asks of an implementation, and what of the registration that all of them share.
OF_RESULTS = ("test_schema", "test_faketensor")
OF_REGISTRATION = ("test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.xdist_group("compiler")
@pytest.mark.parametrize(
    "asked", [OF_RESULTS, pytest.param(OF_REGISTRATION, marks=SLOW_INTERPRETED)]
)
def test_opcheck(batch, asked):
    def check(operator, arguments):
        torch.library.opcheck(operator, arguments, test_utils=asked)

    head = [x.requires_grad_() for x in batch.head]
    check(ops._qa_head_loss, (*head, *batch.rows))
    check(ops._span_loss, (batch.logits_T2.requires_grad_(), *batch.rows))
    check(ops._norm_and_finite, (batch.bias_2.detach(),))
    grad_output = torch.ones((), dtype=torch.float64, device=batch.hidden_TD.device)
    saved = (grad_output, batch.logits_T2.detach(), batch.weight_2D.detach())
    check(ops._qa_head_grad, (*saved, batch.weight_2D.detach().float(), torch.bfloat16))
    check(ops._scaled, (saved[1], grad_output, torch.bfloat16))


@slow_interpreted
def test_gradcheck(batch):
    head = [x.requires_grad_() for x in batch.head]
    # The bias's gradient is zero by decree, and a difference quotient finds 1e-10.
    assert torch.autograd.gradcheck(
        lambda *x: qa_head_loss(*x, *batch.rows), head, check_batched_grad=False
    )
    logits_T2 = batch.logits_T2.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: span_loss(x, *batch.rows), [logits_T2])


@pytest.mark.xdist_group("compiler")
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aot_eager", marks=SLOW_INTERPRETED),
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"),
            ],
        ),
    ],
)
def test_compile_without_graph_breaks_and_with_changing_lengths(
    backend, make_batch, differentiate, device
):
    def plain(hidden_TD, weight_2D, bias_2, segments_B2, starts_B, ends_B):
        rows = (segments_B2, starts_B, ends_B)
        return qa_head_loss(hidden_TD, weight_2D, bias_2, *rows) * 2 + span_loss(
            hidden_TD[:, :2], *rows
        )

    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ((20, 30), (7, 9, 40)):
        batch = make_batch(lengths, width=24, device=device)
        torch.testing.assert_close(
            differentiate(compiled, batch.head, *batch.rows),
            differentiate(plain, batch.head, *batch.rows),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits_T2": torch.zeros(5)}, ValueError, r"logits_T2: found shape \[5\], need \[any, 2"),
        ({"logits_T2": torch.zeros(5, 3)}, ValueError, "logits_T2"),
        ({"logits_T2": torch.zeros(5, 2, dtype=torch.int64)}, TypeError, "need a floating dtype"),
        ({"segments_B2": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "segments_B2"),
        ({"segments_B2": torch.zeros(2, 2)}, TypeError, "torch.int32 or torch.int64"),
        ({"starts_B": torch.zeros(3, dtype=torch.int64)}, ValueError, "starts_B"),
        ({"ends_B": torch.zeros(2, dtype=torch.int16)}, TypeError, "ends_B"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message, make_batch):
    batch = make_batch((2, 3))
    names = ("logits_T2", "segments_B2", "starts_B", "ends_B")
    arguments = {name: getattr(batch, name) for name in names} | change
    with pytest.raises(error, match=message):
        span_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_2D": torch.zeros(2, 7)}, r"weight_2D: found shape \[2, 7\], need \[2, 8\]"),
        ({"bias_2": torch.zeros(3)}, "bias_2"),
        ({"hidden_TD": torch.zeros(5, 8, 1)}, "hidden_TD"),
    ],
)
def test_a_head_that_does_not_fit_is_named(change, message, make_batch):
    batch = make_batch((2, 3))._replace(**change)
    with pytest.raises(ValueError, match=message):
        qa_head_loss(*batch.head, *batch.rows)
