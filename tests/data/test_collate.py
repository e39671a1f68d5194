"""Order, shares and layouts of batches: properties for any size, and padding on real questions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.data.collate import Packing, collate, packed_bounds
from runner.data.loader import pad
from runner.data.sampler import epoch_batches, rank_passes, score_batches
from runner.data.windows import Windows

sizes = st.integers(1, 40)
lengths = st.lists(st.integers(1, 60), max_size=300).map(np.array)


def windows_of(lengths_N, seed=0):
    """Random windows of the given lengths, one a question; labels anywhere inside."""
    draw = np.random.default_rng(seed)
    lengths_N = np.asarray(lengths_N)
    total, count = int(lengths_N.sum()), len(lengths_N)
    starts_N = draw.integers(0, lengths_N)
    return Windows(
        tokens_T=draw.integers(5, 30_000, total).astype(np.int32),
        types_T=draw.integers(0, 2, total).astype(np.uint8),
        firsts_N1=np.concatenate([[0], np.cumsum(lengths_N)]),
        questions_N=np.arange(count, dtype=np.int32),
        contexts_N2=np.zeros((count, 2), np.int32),
        starts_N=starts_N.astype(np.int32),
        ends_N=draw.integers(starts_N, lengths_N).astype(np.int32),
        cls_N=np.zeros(count, np.int32),
        chars_C2=np.zeros((0, 2), np.int32),
        chars_firsts_N=np.zeros(count, np.int64),
    )


# ---- order


@given(lengths_N=lengths, batch_size=sizes, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 9))
@pytest.mark.parametrize("buckets", [True, False])
def test_an_epoch_is_a_permutation_in_full_batches(lengths_N, batch_size, seed, epoch, buckets):
    batches = epoch_batches(lengths_N, batch_size, seed, epoch, buckets=buckets)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == [*range(len(lengths_N))]
    assert [len(rows) for rows in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches) == -(-len(lengths_N) // batch_size)
    for rows in batches:
        assert (np.diff(lengths_N[rows]) >= 0).all()
    again = epoch_batches(lengths_N.copy(), batch_size, seed, epoch, buckets=buckets)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


def test_seed_and_epoch_each_decide_the_order():
    lengths_N = np.random.default_rng(0).integers(10, 300, 2000)
    orders = {
        tuple(np.concatenate(epoch_batches(lengths_N, 16, seed, epoch)).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_without_buckets_lengths_do_not_decide_who_shares_a_batch():
    lengths_N = np.random.default_rng(0).integers(10, 300, 64)
    plain, other = (
        epoch_batches(lengths, 8, 1, 1, buckets=False) for lengths in (lengths_N, lengths_N[::-1])
    )
    assert [set(rows) for rows in plain] == [set(rows) for rows in other]


@given(lengths_N=lengths, batch_size=sizes, seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("buckets", [True, False])
def test_the_first_steps_of_all_need_the_most_memory(lengths_N, batch_size, seed, buckets):
    batches = epoch_batches(lengths_N, batch_size, seed, 0, buckets=buckets)
    full = [rows for rows in batches if len(rows) == batch_size]
    # Packed, a step's memory goes with its tokens; padded, with its longest window.
    for need in (np.sum, np.max):
        needs = [int(need(lengths_N[rows])) for rows in full]
        largest = sorted(needs, reverse=True)[:2]
        assert needs[:1] == largest[:1] or needs[1] == largest[0]
        assert sorted(needs[:4], reverse=True)[:2] == largest


def test_the_first_step_has_the_most_tokens_where_the_longest_window_is_elsewhere():
    """Windows cut at max_length make many batches equally long, not equally large."""
    draw = np.random.default_rng(0)
    lengths_N = np.minimum(draw.gamma(4, 50, 8000).astype(np.int64) + 10, 384)
    lengths_N[5] = 385
    batches = epoch_batches(lengths_N, 32, 1, 0, buckets=False)
    tokens = [int(lengths_N[rows].sum()) for rows in batches]
    assert tokens[0] == max(tokens)
    assert 5 in batches[1]
    later = [
        int(lengths_N[rows].sum())
        for epoch in range(1, 6)
        for rows in epoch_batches(lengths_N, 32, 1, epoch, buckets=False)
    ]
    assert max(later) < 1.1 * tokens[0]


def test_the_longest_batches_change_no_other_ones_order():
    lengths_N = np.random.default_rng(0).integers(10, 300, 16 * 40)
    lengths_N[7] = lengths_N[300] = 500
    alike_N = np.full(16 * 40, 500)  # nothing to be moved: of equal batches the first stay first
    moved, still = (epoch_batches(n, 16, 3, 0, buckets=False) for n in (lengths_N, alike_N))
    order = [set(rows) for rows in still]
    places = [order.index(set(rows)) for rows in moved]
    front = places[:4]  # two of most tokens, two with the longest windows
    assert {7, 300} <= set(np.concatenate(moved[:4]))
    assert places[4:] == [n for n in range(40) if n not in front]


def test_batches_come_in_no_order_of_length():
    """Sorting inside chunks must not leave short batches first and long ones last."""
    lengths_N = np.random.default_rng(0).integers(10, 300, 16 * 200)
    longest = np.array([lengths_N[rows].max() for rows in epoch_batches(lengths_N, 16, 0, 0)])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


def padding(lengths_N, groups):
    padded = sum(int(lengths_N[rows].max()) * len(rows) for rows in groups if len(rows))
    return 1 - lengths_N.sum() / padded


@pytest.fixture(scope="module")
def real_lengths(real_data, minilm):
    from runner.data.dataset import load_dataset
    from runner.data.windows import build_windows
    from runner.job.schema import Columns, Model
    from runner.model.load import ModelFiles, load_tokenizer

    data = load_dataset(
        f"{real_data}/xquad_en_v1.1.json",
        columns=Columns(),
        unanswerable=False,
        on_bad_row="fail",
    )
    return build_windows(
        data.examples, load_tokenizer(ModelFiles.locate(Model(name=minilm))), 384, 128
    ).lengths_N


@pytest.mark.parametrize("batch_size", [8, 16, 32])
@pytest.mark.parametrize(("world", "micro_batches"), [(1, 1), (2, 1), (2, 4)])
def test_padding_of_real_questions_is_under_a_tenth(real_lengths, batch_size, world, micro_batches):
    micro = batch_size // world // micro_batches
    passes = [
        rows
        for batch in epoch_batches(real_lengths, batch_size, 42, 0)
        for rank in range(world)
        for rows in rank_passes(batch, rank, world, micro, micro_batches)
    ]
    assert padding(real_lengths, passes) < 0.10
    plain = epoch_batches(real_lengths, batch_size, 42, 0, buckets=False)
    assert padding(real_lengths, plain) > 0.25
    assert padding(real_lengths, score_batches(real_lengths, batch_size, 0, 1)) < 0.03


# ---- shares


@given(
    rows=st.integers(0, 300), world=st.integers(1, 9), micro=st.integers(1, 9), n=st.integers(1, 9)
)
def test_every_row_is_dealt_once_and_ranks_make_equal_passes(rows, world, micro, n):
    batch = np.random.default_rng(0).permutation(min(rows, world * micro * n))
    shares = [rank_passes(batch, rank, world, micro, n) for rank in range(world)]
    assert all(len(share) == n for share in shares)
    assert all(len(rows) <= micro for share in shares for rows in share)
    dealt = np.concatenate([rows for share in shares for rows in share])
    assert sorted(dealt.tolist()) == sorted(batch.tolist())
    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - min(counts) <= 1


@given(lengths_N=lengths, batch_size=sizes, world=st.integers(1, 9))
def test_scoring_reads_every_window_once_longest_first(lengths_N, batch_size, world):
    shares = [score_batches(lengths_N, batch_size, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    turns = [rows for turn in zip(*shares, strict=True) for rows in turn]
    order = np.concatenate(turns).tolist() if turns else []
    assert sorted(order) == [*range(len(lengths_N))]
    assert (np.diff(lengths_N[order]) <= 0).all() if order else not len(lengths_N)
    assert all(len(rows) <= batch_size for rows in turns)


# ---- layouts


@given(
    lengths_N=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    multiple=st.sampled_from([1, 8]),
    data=st.data(),
)
def test_collate_and_pad_are_the_plain_loop(lengths_N, multiple, data):
    windows = windows_of(lengths_N)
    places = st.integers(0, len(windows) - 1)
    rows = np.array(data.draw(st.lists(places, min_size=1, max_size=8, unique=True)))
    batch = collate(windows, rows)
    padded = pad(batch, 99_999, multiple)
    longest = max(lengths_N[n] for n in rows)
    longest = -(-longest // multiple) * multiple
    offset = 0
    for b, n in enumerate(rows):
        low, high = windows.firsts_N1[n : n + 2]
        tokens, types = windows.tokens_T[low:high].tolist(), windows.types_T[low:high].tolist()
        fill = longest - len(tokens)
        assert batch.segments_B2[b].tolist() == [offset, len(tokens)]
        assert batch.tokens_T[offset : offset + len(tokens)].tolist() == tokens
        assert batch.types_T[offset : offset + len(tokens)].tolist() == types
        assert (batch.starts_B[b], batch.ends_B[b]) == (windows.starts_N[n], windows.ends_N[n])
        assert padded.ids_RL[b].tolist() == tokens + [99_999] * fill
        assert padded.types_RL[b].tolist() == types + [0] * fill
        assert padded.segments_B2[b].tolist() == [b * longest, len(tokens)]
        if padded.mask_RL is not None:
            assert padded.mask_RL[b].tolist() == [1] * len(tokens) + [0] * fill
        offset += len(tokens)
    assert batch.counted == len(rows)
    assert batch.rows_B.tolist() == rows.tolist()
    assert len(batch.tokens_T) == offset
    assert padded.ids_RL.shape == (len(rows), longest)
    assert (padded.mask_RL is None) == (offset == len(rows) * longest)
    tensors = (batch.tokens_T, batch.types_T, padded.ids_RL, padded.types_RL)
    assert {t.dtype for t in tensors} == {torch.int32}
    assert {t.dtype for t in (batch.segments_B2, batch.starts_B, batch.ends_B)} == {torch.int64}


def test_no_rows_become_the_shortest_window_without_labels():
    windows = windows_of([9, 3, 7])
    batch = collate(windows, np.array([], dtype=np.int64))
    assert batch.counted == 0
    assert batch.tokens_T.tolist() == windows.tokens_T[9:12].tolist()
    assert batch.segments_B2.tolist() == [[0, 3]]
    assert (batch.starts_B.tolist(), batch.ends_B.tolist()) == ([-1], [-1])
    assert pad(batch, 0).ids_RL.shape == (1, 3)


@pytest.mark.parametrize(("last", "fill"), [(15, 1), (16, 0), (17, 15)])
def test_a_total_that_is_round_is_not_filled_up(last, fill):
    segments_B2 = torch.tensor([[0, 16], [16, last]])
    bounds, found = packed_bounds(segments_B2, Packing(multiple=16, longest=40))
    assert found == fill
    ends = [0, 16, 16 + last] + ([16 + last + fill] if fill else [])
    assert bounds.bounds_S1.tolist() == ends
    assert (bounds.longest, bounds.ends) == (40, ())  # alike for all batches that a GPU is given


def test_a_batch_does_not_share_memory_with_the_mapped_windows():
    windows = windows_of([4, 4])
    batch = collate(windows, np.array([0]))
    before = windows.tokens_T.copy()
    batch.tokens_T.zero_()
    batch.starts_B.fill_(-7)
    assert np.array_equal(windows.tokens_T, before)
    assert (windows.starts_N >= 0).all()
