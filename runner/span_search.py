"""From start and end logits to the best spans of every window, the same on CPU and on GPU.

Shape suffixes:
    T  tokens of all windows, flat     N  windows         R  windows of one chunk
    W  positions of the chunk's widest window             V  the same and A - 1 more
    K  n-best                          A  answer lengths  C  candidates of one window
    2  (start, end), (offset, length) or [low, high)
A padded batch [B, L] is the flat case offset = b * L. Positions count from their window's start.

How the exact search needs O(L log A) steps: a sliding maximum of the end logits, by doubling, gives
each start the score of its best span. A span that starts elsewhere than at the K best of these
starts has K spans ahead of it, so the K best spans all lie among K starts x A lengths. Scores
travel as integer keys: order-preserving bits of the float above, the tie-break below. So ties are
decided by the key itself, on every device alike, without a stable sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Mode = Literal["exact", "run_qa"]
NEVER = float("-inf")
# More rows than this no longer fit a core's cache together; a GPU is the faster the more it gets.
_CPU_CHUNK = 256
_HALF_OF_MAX = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True, slots=True)
class Spans:
    """The best spans of every window, best first; an absent span scores -inf and stands at -1.

    score_NK: float32, start logit + end logit. start_NK, end_NK: int32 positions in the window, end
    inclusive. null_score_N: float32, start logit + end logit at the window's [CLS].
    """

    score_NK: Tensor
    start_NK: Tensor
    end_NK: Tensor
    null_score_N: Tensor

    def cpu(self) -> Spans:
        """The same spans in main memory."""
        return Spans(
            self.score_NK.cpu(), self.start_NK.cpu(), self.end_NK.cpu(), self.null_score_N.cpu()
        )


def join(parts: Sequence[Spans]) -> Spans:
    """Put the spans of several batches, at least one and all of the same K, below one another."""
    return Spans(
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
) -> Spans:
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
    score_NK = torch.full((num, n_best), NEVER, device=device)
    start_NK = torch.full((num, n_best), -1, dtype=torch.int32, device=device)
    end_NK = start_NK.clone()

    offset_N, length_N = segments_N2.unbind(1)
    low_N, high_N = contexts_N2.unbind(1)
    null_score_N = _usable(logits_T2[offset_N + cls_N].float()).sum(1)
    if mode == "exact":  # it need not read anything but the context
        shift_N, width_N = low_N, (high_N - low_N).clamp(min=0)
    else:  # every token of the window competes
        shift_N, width_N = torch.zeros_like(low_N), length_N
    chunk = min(chunk, _CPU_CHUNK) if device.type == "cpu" else chunk
    order_N = width_N.argsort(descending=True, stable=True)
    widest = width_N[order_N[::chunk]].tolist()
    pair_T, dtype = _pairs(logits_T2)
    for first, width in zip(range(0, num, chunk), widest, strict=True):
        if width == 0:
            break  # sorted: only empty contexts from here on
        row_R = order_N[first : first + chunk]
        shift_R1 = shift_N[row_R, None]
        position_W = torch.arange(width, device=device)
        # Behind a short window's end its row runs on into other windows: masked below, but it must
        # stay inside the tensor.
        index_RW = (offset_N[row_R, None] + shift_R1 + position_W).clamp_(max=len(pair_T) - 1)
        logits_RW2 = pair_T.index_select(0, index_RW.view(-1)).view(dtype)
        logits_RW2 = logits_RW2.view(*index_RW.shape, 2).float()
        real_RW = position_W < width_N[row_R, None]
        start_RW = _usable(torch.where(real_RW, logits_RW2[..., 0], NEVER))
        end_RW = _usable(torch.where(real_RW, logits_RW2[..., 1], NEVER))
        if mode == "exact":
            found = _exact(start_RW, end_RW, n_best, max_answer_length)
        else:
            found = _run_qa(start_RW, end_RW, contexts_N2[row_R], n_best, max_answer_length)
        score_RK, first_RK, last_RK = found
        exists_RK = score_RK > NEVER
        columns = slice(score_RK.shape[1])  # windows of a few tokens have fewer than K spans
        score_NK[row_R, columns] = score_RK
        start_NK[row_R, columns] = torch.where(exists_RK, first_RK + shift_R1, -1).int()
        end_NK[row_R, columns] = torch.where(exists_RK, last_RK + shift_R1, -1).int()
    return Spans(score_NK, start_NK, end_NK, null_score_N)


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


def _usable(logits: Tensor) -> Tensor:
    # NaN: no span there. +inf: its sum with -inf would be NaN. -0.0: its key would differ from 0.0.
    return logits.nan_to_num(nan=NEVER, posinf=_HALF_OF_MAX, neginf=NEVER).add_(0.0)


def _exact(
    start_RW: Tensor, end_RW: Tensor, n_best: int, max_answer_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """score_RK, start_RK, end_RK of the best spans; K = n_best or, if fewer, all candidates.

    Positions are int64 and mean nothing where the score is -inf.
    """
    num_rows, width = start_RW.shape
    longest = min(max_answer_length, width)
    # A start's ends fall into blocks of `side`, the last of `rest`. One block will do for K = 1.
    side = longest if n_best == 1 else math.isqrt(longest)
    num_blocks = -(-longest // side)
    rest, last = longest - (num_blocks - 1) * side, (num_blocks - 1) * side
    end_RV = pad(end_RW, (0, num_blocks * side - 1), value=NEVER)  # every start has all its ends
    block_RV, last_block_RV = _sliding_max(end_RV, side), _sliding_max(end_RV, rest)

    # 1. The K starts whose best span is best. Ties go to the start with the most positions after
    # it, which is the lowest.
    best_end_RW = last_block_RV[:, last : last + width]
    for first in range(0, last, side):
        best_end_RW = torch.maximum(best_end_RW, block_RV[:, first : first + width])
    after_W = torch.arange(width - 1, -1, -1, device=start_RW.device)
    _, after_RK = _unpack(_largest(_pack(start_RW + best_end_RW, after_W), n_best, ordered=False))

    # 2. The K best blocks of these starts.
    start_RK = width - 1 - after_RK
    firsts = torch.arange(0, last, side, device=start_RW.device)
    block_RC = block_RV.gather(1, (start_RK[:, :, None] + firsts).view(num_rows, -1))
    last_block_RK1 = last_block_RV.gather(1, start_RK + last)[:, :, None]
    best_RKB = torch.cat([block_RC.view(*start_RK.shape, -1), last_block_RK1], 2)
    best_RKB += start_RW.gather(1, start_RK)[:, :, None]
    blocks_after_B = torch.arange(num_blocks - 1, -1, -1, device=start_RW.device)
    tie_RKB = after_RK[:, :, None] * num_blocks + blocks_after_B
    key_RC = _pack(best_RKB, tie_RKB).view(num_rows, -1)
    _, tie_RK = _unpack(_largest(key_RC, n_best, ordered=False))

    # 3. The K best spans of these blocks.
    start_RK = width - 1 - tie_RK // num_blocks
    first_RK = (num_blocks - 1 - tie_RK % num_blocks) * side
    length_RKS = first_RK[:, :, None] + torch.arange(side, device=start_RW.device)
    end_RC = end_RV.gather(1, (start_RK[:, :, None] + length_RKS).view(num_rows, -1))
    score_RKS = start_RW.gather(1, start_RK)[:, :, None] + end_RC.view_as(length_RKS)
    score_RKS = torch.where(length_RKS < longest, score_RKS, NEVER)
    tie_RKS = (width - 1 - start_RK)[:, :, None] * longest + (longest - 1 - length_RKS).clamp_(0)
    key_RC = _pack(score_RKS, tie_RKS).view(num_rows, -1)
    score_RK, tie_RK = _unpack(_largest(key_RC, n_best))
    start_RK = width - 1 - tie_RK // longest
    return score_RK, start_RK, start_RK + longest - 1 - tie_RK % longest


def _sliding_max(value_RV: Tensor, num: int) -> Tensor:
    # max(value[r, v : v + num]), from maxima over 1, 2, 4, ... and two overlapping ones at the last.
    covered = 1
    while covered < num:
        step = min(covered, num - covered)
        value_RV = torch.maximum(value_RV[:, :-step], value_RV[:, step:])
        covered += step
    return value_RV


def _run_qa(
    start_RW: Tensor, end_RW: Tensor, contexts_R2: Tensor, n_best: int, max_answer_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_exact`, from the valid cells of the grid of the K best starts x the K best ends."""
    num_rows, width = start_RW.shape
    after_W = torch.arange(width - 1, -1, -1, device=start_RW.device)
    start_score_RK, start_after_RK = _unpack(_largest(_pack(start_RW, after_W), n_best))
    end_score_RK, end_after_RK = _unpack(_largest(_pack(end_RW, after_W), n_best))
    start_RK, end_RK = width - 1 - start_after_RK, width - 1 - end_after_RK
    start_score_RK.masked_fill_(start_RK < contexts_R2[:, :1], NEVER)
    end_score_RK.masked_fill_(end_RK >= contexts_R2[:, 1:], NEVER)
    distance_RKK = end_RK.int()[:, None, :] - start_RK.int()[:, :, None]
    valid_RKK = (distance_RKK >= 0) & (distance_RKK < max_answer_length)
    score_RKK = start_score_RK[:, :, None] + end_score_RK[:, None, :]
    score_RKK = torch.where(valid_RKK, score_RKK, NEVER)
    # Ties go to the cell that comes first when the grid is walked start by start.
    side = start_RK.shape[1]
    after_C = torch.arange(side * side - 1, -1, -1, device=start_RW.device)
    key_RC = _pack(score_RKK.view(num_rows, -1), after_C)
    score_RK, after_RK = _unpack(_largest(key_RC, n_best))
    cell_RK = side * side - 1 - after_RK
    return score_RK, start_RK.gather(1, cell_RK // side), end_RK.gather(1, cell_RK % side)


def _largest(key_RC: Tensor, num: int, *, ordered: bool = True) -> Tensor:
    """The `num` largest keys of each row, or all if there are fewer; descending if `ordered`."""
    if num == 1:  # a maximum is many times cheaper than topk
        return key_RC.amax(1, keepdim=True)
    num_rows, count = key_RC.shape
    side = 4
    if count >= 3 * side * num:
        # They lie in the `num` groups with the largest maxima: two small topk cost less than one.
        key_RC = pad(key_RC, (0, -count % side), value=-(1 << 63))
        key_RSG = key_RC.view(num_rows, side, -1)
        group_RK = key_RSG.amax(1).topk(num, sorted=False).indices
        key_RC = key_RSG.gather(2, group_RK[:, None].expand(-1, side, -1)).flatten(1)
    return key_RC.topk(min(num, count), sorted=ordered).values


def _pack(score: Tensor, tie: Tensor) -> Tensor:
    # int64 keys ordered by score, then by tie (0 <= tie < 2**32), the greater first.
    key = _ordered(score.view(torch.int32)).to(torch.int64)
    return key.bitwise_left_shift_(32).bitwise_or_(tie)


def _unpack(key: Tensor) -> tuple[Tensor, Tensor]:
    return _ordered((key >> 32).to(torch.int32)).view(torch.float32), key & 0xFFFFFFFF


def _ordered(bits: Tensor) -> Tensor:
    # Negative floats order backwards as integers: flip all bits but the sign. Applied twice it
    # gives the bits back.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
