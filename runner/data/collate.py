"""Windows of a data set as a batch on the host, and the bounds of windows that are packed.

Legend: B windows of a batch, T tokens of a batch end to end, S segments of a packed batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runner.data.windows import Windows


@dataclass(frozen=True)
class HostBatch:
    """Windows end to end, and their labels.

    Attributes:
        rows_B: int64 numpy, positions of the windows in the data set.
        firsts_B: int64 numpy, where each window begins in the data set's tokens.
        segments_B2: int64, (offset, length) of each window in this batch's tokens.
        starts_B: int64, label; -1 in a batch that only keeps ranks in step.
        ends_B: int64, the same for the last token.
        counted: windows that count in the loss (0 in a batch that only keeps ranks in step).
        tokens_T: int32, token ids end to end; None where the device has the data set's.
        types_T: int32, segment ids, or None.
    """

    rows_B: np.ndarray
    firsts_B: np.ndarray
    segments_B2: Tensor
    starts_B: Tensor
    ends_B: Tensor
    counted: int
    tokens_T: Tensor | None
    types_T: Tensor | None


class Bounds(NamedTuple):
    """Where the windows of a packed batch begin and end.

    Attributes:
        bounds_S1: int32 on the batch's device: 0, then the end of each segment; the last is T.
        longest: an upper bound of the segments' lengths, the same for every batch of a run.
        ends: on a CPU the same bounds as Python numbers; for a GPU empty.
    """

    bounds_S1: Tensor
    longest: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """How batches are packed.

    Attributes:
        first_position: position id of a window's first token (RoBERTa counts from behind its
            padding's).
        multiple: totals are rounded up to this; 1 packs exactly.
        longest: tokens of the longest window of the run.
    """

    first_position: int = 0
    multiple: int = 1
    longest: int = 0


def collate(windows: Windows, rows: np.ndarray, *, tokens: bool = True) -> HostBatch:
    """Gather the windows at `rows`, with or without their tokens; for no rows, the shortest window
    as a stand-in whose labels are ignored.

    A rank without rows must still run its forward and backward pass, or the collectives of the
    others would wait.
    """
    counted = len(rows)
    if counted == 0:
        rows = np.argmin(windows.lengths_N, keepdims=True)
    firsts_B, lasts_B = windows.firsts_N1[rows], windows.firsts_N1[rows + 1]
    lengths_B = lasts_B - firsts_B
    segments_B2 = np.empty((len(rows), 2), dtype=np.int64)
    np.subtract(lengths_B.cumsum(), lengths_B, out=segments_B2[:, 0])
    segments_B2[:, 1] = lengths_B
    starts_B, ends_B = windows.starts_N[rows], windows.ends_N[rows]
    if counted == 0:
        starts_B, ends_B = np.full((2, 1), -1)
    tokens_T = types_T = None
    if tokens:
        slices = list(map(slice, firsts_B.tolist(), lasts_B.tolist()))
        tokens_T = torch.from_numpy(join_slices(windows.tokens_T, slices))
        types_T = torch.from_numpy(join_slices(windows.types_T, slices).astype(np.int32))
    return HostBatch(
        rows_B=rows,
        firsts_B=firsts_B,
        segments_B2=torch.from_numpy(segments_B2),
        starts_B=torch.from_numpy(starts_B.astype(np.int64)),
        ends_B=torch.from_numpy(ends_B.astype(np.int64)),
        counted=counted,
        tokens_T=tokens_T,
        types_T=types_T,
    )


def packed_bounds(segments_B2: Tensor, packing: Packing) -> tuple[Bounds, int]:
    """Where the windows of a packed batch end, on the CPU, and how many tokens fill it up."""
    offsets, lengths = segments_B2.numpy().T.tolist()
    total = offsets[-1] + lengths[-1]
    on_gpu = packing.multiple > 1
    fill = -total % packing.multiple
    ends = [*offsets, total, total + fill] if fill else [*offsets, total]
    # With or without a filled-up end, the same bound for every batch.
    longest = max(packing.longest, packing.multiple if on_gpu else 0, *lengths)
    bounds_S1 = torch.from_numpy(np.array(ends, dtype=np.int32))
    return Bounds(bounds_S1, longest, () if on_gpu else tuple(ends)), fill


def join_slices(values: np.ndarray, slices: list[slice]) -> np.ndarray:
    """Copy slices of an array end to end.

    Python cuts and joins the memory itself: numpy takes half as long again for slices of a few
    hundred tokens, and an index of each token would cost more than its copy.
    """
    memory = values.data
    return np.frombuffer(bytearray().join([memory[part] for part in slices]), dtype=values.dtype)
