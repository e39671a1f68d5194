"""Exact answers against brute force over all spans of a question's windows."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.eval import answers as spans_module
from runner.eval.answers import Answer, Candidate, decide, search
from tests.merging import answers

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@st.composite
def questions(draw):
    """Questions of 1 to 3 overlapping windows over a context of up to 12 tokens.

    Logits are random, sharply peaked, or of three values that tie everywhere; a token is one
    character, so that the same characters are found in several windows.
    """
    kind = draw(st.sampled_from(["random", "peaked", "tied"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    segments, contexts, chars, question, parts, texts = [], [], [], [], [], []
    for number in range(draw(st.integers(1, 4))):
        size = draw(st.integers(0, 12))
        texts.append(LETTERS[:size])
        for _ in range(draw(st.integers(1, 3))):
            first = draw(st.integers(0, size))
            last = draw(st.integers(first, size))
            front = draw(st.integers(1, 3))  # [CLS] and a question
            length = front + last - first + 1
            segments.append((sum(map(len, parts)), length))
            contexts.append((front, front + last - first))
            chars.append([(0, 0)] * front + [(c, c + 1) for c in range(first, last)] + [(0, 0)])
            question.append(number)
            values = generator.normal(size=(length, 2))
            if kind == "peaked":
                values[generator.integers(length)] += 20
            if kind == "tied":
                values = values.round().clip(-1, 1) * 0.5
            parts.append(values.astype(np.float32))
    return np.concatenate(parts), segments, contexts, np.concatenate(chars), question, texts


def by_hand(case, longest, n_best, threshold):
    """Each question's n-best as (text, logit, start, end, window), and its answer's text."""
    logits_T2, segments, contexts, chars_T2, question_N, texts = case
    listed, chosen = [], []
    for number, text in enumerate(texts):
        rows = [n for n, q in enumerate(question_N) if q == number]
        found = {}
        for window, row in enumerate(rows):
            offset, (low, high) = segments[row][0], contexts[row]
            for s in range(low, high):
                for e in range(s, min(high, s + longest)):
                    place = int(chars_T2[offset + s, 0]), int(chars_T2[offset + e, 1])
                    score = float(logits_T2[offset + s, 0] + logits_T2[offset + e, 1])
                    if place not in found or score > found[place][0]:
                        found[place] = score, window
        order = sorted(found, key=lambda place: (-found[place][0], *place))[:n_best]
        mine = [(text[a:b], found[a, b][0], a, b, found[a, b][1]) for a, b in order]
        null, window = min(
            (float(logits_T2[segments[row][0]].sum()), window) for window, row in enumerate(rows)
        )
        best = mine[0] if mine else ("", 0.0, 0, 0, -1)
        if threshold is not None:
            place = sum(entry[1] >= null for entry in mine)
            mine.insert(place, ("", null, 0, 0, window))
        listed.append(mine)
        empty = threshold is not None and null - best[1] > threshold
        chosen.append("" if empty else best[0])
    return listed, chosen


def found_in(case, longest=30, n_best=20, **options):
    logits_T2, segments, contexts, chars_T2, question_N, texts = case
    segments_N2 = torch.tensor(segments)
    spans = search(
        torch.from_numpy(logits_T2),
        segments_N2,
        torch.tensor(contexts),
        n_best=n_best,
        max_answer_length=longest,
        chunk=options.pop("chunk", 1024),
    )
    return answers(
        spans, np.array(question_N), segments_N2=segments_N2.numpy(), chars_T2=chars_T2,
        ids=list(map(str, range(len(texts)))), contexts=texts, n_best=n_best, **options,
    )  # fmt: skip


def rows(answer: Answer):
    return [(c.text, c.logit, c.start, c.end, c.window) for c in answer.n_best]


@settings(deadline=None, max_examples=200)
@given(
    case=questions(),
    longest=st.integers(1, 8),
    n_best=st.integers(1, 6),
    threshold=st.none() | st.sampled_from([-1.0, 0.0, 2.5]),
    chunk=st.integers(1, 3),
)
def test_exact_answers_are_the_best_of_all_spans_of_all_windows(
    case, longest, n_best, threshold, chunk
):
    found = found_in(case, longest, n_best, null_threshold=threshold, chunk=chunk)
    listed, chosen = by_hand(case, longest, n_best, threshold)
    assert [rows(answer) for answer in found] == listed
    assert [answer.text for answer in found] == chosen
    for answer in found:
        weights = np.exp([c.logit for c in answer.n_best])
        assert [c.score for c in answer.n_best] == pytest.approx((weights / weights.sum()).tolist())


def test_where_all_is_equal_the_lowest_start_comes_first_then_the_lowest_end():
    chars = np.array([(0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (0, 0)])
    case = (np.zeros((6, 2), np.float32), [(0, 6)], [(1, 5)], chars, [0], ["abcd"])
    texts = [c.text for c in found_in(case, n_best=6)[0].n_best]
    assert texts == ["a", "ab", "abc", "abcd", "b", "bc"]


@settings(deadline=None, max_examples=100)
@given(
    case=questions(),
    keep=st.integers(1, 4),
    threshold=st.none() | st.sampled_from([-1.0, 0.0, 2.5]),
)
def test_a_shorter_list_changes_nothing_else(case, keep, threshold):
    whole = found_in(case, null_threshold=threshold)
    short = found_in(case, null_threshold=threshold, n_listed=keep)
    for long, kept in zip(whole, short, strict=True):
        assert replace(kept, n_best=long.n_best) == long
        head = long.n_best[:keep]
        assert kept.n_best[: len(head)] == head
        assert kept.span == long.span
        assert len(kept.n_best) <= keep + 1


@settings(deadline=None, max_examples=100)
@given(case=questions(), first=st.sampled_from([-2.0, 0.0, 9.0]), then=st.floats(-3, 3))
def test_deciding_anew_is_answering_with_another_threshold(case, first, then):
    made = found_in(case, null_threshold=first)
    assert [decide(answer, then) for answer in made] == found_in(case, null_threshold=then)


def test_deciding_anew_in_run_qa_mode_without_a_span():
    null = Candidate("", 1.0, -1.0, 0, 0, 0)
    answer = Answer("a", "", 1.0, 0, 0, 0, -1.0, 1.0, -1.0, 0, (null,))
    assert decide(answer, 0.0, "run_qa").text == "empty"
    assert decide(answer, 0.0).text == ""
    assert decide(answer, -2.0, "run_qa").score == 1.0


@settings(deadline=None, max_examples=60)
@given(case=questions(), threshold=st.none() | st.just(0.0), size=st.integers(1, 3))
def test_questions_merged_in_groups_are_those_merged_at_once(case, threshold, size):
    at_once = found_in(case, null_threshold=threshold)
    with patch.object(spans_module, "_QUESTIONS", size):
        assert found_in(case, null_threshold=threshold) == at_once


def test_a_list_keeps_at_least_one():
    case = (np.zeros((3, 2), np.float32), [(0, 3)], [(1, 2)], np.array([(0, 1)] * 3), [0], ["a"])
    with pytest.raises(ValueError, match="keep"):
        found_in(case, n_listed=0)
