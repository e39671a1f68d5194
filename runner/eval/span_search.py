"""From start and end logits to the best spans of every window, the same on CPU and on GPU.

Shape suffixes:
    T  tokens of all windows, flat     N  windows         R  windows of one chunk
    W  positions of the chunk's widest window             V  the same and A - 1 more
    K  n-best                          A  answer lengths  C  candidates of one window
    2  (start, end), (offset, length) or [low, high)
A padded batch [B, L] is the flat case offset = b * L. Positions count from their window's start.

How the exact search needs O(L log A) steps: a sliding maximum of the end logits, by doubling, gives
each start the score of its best span. A span that starts elsewhere than at the K best of these
starts has K spans ahead of it, so the K best spans all lie among K starts x A lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

Mode = Literal["exact", "run_qa"]
NEVER = float("-inf")
# More rows than this no longer fit a core's cache together; a GPU is the faster the more it gets.
_CPU_CHUNK = 512
_GROUP = 4  # scores that `_top` treats as one at first
_SORTED_WHOLE = 256  # keys of a row that are sorted sooner than a part of them is selected
_HALF_OF_MAX = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True, slots=True)
class BestSpans:
    """The best spans of every window, best first; an absent span scores -inf and stands at -1.

    score_NK: float32, start logit + end logit. start_NK, end_NK: int32 positions in the window, end
    inclusive. null_score_N: float32, start logit + end logit at the window's [CLS].
    """

    score_NK: Tensor
    start_NK: Tensor
    end_NK: Tensor
    null_score_N: Tensor

    def cpu(self) -> BestSpans:
        """The same spans in main memory."""
        return BestSpans(
            self.score_NK.cpu(), self.start_NK.cpu(), self.end_NK.cpu(), self.null_score_N.cpu()
        )

    def __getitem__(self, rows: slice | Tensor) -> BestSpans:
        """The spans of some windows, by a slice (then they are views) or by positions."""
        return BestSpans(
            self.score_NK[rows], self.start_NK[rows], self.end_NK[rows], self.null_score_N[rows]
        )


def join(parts: Sequence[BestSpans]) -> BestSpans:
    """Put the spans of several batches, at least one and all of the same K, below one another."""
    return BestSpans(
        torch.cat([part.score_NK for part in parts]),
        torch.cat([part.start_NK for part in parts]),
        torch.cat([part.end_NK for part in parts]),
        torch.cat([part.null_score_N for part in parts]),
    )


def search(
    logits_T2: Tensor,
    segments_N2: Tensor,
    contexts_N2: Tensor,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    mode: Mode = "exact",
    chunk: int = 1024,
    cls_N: Tensor | None = None,
) -> BestSpans:
    """Find the best spans of each window: start <= end, not too long, inside the context.

    Mode "exact" looks at all valid spans; equal scores go to the lowest start, then the lowest end.
    Mode "run_qa" looks at the `n_best` best starts x the `n_best` best ends of the whole window, as
    `postprocess_qa_predictions` does in Hugging Face's examples (question-answering/utils_qa.py),
    and in its order: by score, then start logit, then end logit. Equal logits, whose order numpy's
    argsort leaves open there, go to the lowest position. Scores are float32 sums whatever the
    logits' dtype. A span whose score would be NaN or -inf does not exist.

    Args:
        logits_T2: start and end logits, bfloat16, float16 or float32, on any device.
        segments_N2: integer (offset, length) of each window in the flat tokens, length >= 1. In
            mode "run_qa" padding inside the length competes with real tokens, as it does there.
        contexts_N2: integer [low, high) of the context in each window; low >= high is empty.
        n_best: K; in mode "run_qa" also the number of starts and of ends that are combined.
        max_answer_length: in tokens.
        chunk: the most windows to search at once; it bounds the memory. Widest windows go first.
        cls_N: integer position of [CLS] in each window; None means 0.

    Returns:
        Spans of K = n_best columns, on the device of the logits, without a gradient.

    Raises:
        ValueError: a setting below 1, a wrong shape, or a segment, context or [CLS] out of bounds.
    """
    if min(n_best, max_answer_length, chunk) < 1:
        raise ValueError("n_best, max_answer_length and chunk must be at least 1")
    logits_T2, device, num = logits_T2.detach(), logits_T2.device, len(segments_N2)
    segments_N2 = segments_N2.to(device, torch.int64)
    contexts_N2 = contexts_N2.to(device, torch.int64)
    cls_N = torch.zeros(num, device=device) if cls_N is None else cls_N
    cls_N = cls_N.to(device, torch.int64)
    _check(logits_T2, segments_N2, contexts_N2, cls_N)
    offset_N, length_N = segments_N2.unbind(1)
    low_N, high_N = contexts_N2.unbind(1)
    null_score_N = _usable(logits_T2[offset_N + cls_N].float() + 0.0).sum(1)
    if mode == "exact":  # it need not read anything but the context
        ranges = _Ranges(offset_N, contexts_N2, low_N, (high_N - low_N).clamp(min=0))
    else:  # every token of the window competes
        ranges = _Ranges(offset_N, contexts_N2, torch.zeros_like(low_N), length_N)
    chunk = min(chunk, _CPU_CHUNK) if device.type == "cpu" else chunk
    found = _search_ranges(logits_T2, ranges, n_best, max_answer_length, mode, chunk)
    return BestSpans(*found, null_score_N)


class _Ranges(NamedTuple):
    """What is searched: of each window `width_N` tokens, from its token `shift_N` on."""

    offset_N: Tensor
    contexts_N2: Tensor
    shift_N: Tensor
    width_N: Tensor


def _search_ranges(
    logits_T2: Tensor,
    ranges: _Ranges,
    n_best: int,
    max_answer_length: int,
    mode: Mode,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """score_NK, start_NK, end_NK of `search`, all of it checked, `chunk` windows at a time."""
    offset_N, contexts_N2, shift_N, width_N = ranges
    num, device = len(offset_N), logits_T2.device
    score_NK = torch.full((num, n_best), NEVER, device=device)
    start_NK = torch.full((num, n_best), -1, dtype=torch.int32, device=device)
    end_NK = start_NK.clone()
    order_N = width_N.argsort(descending=True, stable=True)
    widest = width_N[order_N[::chunk]].tolist()
    pair_T, dtype = _pairs(logits_T2)
    room = max_answer_length - 1 if mode == "exact" else 0  # ends that `_exact` reads beyond
    for first, width in zip(range(0, num, chunk), widest, strict=True):
        if width == 0:
            break  # sorted: only empty contexts from here on
        row_R = order_N[first : first + chunk]
        # Row r holds `width` neighbouring tokens, in which what is searched of its window stands at
        # columns [left, right). The rest belongs to other windows and is masked.
        wanted_R = offset_N[row_R] + shift_N[row_R]
        first_R = wanted_R.clamp(max=len(pair_T) - width)
        left_R = wanted_R - first_R
        logits_RW2 = pair_T.unfold(0, width, 1).index_select(0, first_R).view(dtype)
        start_RW, end_RW = logits_RW2.view(-1, width, 2).float().unbind(2)
        outside_RW = _outside(left_R, left_R + width_N[row_R], width)
        start_RW = _usable(start_RW + outside_RW)
        # Columns behind the last one, so that every start has as many ends.
        end_RV = torch.full((len(row_R), width + min(room, width - 1)), NEVER, device=device)
        _usable(torch.add(end_RW, outside_RW, out=end_RV[:, :width]))
        if mode == "exact":
            found = _exact(start_RW, end_RV, n_best)
        else:
            bounds_R2 = left_R[:, None] + contexts_N2[row_R]
            found = _run_qa(start_RW, end_RV, bounds_R2, n_best, max_answer_length)
        score_RK, first_RK, last_RK = found
        exists_RK, shift_R1 = score_RK > NEVER, (shift_N[row_R] - left_R)[:, None]
        columns = slice(score_RK.shape[1])  # windows of a few tokens have fewer than K spans
        score_NK[row_R, columns] = score_RK
        start_NK[row_R, columns] = torch.where(exists_RK, first_RK + shift_R1, -1).int()
        end_NK[row_R, columns] = torch.where(exists_RK, last_RK + shift_R1, -1).int()
    return score_NK, start_NK, end_NK


def _check(logits_T2: Tensor, segments_N2: Tensor, contexts_N2: Tensor, cls_N: Tensor) -> None:
    num = len(segments_N2)
    if logits_T2.shape != (len(logits_T2), 2):
        raise ValueError(f"logits_T2 has shape {tuple(logits_T2.shape)}, not [tokens, 2]")
    shapes = [tuple(tensor.shape) for tensor in (segments_N2, contexts_N2, cls_N)]
    if shapes != [(num, 2), (num, 2), (num,)]:
        raise ValueError(
            f"segments_N2, contexts_N2, cls_N have shapes {shapes}, not [N, 2], [N, 2], [N]"
        )
    offset_N, length_N = segments_N2.unbind(1)
    low_N, high_N = contexts_N2.unbind(1)
    good_N = (offset_N >= 0) & (length_N >= 1) & (offset_N + length_N <= len(logits_T2))
    good_N &= (low_N >= 0) & (high_N <= length_N) & (cls_N >= 0) & (cls_N < length_N)
    if not bool(good_N.all()):
        row = int(good_N.logical_not().nonzero()[0, 0])
        raise ValueError(
            f"window {row}: segment {segments_N2[row].tolist()}, context "
            f"{contexts_N2[row].tolist()} or [CLS] at {int(cls_N[row])} is out of bounds "
            f"({len(logits_T2)} tokens in all)"
        )


def _pairs(logits_T2: Tensor) -> tuple[Tensor, torch.dtype]:
    # Each token's (start, end) as one integer, and the dtype inside: to gather one element is far
    # cheaper than to gather a row of two.
    if logits_T2.dtype not in (torch.bfloat16, torch.float16):
        logits_T2 = logits_T2.float()
    logits_T2 = logits_T2.contiguous()
    if logits_T2.storage_offset() % 2:
        logits_T2 = logits_T2.clone()  # a pair must begin at an even element
    pair = torch.int64 if logits_T2.dtype == torch.float32 else torch.int32
    return logits_T2.view(pair).view(-1), logits_T2.dtype


def _outside(left_R: Tensor, right_R: Tensor, width: int) -> Tensor:
    # [R, W]: 0.0 at columns [left, right), else -inf. Rows of a sliding view, as everywhere here:
    # far cheaper than to compare every column.
    flat = torch.zeros(2 * width, device=left_R.device)
    flat[:width] = NEVER
    before_RW = flat.unfold(0, width, 1).index_select(0, width - left_R)
    behind_RW = flat.flip(0).unfold(0, width, 1).index_select(0, width - right_R)
    return before_RW.add_(behind_RW)


def _usable(logits: Tensor) -> Tensor:
    # In place: no NaN (no span there) and no +inf (its sum with -inf is NaN). What was added before
    # has turned -0.0 into the 0.0 that it equals.
    return logits.nan_to_num_(nan=NEVER, posinf=_HALF_OF_MAX, neginf=NEVER)


def _exact(start_RW: Tensor, end_RV: Tensor, n_best: int) -> tuple[Tensor, Tensor, Tensor]:
    """score_RK, start_RK, end_RK of the best spans; K = n_best or, if fewer, all candidates."""
    # Positions are int64 and mean nothing where the score is -inf.
    num_rows, width = start_RW.shape
    longest = end_RV.shape[1] - width + 1
    # best_end[r, w] = max(end[r, w : w + A]): maxima over 1, 2, 4, ... ends, then two that overlap.
    best_end_RW, covered = end_RV, 1
    while covered < longest:
        step = min(covered, longest - covered)
        best_end_RW = torch.maximum(best_end_RW[:, :-step], best_end_RW[:, step:])
        covered += step
    _, start_RK = _top(start_RW + best_end_RW, n_best)
    start_RK = start_RK.sort(1).values  # then the candidates below stand in the order of ties
    # Each start's ends are A neighbours in memory: rows of a sliding view are the fastest copy.
    first_R1 = torch.arange(num_rows, device=end_RV.device)[:, None] * end_RV.shape[1]
    score_CA = end_RV.view(-1).unfold(0, longest, 1).index_select(0, (first_R1 + start_RK).view(-1))
    score_CA += start_RW.gather(1, start_RK).view(-1, 1)
    score_RK, place_RK = _top(score_CA.view(num_rows, -1), n_best)
    start_RK = start_RK.gather(1, place_RK // longest)
    return score_RK, start_RK, start_RK + place_RK % longest


def _run_qa(
    start_RW: Tensor, end_RV: Tensor, bounds_R2: Tensor, n_best: int, max_answer_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_exact`, from the valid cells of the grid of the K best starts x the K best ends."""
    start_score_RK, start_RK = _top(start_RW, n_best)
    end_score_RK, end_RK = _top(end_RV, n_best)
    start_score_RK = start_score_RK.masked_fill(start_RK < bounds_R2[:, :1], NEVER)
    end_score_RK = end_score_RK.masked_fill(end_RK >= bounds_R2[:, 1:], NEVER)
    distance_RKK = end_RK.int()[:, None, :] - start_RK.int()[:, :, None]
    valid_RKK = (distance_RKK >= 0) & (distance_RKK < max_answer_length)
    score_RKK = start_score_RK[:, :, None] + end_score_RK[:, None, :]
    score_RKK.masked_fill_(~valid_RKK, NEVER)
    score_RK, cell_RK = _top(score_RKK.flatten(1), n_best)
    side = start_RK.shape[1]
    return score_RK, start_RK.gather(1, cell_RK // side), end_RK.gather(1, cell_RK % side)


def _top(score_RC: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` best scores of each row, or all if fewer, best first, and their places."""
    # Equal scores come in the order of their places. Scores must not hold NaN or -0.0.
    if num == 1:
        return score_RC.max(1, keepdim=True)  # the first of equal maxima, on every device
    count, device = score_RC.shape[1], score_RC.device
    if count >= 3 * _GROUP * num:
        # The best lie in the groups of neighbours with the best maxima: two small topk are cheaper
        # than a large one, and most scores never become a key.
        if count % _GROUP:
            score_RC = pad(score_RC, (0, -count % _GROUP), value=NEVER)
        best_RG = max_pool1d(score_RC[:, None], _GROUP)[:, 0]
        last = best_RG.shape[1] - 1
        group_G = torch.arange(last + 1, device=device)
        key_RK = _largest(_pack(best_RG, last - group_G), num)
        first_RK1 = (last - _unpack(key_RK)[1])[:, :, None] * _GROUP
        place_RC = (first_RK1 + torch.arange(_GROUP, device=device)).flatten(1)
        score_RC = score_RC.gather(1, place_RC)
    else:
        place_RC = torch.arange(count, device=device)
    last = count + _GROUP
    score_RK, behind_RK = _unpack(_largest(_pack(score_RC, last - place_RC), min(num, count)))
    return score_RK, last - behind_RK


def _largest(key_RC: Tensor, num: int) -> Tensor:
    """The `num` largest keys of each row, descending."""
    if key_RC.is_cuda:
        return key_RC.topk(num).values
    # numpy selects and sorts integers with vector instructions: a fifth of topk's time here.
    keys, count = key_RC.numpy(), key_RC.shape[1]
    if count > _SORTED_WHOLE:
        keys = np.partition(keys, count - num, axis=1)[:, count - num :]
    return torch.from_numpy(np.sort(keys, axis=1)[:, -num:]).flip(1)


def _pack(score: Tensor, behind: Tensor) -> Tensor:
    # int64 keys that order by score, then by `behind`: order-preserving bits of the float above,
    # 0 <= behind < 2**32 below. Negative floats order backwards as integers: flip all but the sign.
    bits = score.view(torch.int32)
    key = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).to(torch.int64)
    return key.bitwise_left_shift_(32).bitwise_or_(behind)


def _unpack(key: Tensor) -> tuple[Tensor, Tensor]:
    bits = (key >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), key & 0xFFFFFFFF
