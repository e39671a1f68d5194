"""Joins the ranks' process group, and leaves it."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import warnings
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from runner.distributed.collectives import RENDEZVOUS, open_control_group, wait_for_work
from runner.distributed.rendezvous import ALONE, Ticket, meet
from runner.utils.processes import collector_paused
from runner.utils.ranks import Rank, rendezvous_address


def start_distributed(
    rank: Rank,
    threads: int | None = None,
    ticket: Ticket = ALONE,
    rendezvous_minutes: float = 10.0,
) -> torch.device:
    """Choose the device, the CPU threads, and join the process group (also one process).

    Args:
        rank: this one.
        threads: CPU threads; None shares the cores of the machine among its ranks.
        ticket: tells the ranks of this run from those of others.
        rendezvous_minutes: how long to wait for the other ranks to come.

    Raises:
        MachineError: if another run's ranks meet at the same address, or ours do not come.
        Interrupted: if a signal came while they did.
    """
    device = _take_gpu(rank) if torch.cuda.is_available() else _share_cpu(rank, threads)
    on_cuda = device.type == "cuda"
    address, port = rendezvous_address(rank)
    for name, value in (
        ("RANK", rank.index),
        ("LOCAL_RANK", rank.local),
        ("WORLD_SIZE", rank.world),
        ("LOCAL_SIZE", rank.local_world),
        ("MASTER_ADDR", address),
        ("MASTER_PORT", port),
    ):
        os.environ.setdefault(name, str(value))
    deepspeed = _deepspeed()  # reads the variables above, and takes seconds
    if not on_cuda:
        # A shared-memory reduction that is compiled at first use, for one to two minutes; a start
        # killed meanwhile leaves a lock on which later starts hang. gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    # torch's deprecation of calls that DeepSpeed and we make at each step is no news to our user.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*", category=FutureWarning)
    if not dist.is_initialized():
        # Ranks meet soon or never; once they have met, they wait for each other's work.
        store, index, world = meet(ticket, 60 * rendezvous_minutes)
        backend = "nccl" if on_cuda else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=index,
            world_size=world,
            timeout=RENDEZVOUS,
            # Else a barrier guesses it from the rank. NCCL connects at once then, which one rank
            # need not.
            device_id=device if on_cuda and world > 1 else None,
        )
        wait_for_work(None)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    open_control_group()
    return device


def _take_gpu(rank: Rank) -> torch.device:
    # A launcher may show each rank its own GPU only. DeepSpeed takes LOCAL_RANK for its number.
    device = torch.device("cuda", rank.local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        # When one rank is gone, NCCL's own watchdog would abort the others before ours has told
        # which it was.
        os.environ.setdefault(name, "0")
    return device


def _share_cpu(rank: Rank, threads: int | None) -> torch.device:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    _keep_freed_memory()
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one machine share its cores; a thread for each core in each would fight.
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // rank.local_world))
    return torch.device("cpu")


def _deepspeed() -> Any:
    """Import DeepSpeed without what it imports for its autotuner (MLflow, all of it) and for Muon
    (torch's compiler), neither of which a job can ask for: most of its seconds."""
    hides_mlflow = "mlflow" not in sys.modules
    if hides_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  (as if it were not installed)
    try:
        with collector_paused(for_good=True):
            import deepspeed

            with suppress(ImportError, AttributeError):  # another version may have neither
                _import_muon_uncompiled()
    finally:
        if hides_mlflow:
            del sys.modules["mlflow"]
    return deepspeed


def _import_muon_uncompiled() -> None:
    from deepspeed.runtime import compiler

    compiled, compiler.compile = compiler.compile, lambda: lambda kernel: kernel
    try:
        # Every ZeRO optimiser imports it, to ask whether it has Muon inside.
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled


def _keep_freed_memory() -> None:
    """Let glibc reuse blocks of up to 32 MiB instead of returning them to the kernel each time.

    Activations would else be mapped, zeroed page by page and unmapped again in every step. Larger
    blocks still go back: keeping those too tripled the memory (measured). With another C library
    nothing happens.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_threshold, 32 * 2**20)
    mallopt(m_trim_threshold, 512 * 2**20)


def stop_distributed() -> None:
    """Leave the process group, all ranks together; one that leaves alone may abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
