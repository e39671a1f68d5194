"""Runs a model over batches of windows: inputs, logits, accuracy.

Legend: N windows of the data set, B windows of a batch, L longest of them, T rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from runner.data.collate import Packed, Packing, Padded, collate, outline, pack, pad
from runner.data.loader import Prepared, Resident, _Assembled, to_device
from runner.data.windows import Windows
from runner.model.frozen import FrozenLayers, HiddenCache

# Batches that are assembled in a row: after each training step the code and the data of assembling
# have to come back from main memory, which takes several times as long as the work itself
# (tests/bench/features.py). 32 batches of 16,384 tokens are 6 MB.
TOGETHER = 32


def model_inputs(batch: Padded | Packed, *, segment_ids: bool) -> dict[str, Any]:
    """What a transformers model is called with.

    Args:
        batch: on the model's device; a packed one is for a model that `packing` has prepared.
        segment_ids: whether the model takes token_type_ids.
    """
    inputs: dict[str, Any]
    if isinstance(batch, Packed):
        # Without segment ids RoBERTa looks some up by position, which takes int64.
        positions_1T = batch.positions_1T if segment_ids else batch.positions_1T.long()
        inputs = {"input_ids": batch.input_ids_1T, "position_ids": positions_1T}
        inputs["packed"] = batch.bounds
        types = batch.types_1T
    else:
        inputs = {"input_ids": batch.input_ids_BL}
        if batch.mask_BL is not None:
            inputs["attention_mask"] = batch.mask_BL
        types = batch.types_BL
    if segment_ids:
        inputs["token_type_ids"] = types
    return inputs


def span_logits(model: Any, batch: Padded | Packed, *, segment_ids: bool) -> Tensor:
    """Run the model and return its logits as [T, 2], T = B * L of a padded batch, in the model's
    dtype.

    Args:
        model: a transformers question-answering model, or the DeepSpeed engine around one.
        batch, segment_ids: as for `model_inputs`.
    """
    output = model(**model_inputs(batch, segment_ids=segment_ids))
    return torch.stack([output.start_logits, output.end_logits], dim=-1).reshape(-1, 2)


def takes_segment_ids(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model of this tokenizer, as `load_tokenizer` gives it, is given segment ids."""
    return "token_type_ids" in tokenizer.model_input_names


@dataclass(frozen=True)
class Reader:
    """What is needed to run a model over windows.

    Attributes:
        model: a transformers question-answering model, or the DeepSpeed engine around one.
        device: where it lives.
        pad_id: token id of padding.
        segment_ids: whether the model takes token_type_ids.
        multiple: padded lengths are rounded up to this (8 suits tensor cores).
        packing: how windows are packed end to end; None pads them instead.
        trunk: the model's frozen bottom, where its outputs are kept.
        stores: the outputs that are kept; other windows are read from the bottom.
        residents: data sets whose tokens are on the device; those of others are sent.
    """

    model: Any
    device: torch.device
    pad_id: int
    segment_ids: bool
    multiple: int
    packing: Packing | None = None
    trunk: FrozenLayers | None = None
    stores: tuple[HiddenCache, ...] = ()
    residents: tuple[Resident, ...] = ()

    def read(self, windows: Windows, rows: np.ndarray) -> Read:
        """Run the model over the windows at `rows`; for no rows, over a stand-in that counts
        nothing."""
        return self.run(self.prepare(windows, rows))

    def prepare(self, windows: Windows, rows: np.ndarray) -> Prepared:
        """Assemble a batch and start its copy to the device, without waiting for it."""
        return self._bring(windows, self._assemble(windows, rows))

    def _assemble(self, windows: Windows, rows: np.ndarray) -> _Assembled:
        """The host's share of a batch."""
        resident = next((held for held in self.residents if held.windows is windows), None)
        if self.packing is not None and resident is not None:
            here = outline(windows, rows)
            return _Assembled(here, partial(resident.batch, here, self.pad_id, self.packing))
        batch = collate(windows, rows)
        if self.packing is None:
            laid_out: Padded | Packed = pad(batch, self.pad_id, self.multiple)
        else:
            laid_out = pack(batch, self.pad_id, self.packing)
        labels = (batch.starts_B, batch.ends_B)
        return _Assembled(batch, partial(to_device, laid_out, *labels, self.device))

    def _bring(self, windows: Windows, assembled: _Assembled) -> Prepared:
        """The device's share of a batch, started without waiting for it."""
        here = assembled.batch
        laid_out, starts_B, ends_B = assembled.bring()
        if isinstance(laid_out, Packed):
            longest = laid_out.bounds.longest
        else:
            longest = laid_out.input_ids_BL.shape[1]
        kept = next((store for store in self.stores if store.windows is windows), None)
        hidden = None
        if kept is not None:
            hidden = placed(kept.get(here.rows_B, self.device), laid_out)
        return Prepared(laid_out, starts_B, ends_B, here.counted, longest, hidden)

    def ahead(self, windows: Windows, passes: Iterable[np.ndarray]) -> Iterator[Prepared]:
        """Prepare batch after batch, each before the one ahead of it is asked for: its copy is on
        the way while the device is at work. The host assembles `TOGETHER` in a row."""
        waiting: Prepared | None = None
        left = iter(passes)
        while block := [self._assemble(windows, rows) for rows in islice(left, TOGETHER)]:
            for assembled in block:
                upcoming = self._bring(windows, assembled)
                if waiting is not None:
                    yield waiting
                waiting = upcoming
        if waiting is not None:
            yield waiting

    def run(self, prepared: Prepared) -> Read:
        """Run the model over a batch that `prepare` made."""
        if prepared.hidden is None or self.trunk is None:
            logits_T2 = span_logits(self.model, prepared.batch, segment_ids=self.segment_ids)
        else:
            with self.trunk.above(prepared.hidden):
                logits_T2 = span_logits(self.model, prepared.batch, segment_ids=self.segment_ids)
        return Read(
            logits_T2,
            prepared.batch.segments_B2,
            prepared.starts_B,
            prepared.ends_B,
            prepared.counted,
            prepared.longest,
        )


