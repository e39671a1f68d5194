"""qa_head_loss against float64, and what its docstring promises beyond span_loss."""

import pytest
import torch
from span_kernels import qa_head_loss
from torch.nn.functional import linear

from tests.apart import INTERPRETED, SLOW_INTERPRETED, slow_interpreted


@pytest.fixture
def eager(by_cross_entropy):
    """The head as the model classes write it, every step in the dtype of its input."""

    def loss(hidden_TD, weight_2D, bias_2, *rows):
        return by_cross_entropy(linear(hidden_TD, weight_2D, bias_2), *rows)

    return loss


SIZES = [
    ((37, 7, 1, 0), 8),
    ((129, 100), 24),
    ((100, 37), 100),
    ((37, 129), 384),
    ((384, 50), 24),
    ((384,), 768),
    ((511, 7, 37, 100), 100),
    ((17, 20), 1280),
    ((20, 9), 2048),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Interpreted, a size costs a second and a dtype is no more than its conversions. First the smallest
# size in each dtype, then rows of several chunks by one warp, and rows that two warps share; then,
# in the second tier, each size once. Windows of several blocks: interp/test_blocks.py.
FIRST = [
    *((SIZES[0], dtype) for dtype in DTYPES),
    (((20, 9), 384), torch.float32),
    (((17, 20), 1280), torch.bfloat16),
]
SECOND = [
    (size, dtype)
    for place, size in enumerate(SIZES)
    for number, dtype in enumerate(DTYPES)
    if (place % 3 == number or not INTERPRETED) and (size, dtype) not in FIRST
]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [*FIRST, *(pytest.param(*both, marks=SLOW_INTERPRETED) for both in SECOND)],
    ids=str,
)
def test_error_is_at_most_that_of_eager_pytorch(
    size, dtype, device, make_batch, eager, assert_as_good_as_eager
):
    lengths, width = size
    layout = "padded" if width % 100 else "scattered"
    batch = make_batch(lengths, width=width, dtype=dtype, layout=layout, device=device)
    got = assert_as_good_as_eager(qa_head_loss, eager, batch.head, *batch.rows)
    assert got.grads[0].dtype == got.grads[1].dtype == got.grads[2].dtype == dtype


def test_float64_is_exact(device, make_batch, eager, differentiate):
    batch = make_batch((37, 1, 100), width=24, dtype=torch.float64, device=device)
    torch.testing.assert_close(
        differentiate(qa_head_loss, batch.head, *batch.rows),
        differentiate(eager, batch.head, *batch.rows),
        rtol=1e-12,
        atol=1e-14,
    )


def test_padded_and_packed_layouts_agree(device, make_batch, differentiate):
    lengths, labels = (37, 9, 50), [(3, 5), (0, 8), (49, 49)]
    packed = make_batch(lengths, width=24, labels=labels, device=device)
    padded = make_batch(lengths, width=24, labels=labels, layout="padded", device=device)
    for row in range(3):
        (to, n), (source, _) = padded.segments_B2[row].tolist(), packed.segments_B2[row].tolist()
        padded.hidden_TD[to : to + n] = packed.hidden_TD[source : source + n]
    head = (padded.hidden_TD, packed.weight_2D, packed.bias_2)
    one = differentiate(qa_head_loss, packed.head, *packed.rows)
    two = differentiate(qa_head_loss, head, *padded.rows)
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.grads[1], two.grads[1])


