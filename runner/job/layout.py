"""How one optimiser step's windows are spread over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from runner.errors import JobError
from runner.job.schema import Train, divisors, one_of


@dataclass(frozen=True)
class Layout:
    """How one optimiser step's windows are spread: batch_size = world * micro_batch_size *
    micro_batches."""

    world: int
    micro_batch_size: int
    micro_batches: int


def batch_layout(train: Train, world: int) -> Layout:
    """Divide the global batch over the ranks.

    Raises:
        JobError: if it does not divide, listing what would.
    """
    if train.batch_size % world:
        fitting = [n for n in divisors(train.batch_size) if n <= max(world, 8)]
        below, above = train.batch_size // world * world, (train.batch_size // world + 1) * world
        sizes = one_of([size for size in (below, above) if size])
        raise JobError(
            [
                f"train.batch_size: {train.batch_size} windows per step do not divide over {world}"
                f" ranks; use {one_of(fitting)} ranks, or a batch_size of {sizes}"
            ]
        )
    share = train.batch_size // world
    micro = train.micro_batch_size if train.micro_batch_size is not None else share
    if share % micro:
        raise JobError(
            [
                f"train.micro_batch_size: each of {world} ranks has {share} windows per step, not a"
                f" multiple of {micro}; micro_batch_size may be {one_of(divisors(share))}"
            ]
        )
    return Layout(world, micro, share // micro)
