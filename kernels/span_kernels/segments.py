"""Where the windows of a batch lie in the flat token axis: tensor arithmetic, no host read.

Shapes: T tokens of the whole batch, B windows (segments), 2 = (start, end) or (offset, length).
"""

import torch
from torch import Tensor


def owners(segments_B2: Tensor, tokens: int) -> Tensor:
    """The segment that each token belongs to, int64 [T]; B for a token of no segment.

    Every segment writes +(b + 1) where it begins and -(b + 1) where it stops; the running sum is
    b + 1 inside segment b and 0 between segments. That holds for disjoint segments in any order,
    and an empty segment cancels itself.
    """
    rows = segments_B2.shape[0]
    offset_B, length_B = segments_B2.long().unbind(1)
    mark_B = torch.arange(1, rows + 1, device=segments_B2.device)
    steps_T1 = torch.zeros(tokens + 1, dtype=torch.int64, device=segments_B2.device)
    steps_T1 = steps_T1.index_add(0, offset_B, mark_B)
    steps_T1 = steps_T1.index_add(0, offset_B + length_B.clamp(min=0), -mark_B)
    # 0 (no segment) becomes rows, b + 1 becomes b.
    return (steps_T1.cumsum(0)[:tokens] - 1) % (rows + 1)


def valid_labels(segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as int64 [B, 2] and a bool [B, 2] saying which lie in [0, length) of their segment."""
    labels_B2 = torch.stack((starts_B.long(), ends_B.long()), dim=1)
    return labels_B2, (labels_B2 >= 0) & (labels_B2 < segments_B2[:, 1:2])
