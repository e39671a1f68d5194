"""Runs a model over batches of windows: inputs, logits, accuracy.

Legend: B windows of a batch, L tokens of a row, R rows, T tokens end to end or rows of logits, D
hidden width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from runner.data.collate import Packing
from runner.data.loader import DeviceBatch, WindowLoader, tokens_on_device
from runner.data.windows import Windows
from runner.model.frozen import FrozenLayers, HiddenCache


def model_inputs(batch: DeviceBatch, *, segment_ids: bool) -> dict[str, Any]:
    """What a transformers model is called with.

    Args:
        batch: on the model's device; a packed one is for a model that `choose_packing` has
            prepared.
        segment_ids: whether the model takes token_type_ids.
    """
    inputs: dict[str, Any] = {"input_ids": batch.ids_RL}
    if batch.positions_RL is not None:
        # Without segment ids RoBERTa looks some up by position, which takes int64.
        positions_RL = batch.positions_RL if segment_ids else batch.positions_RL.long()
        inputs |= {"position_ids": positions_RL, "packed": batch.bounds}
    if batch.mask_RL is not None:
        inputs["attention_mask"] = batch.mask_RL
    if segment_ids:
        inputs["token_type_ids"] = batch.types_RL
    return inputs


def span_logits(model: Any, batch: DeviceBatch, *, segment_ids: bool) -> Tensor:
    """Run the model and return its logits as [T, 2], T = R * L, in the model's dtype.

    Args:
        model: a transformers question-answering model, or the DeepSpeed engine around one.
        batch, segment_ids: as for `model_inputs`.
    """
    output = model(**model_inputs(batch, segment_ids=segment_ids))
    return torch.stack([output.start_logits, output.end_logits], dim=-1).reshape(-1, 2)


def takes_segment_ids(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model of this tokenizer, as `load_tokenizer` gives it, is given segment ids."""
    return "token_type_ids" in tokenizer.model_input_names


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up; nothing is read of it, so that any does."""
    pad_id = tokenizer.pad_token_id
    return pad_id if isinstance(pad_id, int) else 0


@dataclass(frozen=True)
class SpanLogits:
    """A model's logits over a batch: [T, 2] start and end logits, T counts padding too."""

    logits_T2: Tensor
    batch: DeviceBatch

    def accuracy(self) -> Tensor:
        """Count windows whose highest start, end, and both logits are at the labels: float32 [3],
        no host sync."""
        logits_T2, batch = self.logits_T2, self.batch
        offset_B1, length_B1 = batch.segments_B2[:, :1], batch.segments_B2[:, 1:]
        columns_L = torch.arange(batch.longest, device=logits_T2.device)
        index_BL = (offset_B1 + columns_L).clamp(max=len(logits_T2) - 1)
        logits_BL2 = logits_T2.detach()[index_BL].float()
        logits_BL2 = logits_BL2.masked_fill((columns_L >= length_B1)[:, :, None], -torch.inf)
        best_B2 = logits_BL2.argmax(dim=1)
        right_B2 = best_B2 == torch.stack([batch.starts_B, batch.ends_B], dim=1)
        return torch.cat([right_B2, right_B2.all(1, keepdim=True)], dim=1).sum(0).float()


@dataclass(frozen=True)
class SpanModel:
    """A model and how it is fed.

    Attributes:
        engine: a transformers question-answering model, or the DeepSpeed engine around one.
        loader: makes its batches.
        segment_ids: whether the model takes token_type_ids.
        frozen: the model's frozen layers, where outputs of theirs are cached.
        hidden_caches: these outputs; other windows go through all layers.
    """

    engine: Any
    loader: WindowLoader
    segment_ids: bool
    frozen: FrozenLayers | None = None
    hidden_caches: tuple[HiddenCache, ...] = ()

    @classmethod
    def of(
        cls,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        packing: Packing | None = None,
        sets: Sequence[Windows] = (),
    ) -> SpanModel:
        """Feed a model that is on `device` as its tokenizer says; a GPU may hold the tokens of
        `sets`."""
        loader = WindowLoader(
            device=device,
            pad_id=pad_token(tokenizer),
            packing=packing,
            multiple=8 if device.type == "cuda" else 1,
            on_device=tokens_on_device(sets, device),
        )
        return cls(engine, loader, takes_segment_ids(tokenizer))

    def batch(self, windows: Windows, rows: np.ndarray) -> DeviceBatch:
        """A batch as `WindowLoader.batch` makes it, cached hidden states beside it."""
        return self._with_hidden(windows, self.loader.batch(windows, rows))

    def prefetch(self, windows: Windows, passes: Iterable[np.ndarray]) -> Iterator[DeviceBatch]:
        """Batches as `WindowLoader.prefetch` yields them, cached hidden states beside them."""
        return self.loader.prefetch(windows, passes, partial(self._with_hidden, windows))

    def __call__(self, batch: DeviceBatch) -> SpanLogits:
        """Run the model over a batch of `batch` or `prefetch`."""
        if batch.hidden is None or self.frozen is None:
            return SpanLogits(span_logits(self.engine, batch, segment_ids=self.segment_ids), batch)
        with self.frozen.replaced_by(batch.hidden):
            logits_T2 = span_logits(self.engine, batch, segment_ids=self.segment_ids)
        # The loss and the search do without hidden states: their memory is free for others.
        return SpanLogits(logits_T2, dataclasses.replace(batch, hidden=None))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it, the model evaluates: no dropout, nothing recorded for a backward pass."""
        was_training = self.engine.training
        self.engine.eval()
        with torch.no_grad():
            yield
        self.engine.train(was_training)

    def _with_hidden(self, windows: Windows, batch: DeviceBatch) -> DeviceBatch:
        cache = next((held for held in self.hidden_caches if held.windows is windows), None)
        if cache is None:
            return batch
        hidden_TD = cache.get(batch.rows_B, self.loader.device)
        return dataclasses.replace(batch, hidden=placed(hidden_TD, batch))


def placed(hidden_TD: Tensor, batch: DeviceBatch) -> Tensor:
    """Lay hidden states out as their batch is, [R, L, D], zeros where no token is."""
    rows, longest = batch.ids_RL.shape
    if batch.bounds is not None:
        return nn.functional.pad(hidden_TD, (0, 0, 0, longest - len(hidden_TD)))[None]
    found_TD = hidden_TD.new_zeros(rows * longest, hidden_TD.shape[1])
    return found_TD.index_copy_(0, _slots(batch, len(hidden_TD)), hidden_TD).view(rows, longest, -1)


def _slots(batch: DeviceBatch, tokens: int) -> Tensor:
    """Where each token of a batch stands in its rows of logits, int64 [T], no host sync."""
    offset_B, length_B = batch.segments_B2.unbind(1)
    shift_B = offset_B - (length_B.cumsum(0) - length_B)
    shift_T = torch.repeat_interleave(shift_B, length_B, output_size=tokens)
    return torch.arange(tokens, device=shift_T.device) + shift_T


@torch.no_grad()
def fill_cache(model: SpanModel, cache: HiddenCache, batches: Iterable[np.ndarray]) -> None:
    """Compute the frozen layers' outputs for these windows, and write them into the cache."""
    if model.frozen is None:
        raise AssertionError("there are no frozen layers to fill a cache from")
    for rows in batches:
        if not len(rows):
            continue
        batch = model.loader.batch(cache.windows, rows)
        hidden = model.frozen.outputs(model_inputs(batch, segment_ids=model.segment_ids))
        tokens = int(cache.windows.lengths_N[rows].sum())
        cache.write(rows, hidden.flatten(0, 1).index_select(0, _slots(batch, tokens)))
