"""Batches on the device: padded or packed on the host and copied, or gathered from tokens that the
device has.

Legend: B windows of a batch, L tokens of a row, R rows: B of them padded, one packed; T tokens of a
data set or of a batch end to end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from span_kernels import gather_windows
from torch import Tensor

from runner.data.collate import Bounds, HostBatch, Packing, collate, join_slices, packed_bounds
from runner.data.windows import Windows

# Batches that are assembled in a row: after each training step the code and the data of assembling
# have to come back from main memory, which takes several times as long as the work itself
# (tests/bench/features.py). 32 batches of 16,384 tokens are 6 MB.
TOGETHER = 32

_SHARE_OF_FREE = 0.1  # of the GPU's memory: SQuAD takes 80 MB


@dataclass(frozen=True)
class DeviceBatch:
    """A batch as a model takes it: in the rectangular layout that every transformers model knows,
    or packed end to end in one row.

    Attributes:
        ids_RL: int32, token ids.
        types_RL: int32, segment ids.
        segments_B2: int64, (offset, length) of each window in the rows, one after the other.
        starts_B, ends_B: int64, labels relative to the window; -1 in a stand-in.
        rows_B: int64 numpy on the host, positions of the windows in the data set.
        counted: windows that count in the loss; 0 for a stand-in.
        mask_RL: int32, of a padded batch; None where nothing was padded.
        positions_RL: int32, of a packed batch: positions counted anew in each window.
        bounds: of a packed batch; None says that it is padded.
        hidden: what the model's frozen layers make of it, where that is cached.
    """

    ids_RL: Tensor
    types_RL: Tensor
    segments_B2: Tensor
    starts_B: Tensor
    ends_B: Tensor
    rows_B: np.ndarray
    counted: int
    mask_RL: Tensor | None = None
    positions_RL: Tensor | None = None
    bounds: Bounds | None = None
    hidden: Tensor | None = None

    @property
    def longest(self) -> int:
        """An upper bound of the windows' lengths."""
        return self.ids_RL.shape[1] if self.bounds is None else self.bounds.longest


def pad(batch: HostBatch, pad_id: int, multiple: int = 1) -> DeviceBatch:
    """Lay a batch out as [B, L], L its longest window rounded up to `multiple`; no mask where
    nothing was padded."""
    tokens_T, types_T = _tokens(batch)
    lengths_B = batch.segments_B2.numpy()[:, 1]
    count = len(lengths_B)
    longest = -(-int(lengths_B.max()) // multiple) * multiple
    segments_B2 = np.empty((count, 2), dtype=np.int64)
    segments_B2[:, 0] = np.arange(count) * longest
    segments_B2[:, 1] = lengths_B
    filled_BL = np.arange(longest, dtype=np.int32) < lengths_B.astype(np.int32)[:, None]
    ids_BL = np.full(filled_BL.shape, pad_id, dtype=np.int32)
    ids_BL[filled_BL] = tokens_T.numpy()
    types_BL = np.zeros(filled_BL.shape, dtype=np.int32)
    types_BL[filled_BL] = types_T.numpy()
    is_full = count * longest == len(tokens_T)
    return DeviceBatch(
        ids_RL=torch.from_numpy(ids_BL),
        types_RL=torch.from_numpy(types_BL),
        segments_B2=torch.from_numpy(segments_B2),
        starts_B=batch.starts_B,
        ends_B=batch.ends_B,
        rows_B=batch.rows_B,
        counted=batch.counted,
        mask_RL=None if is_full else torch.from_numpy(filled_BL.astype(np.int32)),
    )


def pack(batch: HostBatch, pad_id: int, packing: Packing) -> DeviceBatch:
    """Lay a batch out as [1, T], its windows one after another; for a GPU, where its length is not
    yet one of few, a last segment that nobody reads rounds it up."""
    tokens_T, types_T = _tokens(batch)
    bounds, fill = packed_bounds(batch.segments_B2, packing)
    lengths = batch.segments_B2.numpy()[:, 1].tolist()
    last = packing.first_position + max(lengths)
    ladder = np.arange(packing.first_position, last, dtype=np.int32)
    positions_T = torch.from_numpy(join_slices(ladder, list(map(slice, lengths))))
    if fill:  # it may be longer than the model has positions: it stays at the first
        tokens_T, types_T, positions_T = (
            torch.cat([values, values.new_full((fill,), value)])
            for values, value in (
                (tokens_T, pad_id),
                (types_T, 0),
                (positions_T, packing.first_position),
            )
        )
    return DeviceBatch(
        ids_RL=tokens_T.unsqueeze(0),
        types_RL=types_T.unsqueeze(0),
        segments_B2=batch.segments_B2,
        starts_B=batch.starts_B,
        ends_B=batch.ends_B,
        rows_B=batch.rows_B,
        counted=batch.counted,
        positions_RL=positions_T.unsqueeze(0),
        bounds=bounds,
    )


def _tokens(batch: HostBatch) -> tuple[Tensor, Tensor]:
    if batch.tokens_T is None or batch.types_T is None:
        raise AssertionError("a batch is laid out on the host with its tokens")
    return batch.tokens_T, batch.types_T


def to_device(batch: DeviceBatch, device: torch.device) -> DeviceBatch:
    """Copy a batch that was laid out on the host, without waiting for the copy."""
    if device.type == "cpu":
        return batch
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    if batch.bounds is None:
        moved = send([*tensors.values()], device)
        return dataclasses.replace(batch, **dict(zip(tensors, moved, strict=True)))
    *moved, bounds_S1 = send([*tensors.values(), batch.bounds.bounds_S1], device)
    bounds = batch.bounds._replace(bounds_S1=bounds_S1)
    return dataclasses.replace(batch, bounds=bounds, **dict(zip(tensors, moved, strict=True)))


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move integers to a device: one pinned buffer, one copy that nobody waits for."""
    if device.type == "cpu":
        return list(tensors)
    # One at a time they would be half a dozen copies, each as slow as all of them together.
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=torch.int64, pin_memory=True)
    torch.cat([t.reshape(-1).long() for t in tensors], out=flat)
    parts = flat.to(device, non_blocking=True).split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


@dataclass(frozen=True)
class DeviceTokens:
    """A data set's tokens on the device: int32 and uint8 [T]."""

    windows: Windows
    tokens_T: Tensor
    types_T: Tensor

    @classmethod
    def copy(cls, windows: Windows, device: torch.device) -> DeviceTokens:
        """Copy them there."""
        tokens_T, types_T = windows.tokens_T, windows.types_T
        return cls(
            windows, torch.tensor(tokens_T, device=device), torch.tensor(types_T, device=device)
        )

    def gather(self, batch: HostBatch, pad_id: int, packing: Packing) -> DeviceBatch:
        """Pack a batch on the device: one copy of a few numbers a window, one kernel, nobody
        waits."""
        bounds, fill = packed_bounds(batch.segments_B2, packing)
        parts = [torch.from_numpy(batch.firsts_B), bounds.bounds_S1]
        parts += [batch.segments_B2, batch.starts_B, batch.ends_B]
        firsts_B, bounds_S1, segments_B2, starts_B, ends_B = send(parts, self.tokens_T.device)
        ids_T, types_T, positions_T = gather_windows(
            self.tokens_T,
            self.types_T,
            firsts_B,
            bounds_S1[: len(batch.rows_B) + 1],  # without the segment that fills up
            int(batch.segments_B2[-1].sum()) + fill,
            first_position=packing.first_position,
            pad_id=pad_id,
        )
        return DeviceBatch(
            ids_RL=ids_T[None],
            types_RL=types_T[None],
            segments_B2=segments_B2,
            starts_B=starts_B,
            ends_B=ends_B,
            rows_B=batch.rows_B,
            counted=batch.counted,
            positions_RL=positions_T[None],
            bounds=bounds._replace(bounds_S1=bounds_S1),
        )


def tokens_on_device(sets: Sequence[Windows], device: torch.device) -> tuple[DeviceTokens, ...]:
    """Copy data sets to the GPU, as many as fit into a small share of its memory; none on a CPU."""
    if device.type != "cuda":
        return ()
    made = []
    for windows in sets:
        size = windows.tokens_T.nbytes + windows.types_T.nbytes
        if size <= _SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]:
            made.append(DeviceTokens.copy(windows, device))
    return tuple(made)


