"""Paired tests against counting all cases, and verdicts that say what they know."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import DataError
from runner.metrics.statistics import (
    Gap,
    bootstrap_interval,
    describe_gap,
    holm_adjusted,
    mcnemar,
    paired,
    paired_tests,
    sign_flip,
    spell_p,
)
from tests.sample_runs import predictions


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_is_the_binomial_test_of_the_flips(gained, lost):
    total = gained + lost
    ways = [math.comb(total, k) for k in range(total + 1)]
    as_rare = sum(way for way in ways if way <= ways[gained]) / 2**total
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, as_rare))


def test_mcnemar_of_many_flips():
    assert mcnemar(5200, 4800) == pytest.approx(6.6e-5, rel=0.02)  # normal: z = 3.99
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1.0
    assert 0 <= mcnemar(100_000, 0) < 1e-300


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.sampled_from([-100.0, -50.0, -25.0, 0.0, 25.0, 50.0, 100.0]), min_size=1, max_size=9
    )
)
def test_sign_flips_are_those_of_all_ways_to_flip(gaps):
    gap_N = np.array(gaps)
    moved = [abs(gap) for gap in gaps if gap]
    sums = [abs(sum(s * g for s, g in zip(signs, moved, strict=True))) for signs in
            itertools.product((1, -1), repeat=len(moved))]  # fmt: skip
    exact = sum(value >= abs(sum(gaps)) - 1e-9 for value in sums) / len(sums)
    assert sign_flip(gap_N, seed=1, flips=20_000) == pytest.approx(exact, abs=0.02)
    assert sign_flip(gap_N, 1, 500) == sign_flip(gap_N, 1, 500)


def test_p_values_are_uniform_where_neither_model_is_better():
    """Of many comparisons of equal models, a twentieth is called a difference; no more."""
    draw = np.random.default_rng(0)
    found = [sign_flip(draw.normal(0, 30, 80).round(-1), seed, 400) for seed in range(400)]
    share = np.mean([p < 0.05 for p in found])
    assert 0.02 < share < 0.08


def test_holm():
    assert holm_adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm_adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert holm_adjusted([0.2]) == [0.2]


def test_questions_are_paired_by_id_in_the_first_ones_order():
    first, second = predictions(30), predictions(30, better=4)
    pairs = paired(first, list(reversed(second))[:20])
    assert list(pairs.ids) == [row["id"] for row in first[10:]]
    assert pairs.exact_N2.shape == (20, 2)
    assert pairs.f1_N2[:, 0].tolist() == [100 * row["f1"] for row in first[10:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "elsewhere"}, "no question is in both"),
        ({"question": "Another one?"}, "question q000 is not the same in both"),
        ({"answers": ["flat"]}, "question q000 is not the same in both"),
    ],
)
def test_other_questions_are_not_compared(change, words):
    first = predictions(1)
    with pytest.raises(DataError, match=words):
        paired(first, [first[0] | change])


def test_a_verdict_by_hand():
    first, second = predictions(60), predictions(60, better=8)
    verdict = paired_tests(paired(first, second), seed=3)
    assert (len(verdict.gained), verdict.lost) == (8, ())
    assert verdict.gained == tuple(f"q{3 * n:03}" for n in range(8))
    assert verdict.exact_match.points == pytest.approx(100 * 8 / 60)
    assert verdict.exact_match.p == pytest.approx(2 / 2**8)
    gaps = np.array([100 * (b["f1"] - a["f1"]) for a, b in zip(first, second, strict=True)])
    assert verdict.f1.points == pytest.approx(gaps.mean())
    assert (verdict.f1.low, verdict.f1.high) == bootstrap_interval(gaps, 3)
    assert verdict.f1.p < 0.05
    back = paired_tests(paired(second, first), seed=3)
    assert back.lost == verdict.gained
    assert back.f1.points == pytest.approx(-verdict.f1.points)
    assert back.exact_match.p == verdict.exact_match.p


def test_equal_models_are_called_equal():
    same = paired_tests(paired(predictions(20), predictions(20)), seed=3)
    assert (same.exact_match.p, same.f1.p, same.gained, same.lost) == (1.0, 1.0, (), ())
    assert describe_gap("b", "a", same.f1, "F1", same.f1.p) == "b and a have the same F1."


def test_verdicts_in_words():
    gap = Gap(2.25, -0.5, 5.0, 0.11)
    assert describe_gap("b", "a", gap, "F1", 0.11) == (
        "b has 2.2 points higher F1 than a (95 % interval -0.5 to +5.0, p = 0.110): noise could"
        " explain that."
    )
    gap = Gap(-3.0, -5.0, -1.0, 0.0001)
    assert describe_gap("b", "a", gap, "exact match", 0.0001) == (
        "b has 3.0 points lower exact match than a (95 % interval -5.0 to -1.0, p < 0.001): more"
        " than chance over questions explains."
    )
    assert [spell_p(p) for p in (0.0009, 0.001, 0.05)] == ["< 0.001", "= 0.001", "= 0.050"]
