"""Is one model better than another, or is the gap noise? Paired tests over the same questions.

Both models answered every question, so what is tested is the difference on each question; most are
0, and the tests look at those that are not. They speak of chance over questions alone: another
seed would train another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.errors import DataError
from runner.metrics.squad import bootstrap_interval

Record = Mapping[str, Any]
FLIPS = 10_000  # of the signs, in the permutation test
CHANCE = 0.05


@dataclass(frozen=True, eq=False)
class Pairs:
    """Two models' scores of the same questions.

    Attributes:
        ids: questions, in the first model's order.
        exact_N2: bool [N, 2], whether the answer of each model matches exactly.
        f1_N2: float64 [N, 2], percent.
    """

    ids: tuple[str, ...]
    exact_N2: np.ndarray
    f1_N2: np.ndarray


@dataclass(frozen=True)
class Gap:
    """The second model's score minus the first's.

    Attributes:
        points: mean difference, in percentage points.
        low, high: its 95 % paired bootstrap interval.
        p: chance of a difference at least as large if neither model were better.
    """

    points: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """What became of the questions from the first model to the second.

    Attributes:
        exact_match: gap, tested by McNemar's exact test.
        f1: gap, tested by a permutation of signs.
        gained, lost: ids of questions that only the second, only the first model answers exactly.
    """

    exact_match: Gap
    f1: Gap
    gained: tuple[str, ...]
    lost: tuple[str, ...]


def paired(first: Sequence[Record], second: Sequence[Record]) -> Pairs:
    """Pair the predictions of two models by question.

    Raises:
        DataError: if they share no question, or one of an id has another text or right answer.
    """
    theirs = {record["id"]: record for record in second}
    both = [(record, theirs[record["id"]]) for record in first if record["id"] in theirs]
    if not both:
        raise DataError("they were scored on different data: no question is in both")
    for mine, other in both:
        if (mine["question"], mine["answers"]) != (other["question"], other["answers"]):
            raise DataError(
                f"they were scored on different data: question {mine['id']} is not the same in both"
            )
    return Pairs(
        ids=tuple(mine["id"] for mine, _ in both),
        exact_N2=np.array([[bool(r["exact_match"]) for r in pair] for pair in both]),
        f1_N2=100.0 * np.array([[r["f1"] for r in pair] for pair in both], dtype=np.float64),
    )


def judge(pairs: Pairs, seed: int) -> Verdict:
    """Compare two models."""
    first_N, second_N = pairs.exact_N2.T
    gained_N, lost_N = ~first_N & second_N, first_N & ~second_N
    exact_gap_N = 100.0 * (second_N.astype(np.float64) - first_N)
    f1_gap_N = pairs.f1_N2[:, 1] - pairs.f1_N2[:, 0]
    return Verdict(
        exact_match=Gap(
            float(exact_gap_N.mean()),
            *bootstrap_interval(exact_gap_N, seed),
            mcnemar(int(gained_N.sum()), int(lost_N.sum())),
        ),
        f1=Gap(
            float(f1_gap_N.mean()),
            *bootstrap_interval(f1_gap_N, seed),
            sign_flip(f1_gap_N, seed),
        ),
        gained=tuple(np.array(pairs.ids, dtype=object)[gained_N]),
        lost=tuple(np.array(pairs.ids, dtype=object)[lost_N]),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test (1947): were the flips tosses of a fair coin?"""
    total, fewer = gained + lost, min(gained, lost)
    if gained == lost:
        return 1.0
    log_half = total * math.log(2)
    log_all = math.lgamma(total + 1) - log_half
    tail = math.fsum(
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(total - k + 1))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def sign_flip(gap_N: np.ndarray, seed: int, flips: int = FLIPS) -> float:
    """Two-sided p of the paired permutation test of a mean (Fisher's, 1935; drawn `flips` times).

    If neither model were better, a difference had either sign with equal chance. Differences of
    equal size are drawn together: how many of them are positive is binomial.
    """
    size_U, count_U = np.unique(np.abs(gap_N[gap_N != 0]), return_counts=True)
    if not len(size_U):
        return 1.0
    draw = np.random.default_rng(seed)
    positive = draw.binomial(count_U, 0.5, size=(flips, len(count_U)))
    sums = (2 * positive - count_U) @ size_U
    reached = np.abs(sums) >= abs(gap_N.sum()) * (1 - 1e-12)
    return float((1 + reached.sum()) / (1 + flips))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): several comparisons find something by chance more easily."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = largest
    return found


def sentence(name: str, base: str, gap: Gap, metric: str, p: float) -> str:
    """The verdict in words.

    Args:
        name, base: the second and the first model.
        gap: between them.
        metric: what it is a gap of.
        p: of the gap, adjusted where there are several comparisons.
    """
    ends = f"95 % interval {gap.low:+.1f} to {gap.high:+.1f}, p {spell_p(p)}"
    if gap.points == 0 and p == 1:
        return f"{name} and {base} have the same {metric}."
    more = "higher" if gap.points > 0 else "lower"
    explained = (
        "more than chance over questions explains" if p < CHANCE else "noise could explain that"
    )
    points = f"{abs(gap.points):.1f} points {more} {metric}"
    return f"{name} has {points} than {base} ({ends}): {explained}."


def spell_p(p: float) -> str:
    """`= 0.031`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