@dataclass(frozen=True)
class WindowLoader:
    """Makes batches of windows on a device.

    Attributes:
        device: where they are wanted.
        pad_id: token id of padding.
        packing: how windows are packed end to end; None pads them instead.
        multiple: padded lengths are rounded up to this (8 suits tensor cores).
        on_device: data sets whose tokens are there already; those of others are sent.
    """

    device: torch.device
    pad_id: int
    packing: Packing | None = None
    multiple: int = 1
    on_device: tuple[DeviceTokens, ...] = ()

    def batch(self, windows: Windows, rows: np.ndarray) -> DeviceBatch:
        """Assemble a batch and start its copy, without waiting for it; for no rows, a stand-in that
        counts nothing."""
        return self._bring(windows, self._assemble(windows, rows))

    def prefetch(
        self,
        windows: Windows,
        passes: Iterable[np.ndarray],
        finish: Callable[[DeviceBatch], DeviceBatch] = lambda batch: batch,
    ) -> Iterator[DeviceBatch]:
        """Yield batch after batch, each once the copy of the next one is under way, so that the
        device need not wait for it. The host assembles `TOGETHER` in a row.

        Args:
            windows: the data set.
            passes: the rows of each batch.
            finish: what else is done to a batch where its copy is started.
        """
        waiting: DeviceBatch | None = None
        left = iter(passes)
        while block := [self._assemble(windows, rows) for rows in islice(left, TOGETHER)]:
            for assembled in block:
                upcoming = finish(self._bring(windows, assembled))
                if waiting is not None:
                    yield waiting
                waiting = upcoming
        if waiting is not None:
            yield waiting

    def _assemble(self, windows: Windows, rows: np.ndarray) -> HostBatch | DeviceBatch:
        """The host's part: laid out, or without tokens where the device has them."""
        if self.packing is not None and self._held(windows) is not None:
            return collate(windows, rows, tokens=False)
        batch = collate(windows, rows)
        if self.packing is None:
            return pad(batch, self.pad_id, self.multiple)
        return pack(batch, self.pad_id, self.packing)

    def _bring(self, windows: Windows, batch: HostBatch | DeviceBatch) -> DeviceBatch:
        """The device's part, started without waiting for it."""
        if isinstance(batch, DeviceBatch):
            return to_device(batch, self.device)
        held = self._held(windows)
        if held is None or self.packing is None:
            raise AssertionError("a batch without tokens is packed where they are")
        return held.gather(batch, self.pad_id, self.packing)

    def _held(self, windows: Windows) -> DeviceTokens | None:
        return next((tokens for tokens in self.on_device if tokens.windows is windows), None)
