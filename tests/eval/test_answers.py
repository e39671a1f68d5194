"""Span search against brute force, and answers against Hugging Face's procedure, told plainly."""

from __future__ import annotations

import gc
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.eval.answers import BestSpans, Candidate, join, search
from tests.merging import answers

DATA = Path(os.environ.get("SPANTUNE_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))

NEVER = -np.inf


# ---- oracles


def all_spans(logits_L2, context, longest):
    """Every valid span as (score, start, end), best first; float32 sums."""
    start_L, end_L = logits_L2.float().numpy().T
    low, high = context
    spans = [
        (np.float32(start_L[s] + end_L[e]), s, e)
        for s in range(low, high)
        for e in range(s, min(high, s + longest))
    ]
    return sorted(
        (span for span in spans if span[0] > NEVER), key=lambda span: (-span[0], span[1], span[2])
    )


def grid_spans(logits_L2, context, longest, n_best):
    """run_qa's candidates as (score, start, end), in the order in which it sorts them."""
    start_L, end_L = logits_L2.float().numpy().T
    starts = np.argsort(-start_L, kind="stable")[:n_best].tolist()
    ends = np.argsort(-end_L, kind="stable")[:n_best].tolist()
    low, high = context
    spans = [
        (np.float32(start_L[s] + end_L[e]), s, e)
        for s in starts
        for e in ends
        if low <= s < high and low <= e < high and s <= e < s + longest
    ]
    return sorted(spans, key=lambda span: -span[0])


def run_qa_texts(
    logits_T2,
    segments,
    contexts_N2,
    question_N,
    chars_T2,
    texts,
    *,
    n_best=20,
    longest=30,
    threshold=None,
):
    """What postprocess_qa_predictions answers, by its documented steps; no threshold: SQuAD v1."""
    answered = []
    for question, text in enumerate(texts):
        listed, null_score = [], None
        for n in np.flatnonzero(np.asarray(question_N) == question):
            offset, length = segments[n]
            logits_L2, chars_L2 = (
                logits_T2[offset : offset + length],
                chars_T2[offset : offset + length],
            )
            for score, s, e in grid_spans(logits_L2, contexts_N2[n], longest, n_best):
                listed.append((score, text[chars_L2[s, 0] : chars_L2[e, 1]]))
            here = np.float32(logits_L2[0, 0].item() + logits_L2[0, 1].item())
            null_score = here if null_score is None else min(null_score, here)
        if threshold is not None:
            listed.append((null_score, ""))
        listed = sorted(listed, key=lambda entry: -entry[0])[:n_best]
        if threshold is not None and all(entry[1] for entry in listed):
            listed.append((null_score, ""))
        if not listed or (len(listed) == 1 and listed[0][1] == ""):
            listed.insert(0, (np.float32(0), "empty"))
        if threshold is None:
            answered.append(listed[0][1])
        else:
            best = next(entry for entry in listed if entry[1])
            answered.append("" if null_score - best[0] > threshold else best[1])
    return answered


# ---- inputs


def logits(kind, num, seed):
    """[num, 2] float32: all different, or with sharp peaks, or a few values that often tie."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(num, 2, generator=draw)
    if kind == "peaked":
        values = values - 4
        values[torch.randint(num, (max(1, num // 40),), generator=draw)] += 9
    if kind == "tied":
        values = values.round().clamp(-1, 1) * 0.5  # -0.0 included
    return values


def windows(seed, num=40, most=70):
    """Ragged segments out of order, with gaps; contexts, some empty, some the whole window."""
    draw = np.random.default_rng(seed)
    length_N = draw.integers(1, most, num)
    gap_N = draw.integers(0, 4, num)
    offset_N = np.cumsum(length_N + gap_N) - length_N
    low_N = draw.integers(0, length_N + 1)
    high_N = np.maximum(low_N - (draw.random(num) < 0.1), draw.integers(low_N, length_N + 1))
    low_N[::7], high_N[::7] = 0, length_N[::7]
    order = draw.permutation(num)
    segments_N2 = np.stack([offset_N, length_N], 1)[order]
    return (
        torch.from_numpy(segments_N2),
        torch.from_numpy(np.stack([low_N, high_N], 1)[order]),
        int(offset_N[-1] + length_N[-1]),
    )


def assert_found(spans: BestSpans, n, wanted, n_best):
    wanted = wanted[:n_best]
    count = len(wanted)
    found = zip(
        spans.score_NK[n].tolist(),
        spans.start_NK[n].tolist(),
        spans.end_NK[n].tolist(),
        strict=True,
    )
    assert list(found) == [(float(s), a, b) for s, a, b in wanted] + [(NEVER, -1, -1)] * (
        n_best - count
    )


# ---- search


@pytest.mark.parametrize("kind", ["random", "peaked", "tied"])
@pytest.mark.parametrize(
    ("n_best", "longest", "chunk"),
    [(1, 30, 1024), (20, 30, 7), (20, 1, 1024), (50, 200, 3), (3, 5, 1)],
)
def test_search_finds_what_brute_force_finds(kind, n_best, longest, chunk):
    segments_N2, contexts_N2, num = windows(seed=n_best)
    logits_T2 = logits(kind, num, seed=longest)
    spans = search(
        logits_T2, segments_N2, contexts_N2, n_best=n_best, max_answer_length=longest, chunk=chunk
    )
    assert (spans.score_NK.dtype, spans.start_NK.dtype, spans.end_NK.dtype) == (
        torch.float32,
        torch.int32,
        torch.int32,
    )
    for n, (offset, length) in enumerate(segments_N2.tolist()):
        wanted = all_spans(logits_T2[offset : offset + length], contexts_N2[n].tolist(), longest)
        assert_found(spans, n, wanted, n_best)


@pytest.mark.parametrize("kind", ["random", "peaked", "tied"])
@pytest.mark.parametrize(
    ("n_best", "longest", "chunk"),
    [(1, 30, 1024), (20, 30, 7), (20, 1, 1024), (50, 200, 3), (3, 5, 1)],
)
def test_run_qa_mode_finds_the_same_list_in_the_same_order(kind, n_best, longest, chunk):
    segments_N2, contexts_N2, num = windows(seed=n_best)
    logits_T2 = logits(kind, num, seed=longest)
    spans = search(
        logits_T2,
        segments_N2,
        contexts_N2,
        n_best=n_best,
        max_answer_length=longest,
        chunk=chunk,
        mode="run_qa",
    )
    for n, (offset, length) in enumerate(segments_N2.tolist()):
        wanted = grid_spans(
            logits_T2[offset : offset + length], contexts_N2[n].tolist(), longest, n_best
        )
        assert_found(spans, n, wanted, n_best)


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("-inf")]),
    st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@st.composite
def any_windows(draw):
    parts, segments, contexts, offset = [], [], [], 0
    for _ in range(draw(st.integers(0, 4))):
        length = draw(st.integers(1, 9))
        parts += draw(st.lists(st.tuples(VALUES, VALUES), min_size=length, max_size=length))
        low = draw(st.integers(0, length))
        contexts.append((low, draw(st.integers(0, length))))
        segments.append((offset, length))
        offset += length
    as_pairs = lambda rows, dtype: torch.tensor(rows, dtype=dtype).view(-1, 2)  # noqa: E731
    return (
        as_pairs(parts, torch.float32),
        as_pairs(segments, torch.int64),
        as_pairs(contexts, torch.int64),
    )


@settings(deadline=None, max_examples=150)
@given(
    case=any_windows(),
    n_best=st.integers(1, 8),
    longest=st.integers(1, 12),
    chunk=st.integers(1, 4),
)
def test_search_is_exact_for_any_logits(case, n_best, longest, chunk):
    logits_T2, segments_N2, contexts_N2 = case
    spans = search(
        logits_T2, segments_N2, contexts_N2, n_best=n_best, max_answer_length=longest, chunk=chunk
    )
    assert spans.score_NK.shape == (len(segments_N2), n_best)
    for n, (offset, length) in enumerate(segments_N2.tolist()):
        wanted = all_spans(logits_T2[offset : offset + length], contexts_N2[n].tolist(), longest)
        assert_found(spans, n, wanted, n_best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["exact", "run_qa"])
def test_half_precision_logits_are_added_in_float32(dtype, mode):
    segments_N2, contexts_N2, num = windows(seed=3)
    half_T2 = (logits("random", num, seed=3) * 50).to(dtype)
    found = search(half_T2, segments_N2, contexts_N2, mode=mode)
    whole = search(half_T2.float(), segments_N2, contexts_N2, mode=mode)
    assert all(
        torch.equal(getattr(found, name), getattr(whole, name)) for name in BestSpans.__slots__
    )
    assert not torch.equal(found.score_NK, found.score_NK.to(dtype).float())


@pytest.mark.parametrize("mode", ["exact", "run_qa"])
def test_padded_and_packed_batches_give_the_same_spans(mode):
    length_N = torch.tensor([5, 31, 17])
    low_high_N2 = torch.tensor([[2, 4], [6, 30], [0, 17]])
    padded_T2 = logits("random", 3 * 31, seed=0)
    real_T = torch.arange(31).repeat(3) < length_N.repeat_interleave(31)
    padded = search(
        padded_T2, torch.stack([torch.arange(3) * 31, length_N], 1), low_high_N2, mode=mode
    )
    packed = search(
        padded_T2[real_T],
        torch.stack([length_N.cumsum(0) - length_N, length_N], 1),
        low_high_N2,
        mode=mode,
    )
    assert all(
        torch.equal(getattr(padded, name), getattr(packed, name)) for name in BestSpans.__slots__
    )


def test_views_of_larger_tensors_are_read_rightly():
    whole = torch.randn(41)
    odd_T2, strided_T2 = whole[1:].view(20, 2), torch.randn(20, 5)[:, 1:3]
    segment, context = torch.tensor([[4, 16]]), torch.tensor([[2, 16]])
    for view_T2 in (odd_T2, strided_T2, torch.randn(20, 5)[:, 2:4], strided_T2.double()):
        assert_found(
            search(view_T2, segment, context, n_best=9), 0, all_spans(view_T2[4:], (2, 16), 30), 9
        )


def test_exact_search_beats_run_qa_where_the_best_span_is_outside_its_candidates():
    logits_T2 = torch.zeros(60, 2)
    logits_T2[:25, 0] = 9.0  # question tokens take all of run_qa's twenty starts
    logits_T2[40, 0], logits_T2[42, 1] = 5.0, 5.0
    segment, context = torch.tensor([[0, 60]]), torch.tensor([[30, 60]])
    exact = search(logits_T2, segment, context)
    assert (
        exact.start_NK[0, 0].item(),
        exact.end_NK[0, 0].item(),
        exact.score_NK[0, 0].item(),
    ) == (40, 42, 10.0)
    assert search(logits_T2, segment, context, mode="run_qa").start_NK[0, 0] == -1


@pytest.mark.parametrize("mode", ["exact", "run_qa"])
def test_broken_logits_never_leave_the_context(mode):
    logits_T2 = torch.full((3 * 20, 2), torch.nan)
    logits_T2[20:40, 0] = torch.inf
    logits_T2[20:40, 1] = torch.linspace(0, 1, 20)
    logits_T2[45:50] = 1.0
    spans = search(
        logits_T2,
        torch.tensor([[0, 20], [20, 20], [40, 20]]),
        torch.tensor([[3, 17]] * 3),
        mode=mode,
    )
    assert spans.start_NK[0].eq(-1).all()
    assert spans.score_NK[0].eq(NEVER).all()
    assert spans.score_NK[1, 0].isfinite()
    assert (spans.start_NK[1, 0] >= 3, spans.end_NK[1].max() <= 16) == (True, True)
    assert (spans.start_NK[2, 0], spans.end_NK[2, 0], spans.score_NK[2, 0]) == (5, 5, 2.0)
    assert not spans.null_score_N.isnan().any()


def test_null_score_is_taken_at_cls():
    logits_T2 = torch.arange(24.0).view(12, 2)
    segments_N2, contexts_N2 = torch.tensor([[0, 5], [5, 7]]), torch.tensor([[2, 4], [1, 1]])
    assert search(logits_T2, segments_N2, contexts_N2).null_score_N.tolist() == [1.0, 21.0]
    cls_N = torch.tensor([4, 6], dtype=torch.int32)
    assert search(logits_T2, segments_N2, contexts_N2, cls_N=cls_N).null_score_N.tolist() == [
        17.0,
        45.0,
    ]


def test_no_windows_and_no_gradient():
    none = torch.zeros(0, 2)
    spans = search(none, none.long(), none.long(), n_best=4)
    assert (spans.score_NK.shape, spans.start_NK.shape, spans.null_score_N.shape) == (
        (0, 4),
        (0, 4),
        (0,),
    )
    grad_T2 = torch.zeros(3, 2, requires_grad=True)
    spans = search(grad_T2, torch.tensor([[0, 3]]), torch.tensor([[1, 3]]))
    assert not spans.score_NK.requires_grad
    assert not spans.null_score_N.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments_N2": torch.tensor([[0, 4], [4, 7]])}, "window 1: segment"),
        ({"segments_N2": torch.tensor([[0, 4], [4, 0]])}, "window 1: segment"),
        ({"segments_N2": torch.tensor([[-1, 4], [4, 6]])}, "window 0: segment"),
        (
            {"contexts_N2": torch.tensor([[1, 5], [1, 6]])},
            r"window 0: segment \[0, 4\], context \[1, 5\]",
        ),
        ({"contexts_N2": torch.tensor([[-1, 2], [1, 6]])}, "window 0"),
        ({"cls_N": torch.tensor([0, 6])}, r"window 1: .*\[CLS\] at 6"),
        ({"cls_N": torch.tensor([0])}, "shapes"),
        ({"contexts_N2": torch.tensor([[1, 4]])}, "shapes"),
        ({"logits_T2": torch.zeros(10, 3)}, r"shape \(10, 3\)"),
        ({"n_best": 0}, "at least 1"),
        ({"max_answer_length": 0}, "at least 1"),
        ({"chunk": 0}, "at least 1"),
    ],
)
def test_wrong_calls_are_refused(change, message):
    call = {
        "logits_T2": torch.zeros(10, 2),
        "segments_N2": torch.tensor([[0, 4], [4, 6]]),
        "contexts_N2": torch.tensor([[1, 4], [1, 6]]),
    }
    search(**call)
    with pytest.raises(ValueError, match=message):
        search(**(call | change))


# ---- answers


def table(*rows, null):
    """Spans of windows, each a list of (score, start, end)."""
    most = max(map(len, rows))
    cells = np.array(
        [[*row, *[(NEVER, -1, -1)] * (most - len(row))] for row in rows], dtype=np.float64
    )
    score, start, end = torch.from_numpy(cells.reshape(len(rows), most, 3)).unbind(2)
    return BestSpans(score.float(), start.int(), end.int(), torch.tensor(null))


TEXT = "one two six ten"
WORDS = np.array([[0, 3], [4, 7], [8, 11], [12, 15]])
# A question of two windows, tokens one-six, then two-ten; and a question of one window.
TWO = {
    "question_N": np.array([0, 0, 1]),
    "segments_N2": np.array([[0, 3], [3, 3], [6, 4]]),
    "chars_T2": np.concatenate([WORDS[:3], WORDS[1:], WORDS]),
    "ids": ["a", "b"],
    "contexts": [TEXT, TEXT.upper()],
}


def test_answers_merge_windows_and_drop_repeated_characters():
    spans = table(
        [(3.0, 1, 1), (2.0, 0, 2)],
        [(4.0, 0, 0), (3.5, 2, 2), (1.0, 1, 2)],
        [(0.5, 3, 3)],
        null=[1.0, -2.0, 7.0],
    )
    first, second = answers(spans, **TWO)
    assert [(c.text, c.logit, c.start, c.end, c.window) for c in first.n_best] == [
        ("two", 4.0, 4, 7, 1),
        ("ten", 3.5, 12, 15, 1),
        ("one two six", 2.0, 0, 11, 0),
        ("six ten", 1.0, 8, 15, 1),
    ]
    weights = np.exp(np.array([4.0, 3.5, 2.0, 1.0]))
    assert [c.score for c in first.n_best] == pytest.approx((weights / weights.sum()).tolist())
    assert (first.id, first.text, first.start, first.end, first.window) == ("a", "two", 4, 7, 1)
    assert (first.score, first.null_score, first.null_difference) == (
        first.n_best[0].score,
        -2.0,
        -6.0,
    )
    assert first.null_probability == 0.0
    assert (second.id, second.text, second.score, len(second.n_best)) == ("b", "TEN", 1.0, 1)
    assert [len(answer.n_best) for answer in answers(spans, **TWO, n_best=2)] == [2, 1]


def test_equal_scores_go_to_the_lowest_characters_or_to_the_first_window():
    spans = table(
        [(1.0, 2, 2), (1.0, 1, 2)], [(1.0, 0, 1), (1.0, 0, 0)], [(0.0, 0, 0)], null=[0.0, 0.0, 0.0]
    )
    assert [c.text for c in answers(spans, **TWO)[0].n_best] == ["two", "two six", "six"]
    assert [c.text for c in answers(spans, **TWO, mode="run_qa")[0].n_best] == [
        "six",
        "two six",
        "two",
    ]
    assert [c.window for c in answers(spans, **TWO)[0].n_best] == [1, 0, 0]


@pytest.mark.parametrize("mode", ["exact", "run_qa"])
def test_the_null_answer_wins_only_above_the_threshold(mode):
    spans = table([(3.0, 1, 1)], [(2.0, 2, 2)], [(9.0, 0, 0), (4.0, 1, 1)], null=[5.0, 4.0, 4.0])
    at = {t: answers(spans, **TWO, null_threshold=t, mode=mode) for t in (0.5, 1.0, -6.0)}
    empty = at[0.5][0]
    assert (empty.text, empty.start, empty.end, empty.window) == ("", 0, 0, 1)
    assert (empty.null_score, empty.null_difference) == (
        4.0,
        1.0,
    )  # the least of the windows', against 3.0
    weights = np.exp(np.array([4.0, 3.0, 2.0]))
    assert [c.score for c in empty.n_best] == pytest.approx((weights / weights.sum()).tolist())
    assert [c.text for c in empty.n_best] == ["", "two", "ten"]
    assert empty.score == empty.null_probability == empty.n_best[0].score
    assert empty.span == empty.n_best[1]
    assert at[1.0][0].text == "two"  # 1.0 > 1.0 is false
    assert [answer.text for answer in at[-6.0]] == ["", ""]
    sure = at[0.5][1]
    assert ([c.text for c in sure.n_best], sure.text, sure.window) == (["ONE", "TWO", ""], "ONE", 0)


@pytest.mark.parametrize(("mode", "text"), [("exact", ""), ("run_qa", "empty")])
def test_a_question_without_any_span(mode, text):
    none = replace(
        table([(0.0, 0, 0)], [], [], null=[1.0, 2.0, -1.0]), score_NK=torch.full((3, 1), NEVER)
    )
    for answer in answers(none, **TWO, mode=mode):
        assert (answer.text, answer.n_best, answer.score, answer.window) == (text, (), 0.0, -1)
        assert answer.null_probability == 0.0
    empty, kept = answers(none, **TWO, mode=mode, null_threshold=0.0)
    assert (empty.text, empty.score, empty.null_difference) == ("", 1.0, 1.0)
    assert (kept.text, kept.n_best) == (text, (Candidate("", 1.0, -1.0, 0, 0, 0),))
    assert kept.span is None


def test_tokens_without_characters_answer_only_in_run_qa_mode():
    blank = TWO | {"chars_T2": np.concatenate([[[0, 3], [4, 4], [8, 11]], WORDS[1:], WORDS])}
    spans = table([(5.0, 1, 1), (1.0, 0, 0)], [], [(1.0, 0, 0)], null=[0.0, 0.0, 0.0])
    assert [answers(spans, **blank, mode=mode)[0].text for mode in ("exact", "run_qa")] == [
        "one",
        "",
    ]
    assert answers(spans, **blank, mode="run_qa", null_threshold=0.0)[0].text == "one"
    alone = table([(5.0, 1, 1)], [], [(1.0, 0, 0)], null=[0.0, 0.0, 0.0])
    assert [answers(alone, **blank, mode=mode)[0].text for mode in ("exact", "run_qa")] == [
        "",
        "empty",
    ]


def test_tokens_without_characters_alone_answer_nothing():
    blank = TWO | {"chars_T2": np.concatenate([[[0, 3], [4, 4], [8, 8]], WORDS[1:], WORDS])}
    spans = table([(5.0, 1, 1), (4.0, 2, 2)], [], [(1.0, 0, 0)], null=[0.0, 0.0, 0.0])
    exact, run_qa = (answers(spans, **blank, mode=mode)[0] for mode in ("exact", "run_qa"))
    assert (exact.text, exact.window, run_qa.text, run_qa.window) == ("", -1, "", 0)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    was_enabled = gc.isenabled()
    spans = table([(1.0, 0, 0)], [(1.0, 0, 0)], [(1.0, 0, 0)], null=[0.0, 0.0, 0.0])
    try:
        (gc.enable if enabled else gc.disable)()
        answers(spans, **TWO)
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="n_best"):
            answers(spans, **TWO, n_best=0)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize(
    "change",
    [
        {"question_N": np.array([0, 1, 0])},
        {"question_N": np.array([0, 0, 0])},
        {"question_N": np.array([1, 1, 1])},
        {"question_N": np.array([0, 0, 2])},
        {"question_N": np.array([-1, 0, 1])},
        {"question_N": np.array([0, 1, 2])},
        {"question_N": np.array([0, 2, 2]), "ids": ["a", "b", "c"], "contexts": [TEXT] * 3},
        {"question_N": np.array([0, 1])},
        {"contexts": [TEXT]},
        {"segments_N2": np.array([[0, 3]])},
        {"n_best": 0},
    ],
)
def test_answers_refuse_arrays_that_do_not_fit(change):
    spans = table([(1.0, 0, 0)], [(1.0, 0, 0)], [(1.0, 0, 0)], null=[0.0, 0.0, 0.0])
    assert len(answers(spans, **TWO)) == 2
    with pytest.raises(ValueError, match="question"):
        answers(spans, **(TWO | change))


def test_no_questions_have_no_answers():
    none = search(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2))
    pairs = np.zeros((0, 2), dtype=np.int64)
    assert (
        answers(none, np.zeros(0, np.int64), segments_N2=pairs, chars_T2=pairs, ids=[], contexts=[])
        == []
    )


@settings(deadline=None, max_examples=150)
@given(
    case=any_windows().filter(lambda case: len(case[1])),
    cuts=st.lists(st.booleans(), min_size=4, max_size=4),
    threshold=st.none() | st.sampled_from([-1.0, 0.0, 2.5]),
    n_best=st.integers(2, 6),
    longest=st.integers(1, 6),
)
def test_run_qa_answers_are_those_of_the_recipe(case, cuts, threshold, n_best, longest):
    logits_T2, segments_N2, contexts_N2 = case
    # The recipe lists spans of score -inf, search does not. On a grid where sums are exact: the
    # recipe adds in float32, where a null score may round up to the threshold.
    logits_T2 = (1024 * logits_T2.nan_to_num(neginf=-9.0)).round() / 1024
    question_N = np.cumsum([0, *cuts[: len(segments_N2) - 1]])
    texts = [f"{question}bcdefghijklmnopqrstuvwxyz" for question in range(question_N[-1] + 1)]
    # Token t of any window is character t: a question's windows repeat each other's answers.
    char_T = np.concatenate([np.arange(length) for length in segments_N2[:, 1].tolist()])
    chars_T2 = np.stack([char_T, char_T + 1], 1)
    spans = search(
        logits_T2, segments_N2, contexts_N2, n_best=n_best, max_answer_length=longest, mode="run_qa"
    )
    found = answers(
        spans, question_N, segments_N2=segments_N2.numpy(), chars_T2=chars_T2,
        ids=texts, contexts=texts,
        n_best=n_best, null_threshold=threshold, mode="run_qa",
    )  # fmt: skip
    wanted = run_qa_texts(
        logits_T2, segments_N2.tolist(), contexts_N2.tolist(), question_N, chars_T2, texts,
        n_best=n_best, longest=longest, threshold=threshold,
    )  # fmt: skip
    assert [answer.text for answer in found] == wanted
    for answer in found:
        assert sum(candidate.score for candidate in answer.n_best) == pytest.approx(
            1.0 if answer.n_best else 0.0
        )
        assert [c.logit for c in answer.n_best] == sorted(
            (c.logit for c in answer.n_best), reverse=True
        )


# ---- real contexts


def word_windows(name, longest=120, step=80):
    """Windows over a data file's questions: [CLS], 10 tokens, words of the context, padding."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    paragraphs = [
        p for article in json.loads(path.read_text("utf-8"))["data"] for p in article["paragraphs"]
    ]
    texts, question_N, context_N2, chars = [], [], [], []
    for paragraph in paragraphs:
        word_chars = [match.span() for match in re.finditer(r"\w+|[^\w\s]", paragraph["context"])]
        for _ in paragraph["qas"]:
            for first in range(0, max(1, len(word_chars) - longest + step), step):
                here = word_chars[first : first + longest]
                question_N.append(len(texts))
                context_N2.append((11, 11 + len(here)))
                chars.append(np.array([(0, 0)] * 11 + here + [(0, 0)] * (longest - len(here) + 1)))
            texts.append(paragraph["context"])
    segments = [(n * (longest + 12), longest + 12) for n in range(len(question_N))]
    return np.array(question_N), segments, context_N2, np.concatenate(chars), texts


@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("threshold", [None, 0.0])
def test_run_qa_texts_on_real_contexts(kind, threshold):
    question_N, segments, context_N2, chars_T2, texts = word_windows("xquad_en_v1.1.json")
    assert len(question_N) > len(texts) > 1000
    logits_T2 = logits(kind, len(chars_T2), seed=5)
    spans = search(logits_T2, torch.tensor(segments), torch.tensor(context_N2), mode="run_qa")
    found = answers(
        spans, question_N, segments_N2=np.array(segments), chars_T2=chars_T2,
        ids=texts, contexts=texts,
        null_threshold=threshold, mode="run_qa",
    )  # fmt: skip
    wanted = run_qa_texts(
        logits_T2, segments, context_N2, question_N, chars_T2, texts, threshold=threshold
    )
    assert [answer.text for answer in found] == wanted
    assert len(set(wanted)) > 500
    for answer, text in zip(found, texts, strict=True):
        assert all(
            candidate.text == text[candidate.start : candidate.end] for candidate in answer.n_best
        )
        assert len({(c.start, c.end) for c in answer.n_best}) == len(answer.n_best)


def test_joined_batches_are_the_whole():
    segments_N2, contexts_N2, num = windows(seed=1)
    logits_T2 = logits("random", num, seed=1)
    whole = search(logits_T2, segments_N2, contexts_N2)
    parts = [
        search(logits_T2, segments_N2[i : i + 9], contexts_N2[i : i + 9]) for i in range(0, 40, 9)
    ]
    assert all(
        torch.equal(getattr(join(parts), name), getattr(whole, name))
        for name in BestSpans.__slots__
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", ["exact", "run_qa"])
@pytest.mark.parametrize("kind", ["random", "peaked", "tied"])
def test_gpu_finds_the_same(mode, kind):
    segments_N2, contexts_N2, num = windows(seed=2, num=300, most=400)
    logits_T2 = logits(kind, num, seed=2)
    here = search(logits_T2, segments_N2, contexts_N2, mode=mode)
    there = search(logits_T2.cuda(), segments_N2, contexts_N2, mode=mode)
    assert there.score_NK.is_cuda
    assert all(
        torch.equal(getattr(here, name), getattr(there.cpu(), name)) for name in BestSpans.__slots__
    )
