"""What [zero.deepspeed] may say: an allow-list, so that no key is without effect, writes a file of
its own or sends anything; and which key of the job does what is not in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from runner.job.schema import Job, Section
from runner.job.toml_lines import Path as KeyPath

Switch = bool | None

Size = Annotated[float, Field(ge=0)] | None  # a whole number, which DeepSpeed takes as 5e8 too


class Offload(Section):
    """Where ZeRO keeps states that do not fit the GPU. (nvme would write files.)"""

    device: Literal["cpu", "none"] = Field(description="where they are kept")
    pin_memory: Switch = None
    ratio: Annotated[float, Field(ge=0, le=1)] | None = None


class ZeroOptimization(Section):
    """Sizes of buckets, and how ranks exchange them; sizes are counts of numbers."""

    allgather_bucket_size: Size = None
    allgather_partitions: Switch = None
    contiguous_gradients: Switch = None
    ignore_unused_parameters: Switch = None
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    overlap_comm: Switch = None
    reduce_bucket_size: Size = None
    reduce_scatter: Switch = None
    round_robin_gradients: Switch = None
    stage3_max_live_parameters: Size = None
    stage3_max_reuse_distance: Size = None
    stage3_model_persistence_threshold: Size = None
    stage3_module_granularity_threshold: Size = None
    stage3_param_persistence_threshold: Size = None
    stage3_prefetch_bucket_size: Size = None
    stage3_use_all_reduce_for_fetch_params: Switch = None
    sub_group_size: Size = None
    use_multi_rank_bucket_allreduce: Switch = None
    zero_hpz_partition_size: Size = None
    zero_quantized_gradients: Switch = None
    zero_quantized_weights: Switch = None


class Bf16(Section):
    """What DeepSpeed does beside computing in bfloat16."""

    check_grad_overflow: Switch = None


class Fp16(Section):
    """How the loss is scaled."""

    consecutive_hysteresis: Switch = None
    hysteresis: Annotated[int, Field(ge=1)] | None = None
    initial_scale_power: Annotated[int, Field(ge=0, le=32)] | None = None
    loss_scale: Size = None
    loss_scale_window: Annotated[int, Field(ge=1)] | None = None
    min_loss_scale: Annotated[float, Field(gt=0)] | None = None


class DataTypes(Section):
    """In what gradients of several passes are added up."""

    grad_accum_dtype: Literal["fp32", "fp16", "bf16"] | None = None


class FlopsProfiler(Section):
    """The floating-point operations of one step, printed."""

    detailed: Switch = None
    enabled: bool = Field(description="whether a step is profiled at all")
    module_depth: Annotated[int, Field(ge=-1)] | None = None
    profile_step: Annotated[int, Field(ge=1)] | None = None
    recompute_fwd_factor: Annotated[float, Field(ge=0)] | None = None
    top_modules: Annotated[int, Field(ge=1)] | None = None


class DeepSpeed(Section):
    """Keys that are handed on to DeepSpeed, which says what each means."""

    bf16: Bf16 | None = None
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    data_types: DataTypes | None = None
    flops_profiler: FlopsProfiler | None = None
    fp16: Fp16 | None = None
    gradient_predivide_factor: Annotated[float, Field(gt=0)] | None = None
    memory_breakdown: Switch = None
    prescale_gradients: Switch = None
    wall_clock_breakdown: Switch = None
    zero_force_ds_cpu_optimizer: Switch = None
    zero_optimization: ZeroOptimization | None = None


_SAVING = "a run saves by itself; set train.checkpoint_minutes"

# What users bring along from other configurations of DeepSpeed, and the key that does it here.
INSTEAD: dict[KeyPath, str] = {
    ("activation_checkpointing",): "nothing here calls it; lower train.micro_batch_size",
    ("amp",): "set model.precision",
    ("autotuning",): "nothing here reads it; a [sweep] tries values",
    ("bf16", "enabled"): "set model.precision",
    ("bfloat16",): "set model.precision",
    ("checkpoint",): _SAVING,
    ("comet",): "set track.tools",
    ("compile",): "set model.compile",
    ("csv_monitor",): "a run writes train.csv and eval.csv by itself",
    ("flops_profiler", "output_file"): "it would overwrite that file; without it, it is printed",
    ("fp16", "enabled"): "set model.precision",
    ("gradient_accumulation_steps",): "set train.micro_batch_size",
    ("gradient_clipping",): "set train.max_grad_norm",
    ("nebula",): _SAVING,
    ("optimizer",): (
        "it would be passed over, for AdamW; set train.learning_rate, train.weight_decay,"
        " train.adam_betas and train.adam_epsilon"
    ),
    ("scheduler",): "it would be passed over; set train.schedule and train.warmup",
    ("steps_per_print",): "set train.log_every",
    ("tensorboard",): "set track.tools",
    ("torch_autocast",): "set model.precision",
    ("train_batch_size",): "set train.batch_size",
    ("train_micro_batch_size_per_gpu",): "set train.micro_batch_size",
    ("wandb",): "set track.tools",
    ("zero_optimization", "stage"): "set zero.stage",
}


def foreign_keys(table: Mapping[str, Any], at: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """The keys of [zero.deepspeed] that spantune sets itself, or does in another way; and values
    that only another trainer fills in."""
    found: list[tuple[KeyPath, str]] = []
    for key, value in table.items():
        path = (*at, key)
        if path in INSTEAD:
            found.append((path, f"is not handed on to DeepSpeed: {INSTEAD[path]}"))
        elif isinstance(value, Mapping):
            found += foreign_keys(value, path)
        elif value == "auto":
            sentence = '"auto" is filled in by Hugging Face\'s Trainer alone; leave the key out'
            found.append((path, sentence))
    return found


def idle_keys(job: Job) -> list[tuple[KeyPath, str]]:
    """The keys of a [zero.deepspeed] that `DeepSpeed` allows, but that have no effect beside the
    job's other keys."""
    wanted, stage = job.model.precision, job.zero.stage
    table = job.zero.deepspeed
    found: list[tuple[KeyPath, str]] = [
        ((name,), f'has an effect only with model.precision = "{name}", which is "{wanted}"')
        for name in ("bf16", "fp16")
        if name in table and wanted != name
    ]
    sizes = table.get("zero_optimization", {})
    for key in sizes:
        needed = 3 if key.startswith("stage3_") or key == "offload_param" else 1
        if stage < needed:
            sentence = f"has an effect only with zero.stage of at least {needed}, which is {stage}"
            found.append((("zero_optimization", key), sentence))
    offload = ("zero_optimization", "offload_optimizer")
    offloads = sizes.get("offload_optimizer", {"device": "none"})["device"] != "none"
    if offloads and table.get("zero_force_ds_cpu_optimizer", True):
        sentence = (
            "DeepSpeed takes torch's AdamW for this only with"
            " zero.deepspeed.zero_force_ds_cpu_optimizer = false"
        )
        found.append((offload, sentence))
    elif "zero_force_ds_cpu_optimizer" in table and not offloads:
        sentence = f"has an effect only with zero.deepspeed.{'.'.join(offload)}"
        found.append((("zero_force_ds_cpu_optimizer",), sentence))
    return found
