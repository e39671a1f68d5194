"""span_loss against float64, and what its docstring promises about rows that do not count."""

import pytest
import torch
from span_kernels import span_loss

RAGGED = (
    (1,),
    (7, 1, 0, 37),
    (100, 129),
    (384, 511, 3, 250),
    (1500, 40),  # longer than any block that a program keeps in registers
)


@pytest.mark.parametrize("layout", ["packed", "padded", "scattered"])
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
def test_error_is_at_most_that_of_eager_pytorch(
    lengths, layout, device, make_batch, by_cross_entropy, assert_as_good_as_eager
):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        batch = make_batch(lengths, layout=layout, dtype=dtype, device=device)
        assert_as_good_as_eager(span_loss, by_cross_entropy, [batch.logits_T2], *batch.rows)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_label_outside_its_window_ignores_that_side_of_that_row(
    index_dtype, device, make_batch, by_cross_entropy, differentiate
):
    outside = 2**31 - 1
    labels = [(2, -1), (-100, 6), (5, 0), (outside, 5), (0, 0)]
    batch = make_batch(
        (4, 7, 5, 5, 0),
        labels=labels,
        index_dtype=index_dtype,
        layout="scattered",
        dtype=torch.float64,
        device=device,
    )
    got = differentiate(span_loss, [batch.logits_T2], *batch.rows)
    truth = differentiate(by_cross_entropy, [batch.logits_T2], *batch.rows)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-15)
    offset, length = batch.segments_B2[0].tolist()
    assert got.grads[0][offset : offset + length, 0].all()
    assert not got.grads[0][offset : offset + length, 1].any()


@pytest.mark.parametrize(
    ("lengths", "labels"),
    [((), []), ((0, 0), [(0, 0), (1, 1)]), ((5, 3), [(-1, 5), (3, -7)])],
    ids=["no rows", "empty windows", "all ignored"],
)
@pytest.mark.parametrize("layout", ["packed", "scattered"])
def test_without_a_valid_row_the_loss_and_every_gradient_are_zero(
    lengths, labels, layout, device, make_batch, differentiate
):
    batch = make_batch(lengths, labels=labels, layout=layout, device=device)
    batch.logits_T2.fill_(float("nan"))
    got = differentiate(span_loss, [batch.logits_T2], *batch.rows)
    assert got.loss == 0
    assert got.grads[0].shape == batch.logits_T2.shape
    assert not got.grads[0].any()


def test_nan_outside_the_windows_and_on_ignored_sides_reaches_nothing(
    device, make_batch, differentiate
):
    batch = make_batch((4, 6), labels=[(1, -1), (2, 3)], layout="scattered", device=device)
    clean = differentiate(span_loss, [batch.logits_T2], *batch.rows)
    dirty_T2 = torch.full_like(batch.logits_T2, float("nan"))
    for row, sides in ((0, slice(0, 1)), (1, slice(0, 2))):
        offset, length = batch.segments_B2[row].tolist()
        tokens = slice(offset, offset + length)
        dirty_T2[tokens, sides] = batch.logits_T2[tokens, sides]
    dirty = differentiate(span_loss, [dirty_T2], *batch.rows)
    assert torch.equal(clean.loss, dirty.loss)
    assert torch.equal(clean.grads[0], dirty.grads[0])


def test_nan_inside_a_window_reaches_the_loss(device, make_batch):
    batch = make_batch((4, 6), device=device)
    batch.logits_T2[5, 1] = float("nan")
    assert span_loss(batch.logits_T2, *batch.rows).isnan()


def test_huge_and_infinite_logits(device, make_batch, differentiate):
    batch = make_batch((6,), labels=[(1, 2)], device=device)
    batch.logits_T2.copy_(torch.tensor([-1e38, 3e38, -3e38, 0.0, 1e4, 2.0])[:, None])
    got = differentiate(span_loss, [batch.logits_T2], *batch.rows)
    # The start label holds nearly all of the mass, the end label none of it.
    assert got.loss > 1e38
    want_T2 = torch.zeros(6, 2)
    want_T2[1, 1], want_T2[2, 1] = 0.5, -0.5
    torch.testing.assert_close(got.grads[0].cpu(), want_T2)

    batch.logits_T2.fill_(-float("inf"))
    batch.logits_T2[1:3] = 5.0
    got = differentiate(span_loss, [batch.logits_T2], *batch.rows)
    torch.testing.assert_close(got.loss.cpu(), torch.tensor(2.0).log())

    batch.logits_T2[2, 1] = -float("inf")  # impossible, and labelled
    assert span_loss(batch.logits_T2, *batch.rows) == float("inf")


def test_a_long_window_that_begins_with_impossible_tokens(
    device, make_batch, by_cross_entropy, differentiate
):
    batch = make_batch((1500,), labels=[(1400, 1300)], dtype=torch.float64, device=device)
    batch.logits_T2[:1200] = -float("inf")
    torch.testing.assert_close(
        differentiate(span_loss, [batch.logits_T2], *batch.rows),
        differentiate(by_cross_entropy, [batch.logits_T2], *batch.rows),
        rtol=1e-12,
        atol=1e-15,
    )


def test_adding_a_constant_to_a_window_changes_nothing(device, make_batch, differentiate):
    batch = make_batch((50, 30), dtype=torch.float64, device=device)
    moved_T2 = batch.logits_T2.clone()
    moved_T2[:50] += 1000.0
    torch.testing.assert_close(
        differentiate(span_loss, [moved_T2], *batch.rows),
        differentiate(span_loss, [batch.logits_T2], *batch.rows),
        rtol=1e-9,
        atol=1e-12,
    )


def test_strided_logits_segments_and_labels(device, make_batch, differentiate):
    batch = make_batch((20, 30), device=device)
    want = differentiate(span_loss, [batch.logits_T2], *batch.rows)

    columns_2T = batch.logits_T2.T.contiguous()
    got = differentiate(lambda x, *rows: span_loss(x.T, *rows), [columns_2T], *batch.rows)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grads[0].T, want.grads[0])

    spread_B4 = torch.cat(batch.rows[:1] + tuple(x[:, None] for x in batch.rows[1:]), dim=1)
    got = differentiate(
        span_loss, [batch.logits_T2], spread_B4[:, :2], spread_B4[:, 2], spread_B4[:, 3]
    )
    assert torch.equal(got.loss, want.loss)


def test_the_upstream_gradient_scales_and_inputs_stay_as_they_were(
    device, make_batch, differentiate
):
    batch = make_batch((20, 30), device=device)
    before = [x.clone() for x in batch]
    once = differentiate(span_loss, [batch.logits_T2], *batch.rows)
    thrice = differentiate(span_loss, [batch.logits_T2], *batch.rows, upstream=-3.0)
    torch.testing.assert_close(thrice.grads[0], -3.0 * once.grads[0])
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))


def test_the_same_input_gives_the_same_bits(device, make_batch, differentiate):
    batch = make_batch((50, 7, 99, 384), layout="scattered", device=device)
    first = differentiate(span_loss, [batch.logits_T2], *batch.rows)
    for _ in range(100 if device == "cuda" else 2):
        again = differentiate(span_loss, [batch.logits_T2], *batch.rows)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.grads[0], first.grads[0])