@dataclass(frozen=True)
class Read:
    """A model's logits over a batch.

    Attributes:
        logits_T2: [T, 2] start and end logits; T counts padding too.
        segments_B2: (offset, length) of each window in them.
        starts_B, ends_B: labels relative to the window.
        counted: windows that count; 0 for a stand-in.
        longest: upper bound of the windows' lengths.
    """

    logits_T2: Tensor
    segments_B2: Tensor
    starts_B: Tensor
    ends_B: Tensor
    counted: int
    longest: int


def placed(hidden_TD: Tensor, batch: Padded | Packed) -> Tensor:
    """Lay hidden states out as their batch is: [1, T, D] or [B, L, D], zeros where no token is."""
    if isinstance(batch, Packed):
        fill = batch.input_ids_1T.shape[1] - len(hidden_TD)
        return nn.functional.pad(hidden_TD, (0, 0, 0, fill))[None]
    count, longest = batch.input_ids_BL.shape
    hidden_TD2 = hidden_TD.new_zeros(count * longest, hidden_TD.shape[1])
    return hidden_TD2.index_copy_(0, _slots(batch, len(hidden_TD)), hidden_TD).view(
        count, longest, -1
    )


def _slots(batch: Padded | Packed, tokens: int) -> Tensor:
    """Where each token of a batch stands in its rows of logits, int64 [T], no host sync."""
    offset_B, length_B = batch.segments_B2.unbind(1)
    shift_B = offset_B - (length_B.cumsum(0) - length_B)
    shift_T = torch.repeat_interleave(shift_B, length_B, output_size=tokens)
    return torch.arange(tokens, device=shift_T.device) + shift_T


@torch.no_grad()
def fill_cache(reader: Reader, store: HiddenCache, batches: Iterable[np.ndarray]) -> None:
    """Compute the frozen bottom's outputs for these windows, and keep them."""
    if reader.trunk is None:
        raise AssertionError("there is no frozen bottom to fill a store from")
    for rows in batches:
        if not len(rows):
            continue
        batch = reader.prepare(store.windows, rows).batch
        hidden = reader.trunk.outputs(model_inputs(batch, segment_ids=reader.segment_ids))
        tokens = int(store.windows.lengths_N[rows].sum())
        store.put(rows, hidden.flatten(0, 1).index_select(0, _slots(batch, tokens)))


def token_accuracy(read: Read) -> Tensor:
    """Count windows whose highest start, end, and both logits are at the labels: float32 [3], no
    host sync."""
    offset_B1, length_B1 = read.segments_B2[:, :1], read.segments_B2[:, 1:]
    columns_L = torch.arange(read.longest, device=read.logits_T2.device)
    index_BL = (offset_B1 + columns_L).clamp(max=len(read.logits_T2) - 1)
    logits_BL2 = read.logits_T2.detach()[index_BL].float()
    logits_BL2 = logits_BL2.masked_fill((columns_L >= length_B1)[:, :, None], -torch.inf)
    best_B2 = logits_BL2.argmax(dim=1)
    right_B2 = best_B2 == torch.stack([read.starts_B, read.ends_B], dim=1)
    return torch.cat([right_B2.sum(0), right_B2.all(1).sum()[None]]).float()
