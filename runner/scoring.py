"""Runs a model over windows, shared over the ranks, and turns its logits into answers on rank 0.

Legend: N windows of the data set, B windows of a batch, L longest of them, K candidate spans, T
    rows of logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from span_kernels import reference_span_loss
from torch import Tensor

from runner.batches import Padded, collate, pad, score_batches
from runner.console import Step
from runner.control import gather
from runner.dataset import Example
from runner.features import Windows
from runner.job import Score
from runner.model import span_logits
from runner.ranks import Rank
from runner.spans import Answer, Spans, answers, join, search

BLOCK = 32_768  # windows whose candidates are in memory together


@dataclass(frozen=True)
class Reader:
    """What is needed to run a model over windows.

    Attributes:
        model: a transformers question-answering model, or the DeepSpeed engine around one.
        device: where it lives.
        pad_id: token id of padding.
        segment_ids: whether the model takes token_type_ids.
        multiple: padded lengths are rounded up to this (8 suits tensor cores).
    """

    model: Any
    device: torch.device
    pad_id: int
    segment_ids: bool
    multiple: int

    def read(self, windows: Windows, rows: np.ndarray) -> Read:
        """Run the model over the windows at `rows`; for no rows, over a stand-in that counts
        nothing."""
        batch = collate(windows, rows)
        padded = to_device(pad(batch, self.pad_id, self.multiple), self.device)
        logits_T2 = span_logits(self.model, padded, segment_ids=self.segment_ids)
        starts_B, ends_B = (
            t.to(self.device, non_blocking=True) for t in (batch.starts_B, batch.ends_B)
        )
        return Read(logits_T2, padded.segments_B2, starts_B, ends_B, batch.counted)


@dataclass(frozen=True)
class Read:
    """A model's logits over a batch.

    Attributes:
        logits_T2: [T, 2] start and end logits; T counts padding too.
        segments_B2: (offset, length) of each window in them.
        starts_B, ends_B: labels relative to the window.
        counted: windows that count; 0 for a stand-in.
    """

    logits_T2: Tensor
    segments_B2: Tensor
    starts_B: Tensor
    ends_B: Tensor
    counted: int


@dataclass(frozen=True)
class Readings:
    """What a model says about a set of windows.

    Attributes:
        loss: mean span loss in nats over all windows (a window without the answer points at [CLS]).
        start_accuracy, end_accuracy, span_accuracy: percent of windows whose likeliest start, end,
            both are right.
        answers: one for each question, in order.
        seconds: wall time.
    """

    loss: float
    start_accuracy: float
    end_accuracy: float
    span_accuracy: float
    answers: tuple[Answer, ...]
    seconds: float


def to_device(padded: Padded, device: torch.device) -> Padded:
    """Copy a batch to the device without waiting for the copy."""
    if device.type == "cpu":
        return padded
    move = {"device": device, "non_blocking": True}
    mask_BL = padded.mask_BL
    return Padded(
        padded.input_ids_BL.pin_memory().to(**move),
        padded.types_BL.pin_memory().to(**move),
        None if mask_BL is None else mask_BL.pin_memory().to(**move),
        padded.segments_B2.pin_memory().to(**move),
    )


def token_accuracy(
    logits_T2: Tensor, segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor
) -> Tensor:
    """Count windows whose highest start, end, and both logits are at the labels: float32 [3], no
    host sync.

    Args:
        logits_T2: [T, 2] logits of a padded batch of equal strides or of a packed one.
        segments_B2: (offset, length) of each window in them.
        starts_B, ends_B: labels.
    """
    offset_B1, length_B1 = segments_B2[:, :1], segments_B2[:, 1:]
    columns_L = torch.arange(_longest(logits_T2, segments_B2), device=logits_T2.device)
    index_BL = (offset_B1 + columns_L).clamp(max=len(logits_T2) - 1)
    logits_BL2 = logits_T2.detach()[index_BL].float()
    logits_BL2 = logits_BL2.masked_fill((columns_L >= length_B1)[:, :, None], -torch.inf)
    best_B2 = logits_BL2.argmax(dim=1)
    right_B2 = best_B2 == torch.stack([starts_B, ends_B], dim=1)
    return torch.cat([right_B2.sum(0), right_B2.all(1).sum()[None]]).float()


def _longest(logits_T2: Tensor, segments_B2: Tensor) -> int:
    """Upper bound of the lengths without reading them from the device: padded batches have equal
    strides."""
    if segments_B2.device.type == "cpu":
        return int(segments_B2[:, 1].max())
    return -(-len(logits_T2) // len(segments_B2))


@torch.no_grad()
def read_windows(
    reader: Reader,
    windows: Windows,
    examples: Sequence[Example],
    score: Score,
    rank: Rank,
    *,
    unanswerable: bool,
    keep: int | None = None,
    step: Step | None = None,
) -> Readings | None:
    """Run the model over all windows and find each question's answer.

    Every rank must call this; only rank 0 gets the result. Candidate spans are kept for a block of
    windows at a time, so that memory grows with the answers alone.

    Args:
        reader: the model and how to feed it.
        windows, examples: a data set.
        score: n-best, answer length, null threshold, windows per batch.
        rank: this process's.
        unanswerable: whether "" may be an answer.
        keep: the most candidates that an answer lists; None lists all of the n-best.
        step: told of each batch.
    """
    began = time.monotonic()
    was_training = reader.model.training
    reader.model.eval()
    totals_4 = torch.zeros(4, dtype=torch.float64)  # loss, then start, end, span
    found: list[Answer] = []
    done = 0
    for rows in _blocks(windows.questions_N):
        parts: list[tuple[np.ndarray, Spans]] = []
        block_4 = torch.zeros(4, dtype=torch.float64, device=reader.device)
        for batch in score_batches(
            windows.lengths_N[rows], score.batch_size, rank.index, rank.world
        ):
            read = reader.read(windows, rows.start + batch)
            if read.counted:
                block_4 += _right(read)
                spans = search(
                    read.logits_T2,
                    read.segments_B2,
                    torch.from_numpy(windows.contexts_N2[rows][batch]),
                    n_best=score.n_best,
                    max_answer_length=score.max_answer_length,
                    mode=score.mode,
                    cls_N=torch.from_numpy(windows.cls_N[rows][batch]),
                )
                # Kept in main memory, candidates only: the device holds one batch at a time.
                parts.append((batch, spans.cpu()))
            done += 1
            if step is not None:
                step(done)
        mine = block_4.cpu(), parts
        everything = gather(mine) if rank.world > 1 else [mine]
        if everything is None:
            continue
        totals_4 += sum(totals for totals, _ in everything)
        first, last = windows.questions_N[rows][[0, -1]]
        found += answers(
            _in_order([part for _, parts in everything for part in parts]),
            question_N=windows.questions_N[rows] - first,
            # The context's token at position p of window n has its characters in row
            # chars_firsts_N[n] + p.
            segments_N2=np.stack([windows.chars_firsts_N[rows], windows.lengths_N[rows]], axis=1),
            chars_T2=windows.chars_C2,
            ids=[e.id for e in examples[first : last + 1]],
            contexts=[e.context for e in examples[first : last + 1]],
            n_best=score.n_best,
            null_threshold=score.null_threshold if unanswerable else None,
            mode=score.mode,
            keep=keep,
        )
    reader.model.train(was_training)
    if not rank.is_main:
        return None
    loss, *right_3 = (totals_4 / max(1, len(windows))).tolist()
    return Readings(
        loss=loss,
        start_accuracy=100 * right_3[0],
        end_accuracy=100 * right_3[1],
        span_accuracy=100 * right_3[2],
        answers=tuple(found),
        seconds=time.monotonic() - began,
    )


def _blocks(questions_N: np.ndarray) -> Iterator[slice]:
    """Cut windows into blocks that hold whole questions, at most `BLOCK` windows each where no
    question has more."""
    first = 0
    while first < len(questions_N):
        last = min(first + BLOCK, len(questions_N))
        if last < len(questions_N):
            begin = int(np.searchsorted(questions_N, questions_N[last]))
            last = (
                begin
                if begin > first
                else int(np.searchsorted(questions_N, questions_N[last], side="right"))
            )
        yield slice(first, last)
        first = last


def _right(read: Read) -> Tensor:
    """Sums over a batch: loss in nats, windows whose start, end, both are right; float64 [4]."""
    loss = reference_span_loss(read.logits_T2, read.segments_B2, read.starts_B, read.ends_B)
    right_3 = token_accuracy(read.logits_T2, read.segments_B2, read.starts_B, read.ends_B)
    return torch.cat([loss[None] * read.counted, right_3]).double()


def _in_order(parts: Sequence[tuple[np.ndarray, Spans]]) -> Spans:
    """Put the ranks' batches back into the windows' order."""
    place_N = torch.from_numpy(np.concatenate([rows for rows, _ in parts])).argsort()
    return join([spans for _, spans in parts])[place_N]
