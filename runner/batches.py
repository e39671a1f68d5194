"""Which windows each optimiser step sees, on which rank, and how they become tensors.

Legend: N windows of the data set, B windows of a batch, T tokens of a batch end to end, L longest
window, padded. The order is a pure function of (seed, epoch): position in it is all that a resumed
run needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runner.features import Windows, ranges

BUCKET_BATCHES = (
    50  # windows are sorted by length inside chunks of this many batches, then batches are shuffled
)


@dataclass(frozen=True)
class Batch:
    """Windows as flat tokens and segments.

    Attributes:
        rows_B: int64 numpy, positions of the windows in the data set.
        tokens_T: int64, token ids end to end.
        types_T: int64, segment ids.
        segments_B2: int64, (offset, length) of each window in tokens_T.
        starts_B: int64, label; -1 in a batch that only keeps ranks in step.
        ends_B: int64, the same for the last token.
        counted: windows that count in the loss (0 in a batch that only keeps ranks in step).
    """

    rows_B: np.ndarray
    tokens_T: Tensor
    types_T: Tensor
    segments_B2: Tensor
    starts_B: Tensor
    ends_B: Tensor
    counted: int


@dataclass(frozen=True)
class Padded:
    """A batch in the rectangular layout that every transformers model takes; segments point into [B
    * L]."""

    input_ids_BL: Tensor
    types_BL: Tensor
    mask_BL: Tensor | None
    segments_B2: Tensor


def epoch_batches(
    lengths_N: np.ndarray, batch_size: int, seed: int, epoch: int, *, buckets: bool = True
) -> list[np.ndarray]:
    """Split all windows into the batches of one epoch, each sorted by length; a short batch comes
    last.

    With `buckets`, windows of similar length share a batch: shuffle, sort inside chunks, cut,
    shuffle the batches. The first epoch begins with its two longest batches: what does not fit into
    memory fails at once (the second time with the optimiser's state in place), or not at all.

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
        size = [(lengths_N[rows].max(), lengths_N[rows].sum()) for rows in shuffled]
        longest = sorted(range(len(shuffled)), key=lambda n: size[n], reverse=True)[:2]
        others = [rows for n, rows in enumerate(shuffled) if n not in longest]
        shuffled = [shuffled[n] for n in longest] + others
    rest = order[full:]
    if len(rest):
        shuffled.append(rest[np.argsort(lengths_N[rest], kind="stable")])
    return shuffled


def rank_share(
    rows: np.ndarray, rank: int, world: int, micro_batch_size: int, micro_batches: int
) -> list[np.ndarray]:
    """Deal one step's windows to a rank, as the rows of its forward passes.

    Windows go round the ranks one by one, so that each gets the same mix of lengths. Every rank
    makes the same number of
    forward passes: a short last batch leaves some of them empty.
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


def collate(windows: Windows, rows: np.ndarray) -> Batch:
    """Gather windows into a batch; for no rows, the shortest stand-in whose labels are ignored.

    A rank without rows must still run its forward and backward pass, or the collectives of the
    others would wait.
    """
    counted = len(rows)
    if counted == 0:
        rows = np.argmin(windows.lengths_N, keepdims=True)
    firsts_B = windows.firsts_N1[rows]
    lengths_B = windows.firsts_N1[rows + 1] - firsts_B
    index_T = ranges(firsts_B, lengths_B)
    labels = (windows.starts_N[rows], windows.ends_N[rows])
    if counted == 0:
        labels = (np.full(1, -1), np.full(1, -1))
    return Batch(
        rows_B=rows,
        tokens_T=torch.from_numpy(windows.tokens_T[index_T].astype(np.int64)),
        types_T=torch.from_numpy(windows.types_T[index_T].astype(np.int64)),
        segments_B2=torch.from_numpy(
            np.stack([np.cumsum(lengths_B) - lengths_B, lengths_B], axis=1)
        ),
        starts_B=torch.from_numpy(labels[0].astype(np.int64)),
        ends_B=torch.from_numpy(labels[1].astype(np.int64)),
        counted=counted,
    )


def pad(batch: Batch, pad_id: int, multiple: int = 1) -> Padded:
    """Lay a batch out as [B, L], L its longest window rounded up to `multiple`; no mask where
    nothing was padded."""
    lengths_B = batch.segments_B2[:, 1]
    longest = -(-int(lengths_B.max()) // multiple) * multiple
    count = len(lengths_B)
    columns_L = torch.arange(longest)
    mask_BL = columns_L[None, :] < lengths_B[:, None]
    input_ids_BL = torch.full((count, longest), pad_id, dtype=torch.int64)
    types_BL = torch.zeros((count, longest), dtype=torch.int64)
    input_ids_BL[mask_BL] = batch.tokens_T
    types_BL[mask_BL] = batch.types_T
    segments_B2 = torch.stack([torch.arange(count) * longest, lengths_B], dim=1)
    full = count * longest == len(batch.tokens_T)
    return Padded(input_ids_BL, types_BL, None if full else mask_BL.to(torch.int64), segments_B2)
