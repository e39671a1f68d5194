"""Which windows each optimiser step sees, and on which rank.

The order is a pure function of (seed, epoch): the position in it is all that a resumed run needs to
know.

Legend: N windows of the data set, E of an epoch, Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.job.schema import BatchLayout, Train

# Windows are sorted by length inside chunks of this many batches, then batches are shuffled.
BUCKET_BATCHES = 50


def epoch_batches(
    lengths_N: np.ndarray, batch_size: int, seed: int, epoch: int, *, buckets: bool = True
) -> list[np.ndarray]:
    """Split all windows into the batches of one epoch, each sorted by length; a short batch comes
    last.

    With `buckets`, windows of similar length share a batch: shuffle, sort inside chunks, cut,
    shuffle the batches. The first epoch begins with its largest full batches (see
    `_largest_first`), so that what does not fit into memory fails in the first steps. Later epochs
    draw other batches; without buckets one of theirs may be a few percent larger.

    Args:
        lengths_N: tokens of each window.
        batch_size: windows per optimiser step over all ranks.
        seed: the job's seed.
        epoch: from 0.
        buckets: False cuts batches from the shuffled order as it is.

    Returns:
        Arrays of window positions, int64; together a permutation of arange(N).
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths_N))
    full = len(order) // batch_size * batch_size
    chunk = BUCKET_BATCHES * batch_size if buckets else batch_size
    batches: list[np.ndarray] = []
    for place in range(0, full, chunk):
        rows = order[place : min(place + chunk, full)]
        rows = rows[np.argsort(lengths_N[rows], kind="stable")]
        batches += np.split(rows, len(rows) // batch_size)
    shuffled = [batches[n] for n in generator.permutation(len(batches))]
    if epoch == 0:
        shuffled = _largest_first(lengths_N, shuffled)
    rest = order[full:]
    if len(rest):
        shuffled.append(rest[np.argsort(lengths_N[rest], kind="stable")])
    return shuffled


def _largest_first(lengths_N: np.ndarray, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Move the full batches that need the most memory to the front; all others keep their order."""
    # The two of most tokens bound the memory of packed steps, the two with the longest windows that
    # of padded ones. Two of each, since the second meets the optimiser's state; both kinds, since
    # packed and padded runs train in one order.
    tokens = [int(lengths_N[rows].sum()) for rows in batches]
    longest = [int(lengths_N[rows].max()) for rows in batches]
    places = range(len(batches))
    by_tokens = sorted(places, key=lambda n: (tokens[n], longest[n]), reverse=True)[:2]
    by_longest = sorted(places, key=lambda n: (longest[n], tokens[n]), reverse=True)[:2]
    pairs = zip(by_tokens, by_longest, strict=True)
    front = list(dict.fromkeys(n for pair in pairs for n in pair))
    return [batches[n] for n in front] + [batches[n] for n in places if n not in front]


def rank_passes(
    rows: np.ndarray, rank: int, world: int, micro_batch_size: int, micro_batches: int
) -> list[np.ndarray]:
    """Deal one step's windows to a rank, as the rows of its forward passes.

    Windows go round the ranks one by one, so that each gets the same mix of lengths. Every rank
    makes the same number of forward passes: a short last batch leaves some of them empty.
    """
    mine = rows[rank::world]
    return [mine[n * micro_batch_size : (n + 1) * micro_batch_size] for n in range(micro_batches)]


def score_batches(
    lengths_N: np.ndarray, batch_size: int, rank: int, world: int
) -> list[np.ndarray]:
    """Share all windows out for scoring, longest first, the same number of batches on every rank
    (some may be empty)."""
    order = np.argsort(-lengths_N, kind="stable")
    batches = [order[place : place + batch_size] for place in range(0, len(order), batch_size)]
    while len(batches) % world:
        batches.append(order[:0])
    return batches[rank::world]


@dataclass(frozen=True)
class WeightedSet:
    """The windows of one of several training sets, and how often they are seen in an epoch.

    An epoch takes as many windows as the last one did, from where that one ended in an endless
    row of passes over the set; each pass goes through all questions in an order of its own, a
    question's windows together. So no question is seen a second time more often than another, and
    all epochs have the same number of steps.

    Attributes:
        first: place of the set's first window.
        questions_N: the question of each of its windows, ascending.
        weight: passes in an epoch, to the nearest window.
    """

    first: int
    questions_N: np.ndarray
    weight: float

    @property
    def count(self) -> int:
        """Its windows in an epoch."""
        return max(1, round(self.weight * len(self.questions_N)))

    def windows(self, seed: int, place: int, epoch: int) -> np.ndarray:
        """Places of its windows in an epoch, counted from 0; `place` is that of the set among the
        others."""
        begin, size = epoch * self.count, len(self.questions_N)
        first = begin // size
        passes = range(first, -(-(begin + self.count) // size))
        row = np.concatenate([self._pass(seed, number, place) for number in passes])
        return self.first + row[begin - first * size :][: self.count]

    def _pass(self, seed: int, number: int, place: int) -> np.ndarray:
        # The last number is never 0, so that no order is drawn as `epoch_batches` draws its own.
        generator = np.random.default_rng([seed, number, place + 1])
        of_question = np.unique(self.questions_N, return_inverse=True)[1]
        order_Q = generator.permutation(int(of_question[-1]) + 1)
        return np.argsort(order_Q[of_question], kind="stable")


@dataclass(frozen=True)
class TrainSampler:
    """Deals the training windows to optimiser steps, ranks and forward passes.

    Attributes:
        lengths_N: tokens of each window.
        section: the job's [train].
        layout: how a step's windows are spread over ranks and passes.
        seed: the job's.
        rank: this rank's index.
        sets: the sets that the windows are of; none where each is seen once in an epoch.
    """

    lengths_N: np.ndarray
    section: Train
    layout: BatchLayout
    seed: int
    rank: int
    sets: Sequence[WeightedSet] = ()

    @property
    def windows(self) -> int:
        """Windows of one epoch; with `sets` some may be there several times."""
        return sum(one.count for one in self.sets) if self.sets else len(self.lengths_N)

    @property
    def steps(self) -> int:
        """Optimiser steps of one epoch; the last may be a short one."""
        return -(-self.windows // self.section.batch_size)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The windows of each step of an epoch, counted from 1; see `epoch_batches`."""
        size, buckets = self.section.batch_size, self.section.length_buckets
        sets = enumerate(self.sets)
        drawn = [one.windows(self.seed, place, epoch - 1) for place, one in sets]
        rows_E = np.concatenate(drawn) if drawn else np.arange(len(self.lengths_N))
        batches = epoch_batches(self.lengths_N[rows_E], size, self.seed, epoch - 1, buckets=buckets)
        return [rows_E[batch] for batch in batches]

    def passes(self, rows: np.ndarray) -> list[np.ndarray]:
        """This rank's forward passes of one step over the windows at `rows`."""
        layout = self.layout
        return rank_passes(
            rows, self.rank, layout.world, layout.micro_batch_size, layout.micro_batches
        )

    def weight(self, counted: int, rows: np.ndarray) -> float:
        """What the mean loss of a pass over `counted` windows weighs in a step over `rows`.

        DeepSpeed averages over ranks and passes; weighted so, a step's gradient is the mean over
        its windows even where a short last batch leaves ranks with unequal shares.
        """
        return counted * self.layout.world * self.layout.micro_batches / len(rows)
