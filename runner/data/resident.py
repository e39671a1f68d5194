"""Windows that live on the GPU: a batch sends the places of its windows there, not their tokens.

Legend: N tokens of all windows of a data set, B windows of a batch, T its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from span_kernels import gather_windows
from torch import Tensor

from runner.data.collate import Bounds, Outline, Packed, Packing, packed_bounds, send
from runner.data.windows import Windows

_SHARE_OF_FREE = 0.1  # of the GPU's memory: SQuAD takes 80 MB


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
