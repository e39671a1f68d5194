"""One rank of tests/test_exchange.py: DTYPE shared|messages|elsewhere -> kind, steps, weights."""

from __future__ import annotations

import hashlib
import os
import sys
import time

import torch
import torch.distributed as dist

from runner import exchange

STEPS, SIZES = 20, (12_000, 600)  # sizes that 2 and 3 divide


def main() -> None:
    dtype, how = getattr(torch, sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if how == "messages":
        exchange.shared_bytes = lambda *_: None
    elif how == "elsewhere" and rank == 1:
        exchange._mapped = lambda *_: None
    torch.manual_seed(0)
    weights = [torch.randn(size).to(dtype) for size in SIZES]
    group = dist.group.WORLD
    assert group is not None
    by = exchange.open_exchange(weights, dtype, group)
    for step in range(STEPS):
        torch.manual_seed(1000 * step + rank)
        for gradient in by.gradients:
            gradient.copy_(torch.randn(gradient.shape))
        time.sleep(0.01 * ((step + rank) % 3))  # each is late once
        norm = torch.stack([share.float().square().sum() for share in by.shares()]).sum()
        dist.all_reduce(norm)
        time.sleep(0.01 * ((step - rank) % 3))
        for flat, gradient in zip(weights, by.gradients, strict=True):
            by._part(flat).sub_(by._part(gradient) * 0.1)
        by.hand_out()
    hashed = hashlib.sha256(b"".join(w.float().numpy().tobytes() for w in weights)).hexdigest()
    print(by.kind.split()[0], STEPS, hashed)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
