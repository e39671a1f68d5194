"""What a caller is told when shapes or dtypes do not fit; values are never looked at."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_rows(segments_B2: Tensor, starts_B: Tensor, ends_B: Tensor) -> None:
    rows = segments_B2.shape[0] if segments_B2.ndim else None
    expected = {
        "segments_B2": (segments_B2, (None, 2)),
        "starts_B": (starts_B, (rows,)),
        "ends_B": (ends_B, (rows,)),
    }
    for name, (x, shape) in expected.items():
        check_shape(name, x, shape)
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: found {x.dtype}, need torch.int32 or torch.int64")


def check_shape(name: str, x: Tensor, shape: Sequence[int | None]) -> None:
    fits = x.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(x.shape, shape, strict=True)
    )
    if not fits:
        need = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: found shape {list(x.shape)}, need [{need}]")


def check_floating(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(f"{name}: found {x.dtype}, need a floating dtype")