def test_the_bias_has_a_gradient_of_exactly_zero(device, make_batch, differentiate):
    batch = make_batch((37, 50), width=24, device=device)
    bias_grad_2 = differentiate(qa_head_loss, batch.head, *batch.rows).grads[2]
    assert bias_grad_2.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("lengths", "labels"),
    [((), []), ((0, 0), [(0, 0), (1, 1)]), ((5, 3), [(-1, 5), (3, -7)])],
    ids=["no rows", "empty windows", "all ignored"],
)
@pytest.mark.parametrize("layout", ["packed", "scattered"])
def test_without_a_valid_row_the_loss_and_every_gradient_are_zero(
    lengths, labels, layout, device, make_batch, differentiate
):
    batch = make_batch(lengths, width=24, labels=labels, layout=layout, device=device)
    batch.hidden_TD.fill_(float("nan"))
    got = differentiate(qa_head_loss, batch.head, *batch.rows)
    assert got.loss == 0
    for x, grad in zip(batch.head, got.grads, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def test_nan_in_padding_and_in_ignored_rows_reaches_nothing(device, make_batch, differentiate):
    batch = make_batch(
        (20, 30, 10), width=24, labels=[(1, 2), (-1, 30), (9, 0)], layout="scattered", device=device
    )
    clean = differentiate(qa_head_loss, batch.head, *batch.rows)
    dirty_TD = torch.full_like(batch.hidden_TD, float("nan"))
    for row in (0, 2):
        offset, length = batch.segments_B2[row].tolist()
        dirty_TD[offset : offset + length] = batch.hidden_TD[offset : offset + length]
    dirty = differentiate(qa_head_loss, (dirty_TD, *batch.head[1:]), *batch.rows)
    for x, y in zip((clean.loss, *clean.grads), (dirty.loss, *dirty.grads), strict=True):
        assert torch.equal(x, y)


def test_nan_inside_a_window_reaches_the_loss_and_the_weight(device, make_batch, differentiate):
    batch = make_batch((20, 30), width=24, device=device)
    batch.hidden_TD[25, 3] = float("nan")
    got = differentiate(qa_head_loss, batch.head, *batch.rows)
    assert got.loss.isnan()
    assert got.grads[1][:, 3].isnan().all()


def test_huge_logits(device, make_batch, eager, differentiate):
    batch = make_batch((30, 40), width=24, dtype=torch.float64, device=device)
    batch.weight_2D.mul_(1e6)
    torch.testing.assert_close(
        differentiate(qa_head_loss, batch.head, *batch.rows),
        differentiate(eager, batch.head, *batch.rows),
        rtol=1e-9,
        atol=1e-9,
    )


def test_strided_views_of_every_input(device, make_batch, differentiate):
    batch = make_batch((20, 30), width=24, device=device)
    want = differentiate(qa_head_loss, batch.head, *batch.rows)

    def turned(hidden_DT, weight_D2, bias_4, *rows):
        return qa_head_loss(hidden_DT.T, weight_D2.T, bias_4[::2], *rows)

    bias_4 = batch.bias_2.repeat_interleave(2)
    head = (batch.hidden_TD.T.contiguous(), batch.weight_2D.T.contiguous(), bias_4)
    got = differentiate(turned, head, *batch.rows)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.grads[0].T, want.grads[0])
    torch.testing.assert_close(got.grads[1].T, want.grads[1])


def test_a_float32_weight_over_bfloat16_hidden_states(
    device, make_batch, eager, differentiate, truth_of
):
    batch = make_batch((20, 30), width=24, device=device)
    head = (batch.hidden_TD.bfloat16(), *batch.head[1:])
    got = differentiate(qa_head_loss, head, *batch.rows)
    truth = truth_of(eager, head, *batch.rows)
    assert [x.dtype for x in got.grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert (got.loss - truth.exact.loss).abs() <= truth.rounding[0]
    assert (got.grads[1] - truth.exact.grads[1]).abs().max() <= truth.rounding[2]


def test_gradients_only_where_they_are_asked_for(device, make_batch, differentiate):
    batch = make_batch((20, 30), width=24, device=device)
    want = differentiate(qa_head_loss, batch.head, *batch.rows)
    weight_2D = batch.weight_2D.clone().requires_grad_()
    qa_head_loss(batch.hidden_TD, weight_2D, batch.bias_2, *batch.rows).backward()
    assert torch.equal(weight_2D.grad, want.grads[1])
    hidden_TD = batch.hidden_TD.clone().requires_grad_()
    qa_head_loss(hidden_TD, *batch.head[1:], *batch.rows).backward()
    assert torch.equal(hidden_TD.grad, want.grads[0])
    bias_2 = batch.bias_2.clone().requires_grad_()
    qa_head_loss(*batch.head[:2], bias_2, *batch.rows).backward()
    assert not bias_2.grad.any()


def test_the_upstream_gradient_scales_and_inputs_stay_as_they_were(
    device, make_batch, differentiate
):
    batch = make_batch((20, 30), width=24, device=device)
    before = [x.clone() for x in batch]
    once = differentiate(qa_head_loss, batch.head, *batch.rows)
    thrice = differentiate(qa_head_loss, batch.head, *batch.rows, upstream=-3.0)
    for x, y in zip(once.grads, thrice.grads, strict=True):
        torch.testing.assert_close(y, -3.0 * x)
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))


@slow_interpreted  # in interp/test_blocks.py, with the grid's order turned round
def test_the_same_input_gives_the_same_bits(device, make_batch, differentiate):
    batch = make_batch((50, 7, 99), width=100, layout="scattered", device=device)
    first = differentiate(qa_head_loss, batch.head, *batch.rows)
    for _ in range(100 if device == "cuda" else 2):
        again = differentiate(qa_head_loss, batch.head, *batch.rows)
        assert torch.equal(again.loss, first.loss)
        assert all(torch.equal(x, y) for x, y in zip(again.grads, first.grads, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_host_synchronisation(make_batch, differentiate):
    batch = make_batch((50, 7, 99), width=100, device="cuda")
    differentiate(qa_head_loss, batch.head, *batch.rows)  # compiles, which may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(qa_head_loss, batch.head, *batch.rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
