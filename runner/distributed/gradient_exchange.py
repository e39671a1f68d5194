"""How ranks exchange gradients and weights in a step over flat buffers: messages, or shared memory.

On a GPU, NCCL's collectives do it. On a CPU gloo sends everything through sockets, also between
ranks of one machine: a twelfth of the training time of two ranks (tests/bench/README.md). There a
gradient is laid into memory that all ranks see, and each sums the part that it needs.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NAME = "spantune-step"  # of the memory, as /proc shows it
_NONCE = 64  # bytes in front that tell it from another's; a cache line, so that tensors are aligned


def open_exchange(
    weights: Sequence[Tensor], dtype: torch.dtype, process_group: dist.ProcessGroup
) -> CollectiveExchange:
    """Choose what ranks exchange by. Every rank of the group must call this.

    Args:
        weights: flat buffers, each of a length that the number of ranks divides.
        dtype: of the gradients.
        process_group: the ranks that share the work.
    """
    if dist.get_world_size(process_group) > 1 and all(w.device.type == "cpu" for w in weights):
        count = sum(w.numel() for w in weights)
        slots = dist.get_world_size(process_group) * count * dtype.itemsize
        memory = shared_bytes(slots + count * weights[0].element_size(), process_group)
        if memory is not None:
            return SharedMemoryExchange(weights, dtype, process_group, memory)
    return CollectiveExchange(weights, dtype, process_group)


class CollectiveExchange:
    """By collectives.

    Attributes:
        gradients: this rank's gradients, as long as the weights; padding stays zero.
        averages: whether `shares` gives means over ranks instead of sums.
        kind: a word for the log.
    """

    kind = "messages"

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, process_group: Any):
        self.weights = weights
        self.process_group = process_group
        self.world = dist.get_world_size(process_group)
        self.rank = dist.get_rank(process_group)
        # gloo has no average.
        self.averages = self.world > 1 and dist.get_backend(process_group) == "nccl"
        self.gradients = self._new_gradients(dtype)

    def _new_gradients(self, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros_like(weights, dtype=dtype) for weights in self.weights]

    def reduce_scatter(self) -> list[Tensor]:
        """Sum (or average) all ranks' gradients; return this rank's part of each."""
        return [self._share(gradient) for gradient in self.gradients]

    def _share(self, gradient: Tensor) -> Tensor:
        if self.world == 1:
            return gradient
        if not self.averages:  # gloo's reduce-scatter takes twice as long as its all-reduce
            dist.all_reduce(gradient, group=self.process_group)
            return self._part(gradient)
        share = gradient.new_empty(gradient.numel() // self.world)
        operation = dist.ReduceOp.AVG
        dist.reduce_scatter_tensor(share, gradient, op=operation, group=self.process_group)
        return share

    def publish_weights(self) -> None:
        """Give each rank's part of the weights to all."""
        if self.world == 1:
            return
        for weights in self.weights:
            if self.averages:
                dist.all_gather_into_tensor(weights, self._part(weights), group=self.process_group)
                continue
            # gloo's all-gather takes four times as long as these.
            for rank, part in enumerate(weights.chunk(self.world)):
                source = dist.get_global_rank(self.process_group, rank)
                dist.broadcast(part, source, self.process_group)

    def _part(self, flat: Tensor, rank: int | None = None) -> Tensor:
        """What a rank (this one) has to do with, a view."""
        size = flat.numel() // self.world
        return flat.narrow(0, (self.rank if rank is None else rank) * size, size)


class SharedMemoryExchange(CollectiveExchange):
    """By memory of one machine, for ranks on CPUs.

    Who writes while others read is kept apart by three barriers in a step: before the sums all
    gradients are there; the reduction of the norm, which follows `shares`, waits until all sums are
    made, so that the next backward pass may write; and after the update all parts are there. The
    next ones are written behind the next step's first barrier.
    """

    kind = "shared memory"

    def __init__(
        self, weights: Sequence[Tensor], dtype: torch.dtype, process_group: Any, memory: Tensor
    ):
        """`memory` has room for every rank's gradients, and once for the weights; zeros."""
        world = dist.get_world_size(process_group)
        sizes = [w.numel() for w in weights]
        slots, published = memory.split(
            [
                world * sum(sizes) * dtype.itemsize,
                memory.numel() - world * sum(sizes) * dtype.itemsize,
            ]
        )
        self._slots = [slot.split(sizes) for slot in slots.view(dtype).chunk(world)]
        self._published = published.view(weights[0].dtype).split(sizes)
        super().__init__(weights, dtype, process_group)

    def _new_gradients(self, dtype: torch.dtype) -> list[Tensor]:
        return list(self._slots[self.rank])

    def reduce_scatter(self) -> list[Tensor]:
        dist.barrier(self.process_group)
        others = [slot for rank, slot in enumerate(self._slots) if rank != self.rank]
        found = []
        for index, gradient in enumerate(self.gradients):
            mine = self._part(gradient)  # nobody else reads this part of this rank's gradient
            total = mine.float()  # itself, where it is float32 already
            for slot in others:
                total.add_(self._part(slot[index]))
            found.append(mine.copy_(total))
        return found

    def publish_weights(self) -> None:
        for weights, published in zip(self.weights, self._published, strict=True):
            self._part(published).copy_(self._part(weights))
        dist.barrier(self.process_group)
        for weights, published in zip(self.weights, self._published, strict=True):
            for rank in range(self.world):
                if rank != self.rank:
                    self._part(weights, rank).copy_(self._part(published, rank))


def shared_bytes(size: int, process_group: dist.ProcessGroup) -> Tensor | None:
    """Map memory that all ranks see: uint8 zeros, `size` of them; None on every rank where they are
    not all on one machine, or it cannot be had.

    The memory has no name in any file system: it is gone with its last process, however that ends.
    """
    rank, mapping, descriptor = dist.get_rank(process_group), None, -1
    offer: tuple[int, int, bytes] | None = None
    if rank == 0:
        nonce = secrets.token_bytes(16)
        try:
            descriptor = os.memfd_create(_NAME)
            os.posix_fallocate(descriptor, 0, _NONCE + size)  # all of it now: later it is SIGBUS
            mapping = mmap.mmap(descriptor, _NONCE + size)
            mapping[: len(nonce)] = nonce
            offer = os.getpid(), descriptor, nonce
        except (OSError, AttributeError, ValueError):  # no room, or no Linux
            mapping = None
    box = [offer]
    dist.broadcast_object_list(box, dist.get_global_rank(process_group, 0), process_group)
    if rank > 0 and box[0] is not None:
        mapping = _mapped(*box[0], _NONCE + size)
    agreed = torch.tensor([mapping is not None], dtype=torch.int32)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=process_group)
    if descriptor >= 0:
        os.close(descriptor)  # the mappings hold the memory
    if mapping is None or not agreed.item():
        return None
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=_NONCE)


def _mapped(process: int, descriptor: int, nonce: bytes, size: int) -> mmap.mmap | None:
    """Map the memory behind another process's descriptor, if it is the one that was meant: on
    another machine or in another container that number is somebody else's, or nobody's."""
    path = f"/proc/{process}/fd/{descriptor}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            mapping = mmap.mmap(opened, size)
        finally:
            os.close(opened)
    except (OSError, ValueError):
        return None
    return mapping if mapping[: len(nonce)] == nonce else None
