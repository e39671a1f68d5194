"""Scores a model over held-out windows, shared over the ranks, and turns logits into answers on
rank 0.

Legend: N windows of the data set, B windows of a batch, L longest of them, K candidate spans, T
    rows of logits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from runner.metric_objects import Squad, SquadV2
from runner.model import span_logits
from runner.ranks import Rank
from runner.spans import Answer, Spans, answers, join, search


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


@dataclass(frozen=True)
class Evaluation:
    """Readings held against the right answers.

    Attributes:
        readings: loss, token accuracies and answers.
        exact_match, f1: percent over questions, by SQuAD's official definition.
        details: further scores (SQuAD v2's HasAns and NoAns), name to percent.
    """

    readings: Readings
    exact_match: float
    f1: float
    details: dict[str, float]

    def metric(self, name: str) -> float:
        """A score by the name that [stop] and [expect] use."""
        return float(getattr(self if name in ("exact_match", "f1") else self.readings, name))


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
    step: Step | None = None,
) -> Readings | None:
    """Run the model over all windows and find each question's answer.

    Every rank must call this; only rank 0 gets the result.
    """
    began = time.monotonic()
    was_training = reader.model.training
    reader.model.eval()
    batches = score_batches(windows.lengths_N, score.batch_size, rank.index, rank.world)
    totals_4 = torch.zeros(
        4, dtype=torch.float64, device=reader.device
    )  # loss, then start, end, span
    parts: list[tuple[np.ndarray, Spans]] = []
    for done, rows in enumerate(batches, 1):
        read = reader.read(windows, rows)
        if read.counted:
            loss = reference_span_loss(read.logits_T2, read.segments_B2, read.starts_B, read.ends_B)
            right_3 = token_accuracy(read.logits_T2, read.segments_B2, read.starts_B, read.ends_B)
            totals_4 += torch.cat([loss[None] * read.counted, right_3]).to(totals_4)
            spans = search(
                read.logits_T2,
                read.segments_B2,
                torch.from_numpy(windows.contexts_N2[rows]),
                n_best=score.n_best,
                max_answer_length=score.max_answer_length,
                mode=score.mode,
                cls_N=torch.from_numpy(windows.cls_N[rows]),
            )
            # Kept in main memory, candidates only: the device holds one batch at a time.
            parts.append((rows, spans.cpu()))
        if step is not None:
            step(done)
    reader.model.train(was_training)
    everything = gather((totals_4.cpu().numpy(), parts))
    if everything is None:
        return None
    loss, *right_3 = np.sum([totals for totals, _ in everything], axis=0) / max(1, len(windows))
    merged = _in_order([part for _, parts in everything for part in parts])
    found = answers(
        merged,
        question_N=windows.questions_N,
        # The context's token at position p of window n has its characters in row chars_firsts_N[n]
        # + p.
        segments_N2=np.stack([windows.chars_firsts_N, windows.lengths_N], axis=1),
        chars_T2=windows.chars_C2,
        ids=[e.id for e in examples],
        contexts=[e.context for e in examples],
        n_best=score.n_best,
        null_threshold=score.null_threshold if unanswerable else None,
        mode=score.mode,
    )
    return Readings(
        loss=float(loss),
        start_accuracy=100 * float(right_3[0]),
        end_accuracy=100 * float(right_3[1]),
        span_accuracy=100 * float(right_3[2]),
        answers=tuple(found),
        seconds=time.monotonic() - began,
    )


def _in_order(parts: Sequence[tuple[np.ndarray, Spans]]) -> Spans:
    """Put the ranks' batches back into the windows' order."""
    place_N = torch.from_numpy(np.concatenate([rows for rows, _ in parts])).argsort()
    spans = join([spans for _, spans in parts])
    return Spans(
        spans.score_NK[place_N],
        spans.start_NK[place_N],
        spans.end_NK[place_N],
        spans.null_score_N[place_N],
    )


def evaluate(readings: Readings, examples: Sequence[Example], *, unanswerable: bool) -> Evaluation:
    """Hold answers against the right ones by the official evaluation of SQuAD v1.1, or of v2.0
    where there may be none."""
    references = [
        {"id": e.id, "answers": {"text": list(e.answers), "answer_start": list(e.answer_starts)}}
        for e in examples
    ]
    if not unanswerable:
        predictions = [{"id": a.id, "prediction_text": a.text} for a in readings.answers]
        scores = _computed(Squad(), predictions, references)
        return Evaluation(readings, scores["exact_match"], scores["f1"], {})
    # The metric looks for the best threshold too, so it is given each question's best span and how
    # much better "no answer" scored; the job's threshold decides as it did in `answers`.
    chosen = {a.id: a.text for a in readings.answers}
    predictions = [
        {
            "id": a.id,
            "prediction_text": a.span.text if a.span else "",
            "no_answer_probability": a.null_difference,
        }
        for a in readings.answers
    ]
    best = _computed(SquadV2(), predictions, references, no_answer_threshold=float("inf"))
    for prediction in predictions:
        prediction |= {"prediction_text": chosen[prediction["id"]], "no_answer_probability": 0.0}
    scores = _computed(SquadV2(), predictions, references)
    details = {
        name: scores[key]
        for name, key in (
            ("has_answer_exact_match", "HasAns_exact"),
            ("has_answer_f1", "HasAns_f1"),
            ("no_answer_exact_match", "NoAns_exact"),
        )
        if key in scores
    }
    details |= {"best_exact_match": best["best_exact"], "best_f1": best["best_f1"]}
    return Evaluation(readings, scores["exact"], scores["f1"], details)


def _computed(metric: Any, predictions: list[Any], references: list[Any], **options: Any) -> Any:
    found = metric.compute(predictions=predictions, references=references, **options)
    if found is None:
        raise AssertionError("a metric of one process always has a result")
    return found
