"""Runs a model over windows: assembles a batch, packed or padded, and brings it to the device.

Legend: N windows of the data set, B windows of a batch, L longest of them, T rows of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from span_kernels import gather_windows
from torch import Tensor

from runner.data.collate import (
    Batch,
    Bounds,
    Outline,
    Packed,
    Packing,
    Padded,
    packed_bounds,
    send,
)
from runner.data.windows import Windows

_SHARE_OF_FREE = 0.1  # of the GPU's memory: SQuAD takes 80 MB


@dataclass(frozen=True)
class _Assembled:
    """A batch on the host, no more than its outline where the device has its tokens; `bring` lays
    it out on the device, labels beside it."""

    batch: Batch | Outline
    bring: Callable[[], tuple[Padded | Packed, Tensor, Tensor]]


@dataclass(frozen=True)
class Prepared:
    """A batch on the device, labels beside it.

    Attributes:
        batch: padded or packed.
        starts_B, ends_B: labels relative to the window.
        counted: windows that count; 0 for a stand-in.
        longest: upper bound of the windows' lengths.
        hidden: what the model's frozen bottom makes of it, where that is kept.
    """

    batch: Padded | Packed
    starts_B: Tensor
    ends_B: Tensor
    counted: int
    longest: int
    hidden: Tensor | None = None


def to_device(
    batch: Padded | Packed, starts_B: Tensor, ends_B: Tensor, device: torch.device
) -> tuple[Padded | Packed, Tensor, Tensor]:
    """Copy a batch and its labels to the device without waiting for the copy."""
    if device.type == "cpu":
        return batch, starts_B, ends_B
    if isinstance(batch, Packed):
        bounds = batch.bounds
        tokens = (batch.input_ids_1T, batch.types_1T, batch.positions_1T)
        *moved, bounds_S1, starts_B, ends_B = send(
            [*tokens, batch.segments_B2, bounds.bounds_S1, starts_B, ends_B], device
        )
        there = Bounds(bounds_S1, bounds.longest, bounds.ends)
        ids_1T, types_1T, positions_1T, segments_B2 = moved
        return Packed(ids_1T, types_1T, positions_1T, segments_B2, there), starts_B, ends_B
    mask = [] if batch.mask_BL is None else [batch.mask_BL]
    input_ids_BL, types_BL, segments_B2, starts_B, ends_B, *mask = send(
        [batch.input_ids_BL, batch.types_BL, batch.segments_B2, starts_B, ends_B, *mask], device
    )
    moved = Padded(input_ids_BL, types_BL, mask[0] if mask else None, segments_B2)
    return moved, starts_B, ends_B


@dataclass(frozen=True)
class Resident:
    """A data set's tokens on the device: int32 and uint8 [N]."""

    windows: Windows
    tokens_N: Tensor
    types_N: Tensor

    def batch(
        self, outline: Outline, pad_id: int, packing: Packing
    ) -> tuple[Packed, Tensor, Tensor]:
        """Gather a packed batch on the device, labels beside it: one copy of a few numbers a
        window, one kernel, nobody waits."""
        bounds, fill = packed_bounds(outline.segments_B2, packing)
        count, device = len(outline.rows_B), self.tokens_N.device
        parts = [torch.from_numpy(outline.firsts_B), bounds.bounds_S1]
        parts += [outline.segments_B2, outline.starts_B, outline.ends_B]
        firsts_B, bounds_S1, segments_B2, starts_B, ends_B = send(parts, device)
        ids_T, types_T, positions_T = gather_windows(
            self.tokens_N,
            self.types_N,
            firsts_B,
            bounds_S1[: count + 1],  # without the segment that fills up
            int(outline.segments_B2[-1].sum()) + fill,
            first_position=packing.first_position,
            pad_id=pad_id,
        )
        there = Bounds(bounds_S1, bounds.longest, bounds.ends)
        packed = Packed(ids_T[None], types_T[None], positions_T[None], segments_B2, there)
        return packed, starts_B, ends_B


def make_resident(sets: Sequence[Windows], device: torch.device) -> tuple[Resident, ...]:
    """Copy data sets to the GPU, as many as fit into a small share of its memory; none on a CPU."""
    if device.type != "cuda":
        return ()
    made = []
    for windows in sets:
        size = windows.tokens_T.nbytes + windows.types_T.nbytes
        if size <= _SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]:
            made.append(copied(windows, device))
    return tuple(made)


def copied(windows: Windows, device: torch.device) -> Resident:
    """Copy a data set's tokens to a device."""
    return Resident(
        windows,
        torch.tensor(windows.tokens_T, device=device),
        torch.tensor(windows.types_T, device=device),
    )
