"""DeepSpeed: its configuration as a pure function of the job, and starting it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from runner.distributed.collectives import is_connection_lost
from runner.distributed.flat_zero import flat_engine
from runner.errors import JobError
from runner.job.schema import BatchLayout, Train, Zero
from runner.utils.text import one_of, shorten


def deepspeed_config(
    zero: Zero, train: Train, layout: BatchLayout, precision: str, trained: int
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


def start_engine(
    model: nn.Module,
    device: torch.device,
    groups: list[dict[str, Any]],
    train: Train,
    config: dict[str, Any],
    total_steps: int,
    optimiser_kind: str = "deepspeed",
    extra: Mapping[str, Any] | None = None,
) -> Any:
    """Wrap the model in a DeepSpeed engine with torch's AdamW and the declared schedule.

    `optimiser_kind` is "flat" or "deepspeed", as `flat_zero.choose_optimiser` decides; `extra` the
    job's [zero.deepspeed], which `config` has in it.

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
    with _refusing(extra or {}):
        if optimiser_kind == "flat":
            return flat_engine(model, optimiser, schedule, config)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimiser,
            lr_scheduler=schedule,  # type: ignore[arg-type]  (any torch scheduler will do)
            config=config,
        )
        return engine


@contextmanager
def _refusing(extra: Mapping[str, Any]) -> Iterator[None]:
    """Say which key of [zero.deepspeed] DeepSpeed refuses, and why.

    It has no kind of error for it. Without such keys nothing is refused; what fails then is a fault
    of ours. Memory, files and other ranks are no key's fault.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:
        if not extra or is_connection_lost(error) or "can't allocate memory" in str(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        paths = [".".join(path) for path in _leaves(extra)]
        # Those that it names; else it may be any.
        named = [path for path in paths if path.rpartition(".")[2] in reason] or paths
        raise JobError(
            [f"zero.deepspeed: DeepSpeed refuses {one_of(tuple(named))}: {shorten(reason, 300)}"]
        ) from error


def _leaves(table: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key)
