"""DeepSpeed: its configuration as a pure function of the job, and starting it."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from runner.distributed.collectives import PATIENCE, open_control
from runner.distributed.flat_zero import flat_engine
from runner.errors import Interrupted, JobError
from runner.job.layout import Layout
from runner.job.schema import Train, Zero
from runner.utils.ranks import Rank, meeting_point
from runner.utils.signals import asked


def deepspeed_config(
    zero: Zero, train: Train, layout: Layout, precision: str, trained: int
) -> dict[str, Any]:
    """Build DeepSpeed's configuration; `[zero.deepspeed]` is laid over it key by key.

    Args:
        zero, train: sections of the job.
        layout: how a step's windows are spread.
        precision: "bf16", "fp16" or "fp32".
        trained: number of trained parameters; all gradients then travel in one bucket, where
            DeepSpeed's default buffers hold half a billion numbers whatever the model.
    """
    bucket = min(trained, 500_000_000)
    config: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.micro_batches,
        "gradient_clipping": train.max_grad_norm,
        # The optimiser is torch's own AdamW: DeepSpeed's would start a compiler.
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": False,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        # The throughput timer drains the device twice a step.
        "timers": {"throughput": {"enabled": False}},
    }
    if precision == "bf16":
        # Its overflow check is some 13 small operations for each tensor in each step; `epoch` looks
        # at the loss and at the norm of all gradients instead.
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        # Without ZeRO, DeepSpeed can add up micro-batches only in the model's own precision.
        several = layout.micro_batches > 1 and zero.stage > 0
        config["data_types"] = {"grad_accum_dtype": "fp32"} if several else {}
    elif precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return _overlaid(config, zero.deepspeed)


def _overlaid(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlaid(merged[key], value) if both else value
    return merged


def learning_rate_factor(train: Train, total_steps: int) -> Callable[[int], float]:
    """Return the share of the peak learning rate at each optimiser step, counted from 0."""
    warmup = round(train.warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        left = max(0.0, (total_steps - step) / max(1, total_steps - warmup))
        if train.schedule == "constant":
            return 1.0
        return left if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))

    return factor


def start_distributed(
    rank: Rank, threads: int | None = None, meeting_minutes: float = 10.0
) -> torch.device:
    """Choose the device, the CPU threads, and join the process group (also one process).

    Args:
        rank: this one.
        threads: CPU threads; None shares the cores of the machine among its ranks.
        meeting_minutes: how long to wait for the other ranks to come.
    """
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        # A launcher may show each rank its own GPU only.
        torch.cuda.set_device(rank.local % torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
        _keep_freed_memory()
        if threads is not None or "OMP_NUM_THREADS" not in os.environ:
            # Ranks of one machine share its cores; a thread for each core in each would fight.
            torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // rank.local_world))
    address, port = meeting_point(rank)
    for name, value in (
        ("RANK", rank.index),
        ("LOCAL_RANK", rank.local),
        ("WORLD_SIZE", rank.world),
        ("LOCAL_SIZE", rank.local_world),
        ("MASTER_ADDR", address),
        ("MASTER_PORT", port),
    ):
        os.environ.setdefault(name, str(value))
    import deepspeed  # reads the variables above, and takes seconds

    if not on_cuda:
        # A shared-memory reduction that is compiled at first use, for one to two minutes; a start
        # killed meanwhile leaves a lock on which later starts hang. gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    # torch's deprecation of calls that DeepSpeed and we make at each step is no news to our user.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*", category=FutureWarning)
    if not dist.is_initialized():
        # Ranks meet soon or never; once they have met, they wait for each other's work.
        meeting = timedelta(minutes=meeting_minutes)
        store, index, world = _meet(meeting)
        backend = "nccl" if on_cuda else "gloo"
        dist.init_process_group(
            backend, store=store, rank=index, world_size=world, timeout=PATIENCE
        )
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    open_control()
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def _meet(patience: timedelta) -> tuple[Any, int, int]:
    """Wait for the other ranks, in a thread of its own: a signal ends the waiting, for one that is
    gone perhaps, which the store would not let this process hear."""
    found: list[tuple[Any, int, int] | Exception] = []

    def wait() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=patience)))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if reason := asked():
            raise Interrupted(f"stopped by {reason} before training began")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


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


def start_engine(
    model: nn.Module,
    device: torch.device,
    groups: list[dict[str, Any]],
    train: Train,
    config: dict[str, Any],
    total_steps: int,
    optimiser_kind: str = "deepspeed",
) -> Any:
    """Wrap the model in a DeepSpeed engine with torch's AdamW and the declared schedule.

    `optimiser_kind` is "flat" or "deepspeed", as `flat_zero.choose_zero` decides.

    Raises:
        JobError: if DeepSpeed refuses a key of [zero.deepspeed].
    """
    import deepspeed

    model = model.to(device)
    optimiser = torch.optim.AdamW(
        groups,
        lr=train.learning_rate,
        betas=train.adam_betas,
        eps=train.adam_epsilon,
        fused=True,
    )
    factor = learning_rate_factor(train, total_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    try:
        if optimiser_kind == "flat":
            return flat_engine(model, optimiser, schedule, config)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimiser,
            lr_scheduler=schedule,  # type: ignore[arg-type]  (any torch scheduler will do)
            config=config,
        )
    except (ValueError, AssertionError) as error:
        if not config_is_refused(error):
            raise
        raise JobError(
            [f"zero.deepspeed: DeepSpeed refuses its configuration: {' '.join(str(error).split())}"]
        ) from None
    return engine


def config_is_refused(error: Exception) -> bool:
    """Whether an error of `deepspeed.initialize` speaks of the configuration (pydantic's, or
    DeepSpeed's own)."""
    return "validation error" in str(error) or "config" in str(error).lower()


def stop_distributed() -> None:
    """Leave the process group, all ranks together; one that leaves alone may abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
