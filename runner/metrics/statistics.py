"""Is one model better than another, or is the gap noise? Paired tests over the same questions.

Both models answered every question, so what is tested is the difference on each question; most are
0, and the tests look at those that are not. They speak of chance over questions alone: another
seed would train another model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.errors import DataError
from runner.metrics.squad import Scores, ScoresV2

PredictionRecord = Mapping[str, Any]

FLIPS = 10_000  # of the signs, in the permutation test

CHANCE = 0.05

Interval = tuple[float, float]

LEVEL = 0.95

RESAMPLES = 2000

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

_Z = statistics.NormalDist().inv_cdf(0.975)


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
class PairedTest:
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


def paired(first: Sequence[PredictionRecord], second: Sequence[PredictionRecord]) -> Pairs:
    """Pair the predictions of two models by question.

    Raises:
        DataError: if they share no question, or one of an id has another text or right answer.
    """
    by_id = {record["id"]: record for record in second}
    both = [(record, by_id[record["id"]]) for record in first if record["id"] in by_id]
    if not both:
        raise DataError("they were scored on different data: no question is in both")
    for one, other in both:
        if (one["question"], one["answers"]) != (other["question"], other["answers"]):
            raise DataError(
                f"they were scored on different data: question {one['id']} is not the same in both"
            )
    return Pairs(
        ids=tuple(one["id"] for one, _ in both),
        exact_N2=np.array([[bool(r["exact_match"]) for r in pair] for pair in both]),
        f1_N2=100.0 * np.array([[r["f1"] for r in pair] for pair in both], dtype=np.float64),
    )


def paired_tests(pairs: Pairs, seed: int) -> PairedTest:
    """Compare two models."""
    first_N, second_N = pairs.exact_N2.T
    gained_N, lost_N = ~first_N & second_N, first_N & ~second_N
    exact_gap_N = 100.0 * (second_N.astype(np.float64) - first_N)
    f1_gap_N = pairs.f1_N2[:, 1] - pairs.f1_N2[:, 0]
    return PairedTest(
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


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): several comparisons find something by chance more easily."""
    ascending = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for nth, place in enumerate(ascending):
        largest = max(largest, min(1.0, (len(p_values) - nth) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def describe_gap(name: str, base: str, gap: Gap, metric: str, p: float) -> str:
    """What a test of a gap says, as a sentence.

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


def bootstrap_interval(
    values: np.ndarray, seed: int, level: float = LEVEL, resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron, 1979); the same seed gives the same interval.

    N questions are drawn with replacement. Since scores of questions take few different values, how
    often each value is drawn is drawn instead, from the multinomial distribution that the N draws
    have: a million questions cost what a thousand do.

    Args:
        values: [N] one number per question, N >= 1, such as Scores.f1_N.
        seed: of numpy's default generator.
        level: share of the resampled means that lies inside.
        resamples: how often N questions are drawn again.

    Returns:
        Lower and upper end, in the unit of the values.

    Raises:
        ValueError: no values, one that is no number, a level outside (0, 1), or no resamples.
    """
    value_N = np.asarray(values, dtype=np.float64)
    if value_N.ndim != 1 or not len(value_N) or not 0 < level < 1 or resamples < 1:
        raise ValueError("needs values of shape [N], N >= 1, 0 < level < 1 and resamples >= 1")
    if not np.isfinite(value_N).all():
        raise ValueError("a value is not a finite number")
    value_U, count_U = np.unique(value_N, return_counts=True)
    draw = np.random.default_rng(seed)
    means, rows = [], max(1, 1_000_000 // len(value_U))  # a few MB at a time
    for done in range(0, resamples, rows):
        size = min(rows, resamples - done)
        drawn = draw.multinomial(len(value_N), count_U / len(value_N), size=size)
        means.append(drawn @ value_U / len(value_N))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(scores: Scores | ScoresV2, seed: int) -> dict[str, Interval]:
    """Bootstrap interval of exact match and F1, for SQuAD v2 also over questions with and without
    an answer."""
    rows = {"": np.full(scores.total, True)}
    if isinstance(scores, ScoresV2):
        if scores.has_answer is not None:
            rows["has_answer_"] = scores.has_answer_N
        if scores.no_answer is not None:
            rows["no_answer_"] = ~scores.has_answer_N
    found = {}
    for part, chosen_N in rows.items():
        for name, value_N in (("exact_match", scores.exact_N), ("f1", scores.f1_N)):
            if (part, name) != ("no_answer_", "f1"):  # the same as its exact match
                found[f"{part}{name}"] = bootstrap_interval(value_N[chosen_N], seed)
    return found


def half_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of a mean of few values (Student's t); None of fewer than two."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    # Beyond the table, the first term of the expansion around the normal quantile.
    t = _T[freedom - 1] if freedom <= len(_T) else _Z + (_Z**3 + _Z) / (4 * freedom)
    return t * statistics.stdev(values) / math.sqrt(len(values))


def half_interval_of_many(values: Sequence[float]) -> float | None:
    """The same of many values, by the normal distribution."""
    if len(values) < 2:
        return None
    return _Z * statistics.stdev(values) / math.sqrt(len(values))
