"""Which windows each optimiser step sees, on which rank, and how they become tensors.

Legend: N windows of the data set, B windows of a batch, T tokens of a batch end to end, L longest
window, padded, S segments of a packed batch. The order is a pure function of (seed, epoch):
position in it is all that a resumed run needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runner.data.windows import Windows


@dataclass(frozen=True)
class Batch:
    """Windows as flat tokens and segments.

    Attributes:
        rows_B: int64 numpy, positions of the windows in the data set.
        tokens_T: int32, token ids end to end.
        types_T: int32, segment ids.
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
class Outline:
    """A batch without its tokens: as in Batch, and where each window begins in the data set's
    (`firsts_B`, int64 numpy)."""

    rows_B: np.ndarray
    firsts_B: np.ndarray
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
class Packed:
    """A batch end to end in one row; for a GPU, where its length is not yet one of few, a last
    segment that nobody reads rounds it up."""

    input_ids_1T: Tensor
    types_1T: Tensor
    positions_1T: Tensor
    segments_B2: Tensor
    bounds: Bounds


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


def outline(windows: Windows, rows: np.ndarray) -> Outline:
    """What is known of a batch without its tokens; for no rows, of the shortest stand-in whose
    labels are ignored.

    A rank without rows must still run its forward and backward pass, or the collectives of the
    others would wait.
    """
    counted = len(rows)
    if counted == 0:
        rows = np.argmin(windows.lengths_N, keepdims=True)
    firsts_B = windows.firsts_N1[rows]
    lengths_B = windows.firsts_N1[rows + 1] - firsts_B
    segments_B2 = np.empty((len(rows), 2), dtype=np.int64)
    np.subtract(lengths_B.cumsum(), lengths_B, out=segments_B2[:, 0])
    segments_B2[:, 1] = lengths_B
    starts_B, ends_B = windows.starts_N[rows], windows.ends_N[rows]
    if counted == 0:
        starts_B, ends_B = np.full((2, 1), -1)
    return Outline(
        rows_B=rows,
        firsts_B=firsts_B,
        segments_B2=torch.from_numpy(segments_B2),
        starts_B=torch.from_numpy(starts_B.astype(np.int64)),
        ends_B=torch.from_numpy(ends_B.astype(np.int64)),
        counted=counted,
    )


def collate(windows: Windows, rows: np.ndarray) -> Batch:
    """Gather windows into a batch; for no rows, the stand-in of `outline`."""
    found = outline(windows, rows)
    high_B = found.firsts_B + found.segments_B2.numpy()[:, 1]
    slices = list(map(slice, found.firsts_B.tolist(), high_B.tolist()))
    tokens_T = _joined(windows.tokens_T, slices)
    types_T = _joined(windows.types_T, slices).astype(np.int32)
    return Batch(
        rows_B=found.rows_B,
        tokens_T=torch.from_numpy(tokens_T),
        types_T=torch.from_numpy(types_T),
        segments_B2=found.segments_B2,
        starts_B=found.starts_B,
        ends_B=found.ends_B,
        counted=found.counted,
    )


def pad(batch: Batch, pad_id: int, multiple: int = 1) -> Padded:
    """Lay a batch out as [B, L], L its longest window rounded up to `multiple`; no mask where
    nothing was padded."""
    lengths_B = batch.segments_B2.numpy()[:, 1]
    count = len(lengths_B)
    longest = -(-int(lengths_B.max()) // multiple) * multiple
    segments_B2 = np.empty((count, 2), dtype=np.int64)
    segments_B2[:, 0] = np.arange(count) * longest
    segments_B2[:, 1] = lengths_B
    filled_BL = np.arange(longest, dtype=np.int32) < lengths_B.astype(np.int32)[:, None]
    input_ids_BL = np.full(filled_BL.shape, pad_id, dtype=np.int32)
    input_ids_BL[filled_BL] = batch.tokens_T.numpy()
    types_BL = np.zeros(filled_BL.shape, dtype=np.int32)
    types_BL[filled_BL] = batch.types_T.numpy()
    full = count * longest == len(batch.tokens_T)
    return Padded(
        input_ids_BL=torch.from_numpy(input_ids_BL),
        types_BL=torch.from_numpy(types_BL),
        mask_BL=None if full else torch.from_numpy(filled_BL.astype(np.int32)),
        segments_B2=torch.from_numpy(segments_B2),
    )


def pack(batch: Batch, pad_id: int, packing: Packing) -> Packed:
    """Lay a batch out as [1, T], its windows one after another, positions counted anew in each."""
    bounds, fill = packed_bounds(batch.segments_B2, packing)
    lengths = batch.segments_B2.numpy()[:, 1].tolist()
    last = packing.first_position + max(lengths)
    ladder = np.arange(packing.first_position, last, dtype=np.int32)
    positions_T = torch.from_numpy(_joined(ladder, list(map(slice, lengths))))
    tokens_T, types_T = batch.tokens_T, batch.types_T
    if fill:  # it may be longer than the model has positions: it stays at the first
        tokens_T, types_T, positions_T = (
            torch.cat([values, values.new_full((fill,), value)])
            for values, value in (
                (tokens_T, pad_id),
                (types_T, 0),
                (positions_T, packing.first_position),
            )
        )
    return Packed(
        input_ids_1T=tokens_T.unsqueeze(0),
        types_1T=types_T.unsqueeze(0),
        positions_1T=positions_T.unsqueeze(0),
        segments_B2=batch.segments_B2,
        bounds=bounds,
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


def _joined(values: np.ndarray, slices: list[slice]) -> np.ndarray:
    """Copy slices of an array end to end.

    Python cuts and joins the memory itself: numpy takes half as long again for slices of a few
    hundred tokens, and an index of each token would cost more than its copy.
    """
    memory = values.data
    return np.frombuffer(bytearray().join([memory[part] for part in slices]), dtype=values.dtype)


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move the integers of a batch to a device: one pinned buffer, one copy that nobody waits for.
    On a CPU they stay where they are."""
    if device.type == "cpu":
        return list(tensors)
    # One at a time they would be half a dozen copies, each as slow as all of them together.
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=torch.int64, pin_memory=True)
    torch.cat([t.reshape(-1).long() for t in tensors], out=flat)
    parts = flat.to(device, non_blocking=True).split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]
