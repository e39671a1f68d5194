"""gather_windows: tokens, segment ids and positions of every window, and what fills up behind."""

import numpy as np
import pytest
import torch
from span_kernels import gather_windows
from span_kernels.gather import _gather

from tests.apart import SLOW_INTERPRETED


def by_hand(tokens, types, firsts, lengths, total, first_position, pad_id):
    out = [[pad_id, 0, first_position] for _ in range(total)]
    place = 0
    for first, length in zip(firsts, lengths, strict=True):
        for n in range(length):
            out[place] = [tokens[first + n], types[first + n], first_position + n]
            place += 1
    return torch.tensor(out, dtype=torch.int32).reshape(-1, 3).T


def batch_of(lengths, device, seed=0):
    draw = np.random.default_rng(seed)
    everything = int(sum(lengths)) + 50
    tokens = draw.integers(0, 30_000, everything).astype(np.int32)
    types = draw.integers(0, 2, everything).astype(np.uint8)
    firsts = [int(draw.integers(0, everything - length + 1)) for length in lengths]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    arrays = (tokens, types, np.array(firsts, dtype=np.int64), bounds)
    return tokens, types, firsts, [torch.from_numpy(a).to(device) for a in arrays]


@pytest.mark.parametrize(
    ("lengths", "fill"),
    [
        ((7,), 1),
        ((1, 1, 1), 0),
        ((5, 130, 2, 64), 55),  # a window over a block's edge, and filling up to the end of one
        ((3, 0, 4), 1),
        (tuple([2] * 70), 0),  # more windows than a program reads at once
        *(
            pytest.param(lengths, fill, marks=SLOW_INTERPRETED)
            for lengths, fill in (
                ((7,), 0),
                ((5, 130, 2, 64), 0),
                ((3, 0, 4), 33),
                (tuple([9] * 70), 1),
            )
        ),
    ],
)
def test_windows_come_end_to_end(lengths, fill, device):
    tokens, types, firsts, inputs = batch_of(lengths, device)
    total = sum(lengths) + fill
    found = gather_windows(*inputs, total, first_position=2, pad_id=99)
    assert found.dtype == torch.int32
    assert found.device == inputs[0].device
    wanted = by_hand(tokens.tolist(), types.tolist(), firsts, lengths, total, 2, 99)
    assert torch.equal(found.cpu(), wanted)


def test_shapes_that_do_not_fit_are_refused(device):
    _, _, _, (tokens, types, firsts, bounds) = batch_of((3, 4), device)
    with pytest.raises(ValueError, match="types_N"):
        gather_windows(tokens, types[1:], firsts, bounds, 7)
    with pytest.raises(ValueError, match="bounds_B1"):
        gather_windows(tokens, types, firsts, bounds[1:], 7)


def test_opcheck(device):
    *_, inputs = batch_of((3, 4), device)
    torch.library.opcheck(_gather, (*inputs, 10, 2, 0))
