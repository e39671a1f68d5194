"""ZeRO stages 1 and 2 with one flat gradient: its norm and overflow in one pass, no host sync.

DeepSpeed's own optimiser looks after each tensor by itself: two copies in backward hooks, about 15
operations for its overflow check and norm, and reads by the host in every step. Here a backward
pass leaves its gradients alone; one fused copy lays them end to end, one collective sums and shares
them out, one pass gives norm and finiteness, and the clip and the skip of an overflowed step go
into the fused AdamW as two numbers on the device. What ranks keep and what checkpoints hold is
DeepSpeed's.

A rank holds its whole gradient from backward pass to step (DeepSpeed's ZeRO-2 frees the others'
share earlier): two bytes a parameter in bf16, which models of this size have room for.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from span_kernels import grad_norm_and_finite
from torch import Tensor, nn

from runner.distributed.gradient_exchange import open_exchange
from runner.errors import JobError

# What DeepSpeed's optimiser is built with here. Another version may have renamed one of these.
_ARGUMENTS = frozenset(
    {
        *("init_optimizer", "param_names", "timers", "optimizer_params", "static_loss_scale"),
        *("dynamic_loss_scale", "dynamic_loss_args", "contiguous_gradients", "reduce_bucket_size"),
        *("allgather_bucket_size", "dp_process_group", "clip_grad", "gradient_accumulation_dtype"),
        *("communication_data_type", "gradient_accumulation_steps", "partition_grads"),
        *("elastic_checkpoint", "check_grad_overflow"),
    }
)
# Keys of [zero.deepspeed] that change nothing of what is done here.
_HARMLESS = frozenset({"fp16", "memory_breakdown", "wall_clock_breakdown"})


def choose_optimiser(wanted: str, stage: int, extra: dict[str, Any]) -> tuple[str, str]:
    """Decide between "flat" and "deepspeed", and say why.

    Args:
        wanted: the job's zero.optimizer: "auto", "flat" or "deepspeed".
        stage: ZeRO stage.
        extra: the job's [zero.deepspeed].

    Raises:
        JobError: if "flat" is asked for where it cannot be.
    """
    if wanted == "deepspeed":
        return "deepspeed", "as the job says"
    obstacle = _obstacle(stage, extra)
    if obstacle is None:
        return "flat", "norm and overflow in one pass over one flat gradient"
    if wanted == "flat":
        raise JobError([f'zero.optimizer: "flat" is not possible: {obstacle}'])
    return "deepspeed", obstacle


def _obstacle(stage: int, extra: dict[str, Any]) -> str | None:
    if stage not in (1, 2):
        return f"stage {stage} has no flat gradient"
    foreign = sorted(set(extra) - _HARMLESS)
    if foreign:
        return f"zero.deepspeed.{foreign[0]} is for DeepSpeed's own optimiser"
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    missing = _ARGUMENTS - set(inspect.signature(DeepSpeedZeroOptimizer.__init__).parameters)
    return f"this DeepSpeed's ZeRO takes no {min(missing)}" if missing else None


@dataclass
class FlatGroup:
    """One parameter group on one rank.

    Attributes:
        parameters: in the order of `offsets`.
        offsets: where each begins in `weights`.
        weights: all parameters end to end, padded for the ranks, as the model uses them.
        mine: this rank's part of `weights`, a view.
        master: the parameter that the optimiser updates, float32, as many numbers as `mine`.
    """

    parameters: Sequence[nn.Parameter]
    offsets: Sequence[int]
    weights: Tensor
    mine: Tensor
    master: Tensor

    def __post_init__(self) -> None:
        if self.weights.dtype == torch.float32:
            # The master copy is the weight itself: nothing to copy back, less to keep.
            self.master.data = self.mine.data
        self.in_place = self.master.data_ptr() == self.mine.data_ptr()


class FlatStep:
    """Gradients of all groups end to end, and the step that they lead to."""

    def __init__(self, groups: Sequence[FlatGroup], dtype: torch.dtype, process_group: Any) -> None:
        """
        Args:
            groups: one for each parameter group of the optimiser.
            dtype: gradients of several passes are added up in this.
            process_group: the ranks that share the work.
        """
        self.groups = groups
        self.process_group = process_group
        self.world = dist.get_world_size(process_group)
        # Padding between and behind parameters stays zero for good.
        self.exchange = open_exchange([group.weights for group in groups], dtype, process_group)
        self.gradients = self.exchange.gradients
        self._views = [
            [
                gradient.narrow(0, offset, parameter.numel()).view(parameter.shape)
                for offset, parameter in zip(group.offsets, group.parameters, strict=True)
            ]
            for group, gradient in zip(groups, self.gradients, strict=True)
        ]
        self._filled = False

    def collect(self) -> None:
        """Take the gradients of a backward pass, in addition to those of the step's earlier ones.

        Without new gradients nothing happens; a parameter without one has gradient zero.
        """
        taken = False
        for group, views, gradient in zip(self.groups, self._views, self.gradients, strict=True):
            found = [
                (view, parameter.grad)
                for view, parameter in zip(views, group.parameters, strict=True)
                if parameter.grad is not None
            ]
            if not self._filled and len(found) < len(views):
                gradient.zero_()
            if found:
                targets, gradients = [view for view, _ in found], [grad for _, grad in found]
                # One launch for all of them; torch has no public name for it.
                add = torch.ops.aten._foreach_add_.List
                copy = torch.ops.aten._foreach_copy_.default
                add(targets, gradients) if self._filled else copy(targets, gradients)
                taken = True
            for parameter in group.parameters:
                parameter.grad = None
        self._filled = self._filled or taken

    def measure(self, loss_scale: float) -> tuple[list[Tensor], Tensor, Tensor, float]:
        """Sum over ranks, keep this rank's share.

        Returns:
            The shares; the norm of the step's mean gradient, float32; 1.0 where any number of it is
            not finite, else 0.0; and what the shares must be divided by to be that gradient. The
            two scalars are on the device and alike on every rank.
        """
        shares = self.exchange.reduce_scatter()
        self._filled = False
        found = [grad_norm_and_finite(share) for share in shares]
        squared = torch.stack([square.float() for square, _ in found]).sum()
        bad = (~torch.stack([finite for _, finite in found])).any().float()
        totals_2 = torch.stack([squared, bad])
        if self.world > 1:
            dist.all_reduce(totals_2, group=self.process_group)
        # Where ranks only add up, the sum is divided as the gradient is clipped.
        divisor = loss_scale * (1 if self.exchange.averages else self.world)
        # The sum counts ranks, and torch's fused kernels skip a step at 1.0 exactly.
        return shares, totals_2[0].sqrt() / divisor, totals_2[1].clamp(max=1.0), divisor

    def apply(self, optimiser: Any, shares: Sequence[Tensor], divisor: Tensor, bad: Tensor) -> None:
        """Let torch's fused AdamW update the weights, and hand every rank's part to all.

        As for torch.amp.GradScaler, it divides gradients by `divisor`, and leaves everything as it
        is where `bad` is not zero.
        """
        for group, share in zip(self.groups, shares, strict=True):
            group.master.grad = share.to(group.master.dtype)
        optimiser.grad_scale, optimiser.found_inf = divisor, bad
        optimiser.step()
        for group in self.groups:
            group.master.grad = None
            if not group.in_place:
                group.mine.copy_(group.master)
        self.exchange.publish_weights()


def flat_engine(
    model: nn.Module, optimiser: torch.optim.Optimizer, schedule: Any, config: dict[str, Any]
) -> Any:
    """What `deepspeed.initialize` does for a plain model, with an optimiser of our own for stages 1
    and 2."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    class FlatZero(DeepSpeedZeroOptimizer):
        """DeepSpeed's partitions, weights and checkpoints, with a FlatStep."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            rank = dist.get_rank(self.dp_process_group)
            groups = [
                FlatGroup(parameters, offsets, weights, partitions[rank], master)
                for parameters, offsets, weights, partitions, master in zip(
                    self.round_robin_bit16_groups,
                    self.round_robin_bit16_offsets,
                    self.bit16_groups_flat,
                    self.parallel_partitioned_bit16_groups,
                    self.single_partition_of_fp32_groups,
                    strict=True,
                )
            ]
            self._link_all_hp_params()  # again: in float32 the master copies are others now
            several = self.gradient_accumulation_steps > 1
            dtype = self.gradient_accumulation_dtype if several else self.dtype
            self._flat = FlatStep(groups, dtype, self.dp_process_group)
            self.exchanged_by = self._flat.exchange.kind

        def _get_groups_without_padding(self, groups_with_padding: Any) -> list[Tensor]:
            # For a checkpoint: a master copy that is part of the weights would drag all of them
            # into its file.
            lean = super()._get_groups_without_padding(groups_with_padding)
            return [group.detach().clone() if self._flat.world > 1 else group for group in lean]

        def create_gradient_handling_hooks(self) -> None:
            self._remaining_grad_acc_hooks = 0  # no hooks: gradients are collected afterwards

        def overlapping_partition_gradients_reduce_epilogue(self) -> None:
            self._flat.collect()  # after each backward pass of stage 2

        def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
            self._flat.collect()  # after the last backward pass of a step in stage 1

        def backward_epilogue(self, *args: Any, **kwargs: Any) -> None:
            self._flat.collect()  # after every one; the others of stage 1 are told of only here

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            shares, norm, bad, divisor = self._flat.measure(self.loss_scale)
            self._global_grad_norm = norm
            if self.check_grad_overflow:  # fp16: the loss scale is the host's to change
                self.overflow = bool(bad > 0)
                self._update_scale(self.overflow)
                if self.overflow:
                    self._global_grad_norm = float("inf")
                    return
            if self.clip_grad > 0.0:
                clip = ((norm + 1e-6) / self.clip_grad).clamp(min=1.0)
            else:
                clip = torch.ones_like(norm)
            self._flat.apply(self.optimizer, shares, clip * divisor, bad)
            self._lazy_init_hp_params_optimizer_state()

    class FlatZeroEngine(DeepSpeedEngine):
        def _configure_zero_optimizer(self, optimizer: Any) -> Any:
            _, gradient_dtype = self.get_data_types()
            return FlatZero(
                optimizer,
                self.param_names,
                timers=NoopTimer(),
                optimizer_params=self.optimizer_params(),
                static_loss_scale=self.loss_scale(),
                dynamic_loss_scale=self.dynamic_loss_scale(),
                dynamic_loss_args=self.dynamic_loss_scale_args(),
                clip_grad=self.gradient_clipping(),
                contiguous_gradients=True,
                reduce_bucket_size=self.zero_reduce_bucket_size(),
                allgather_bucket_size=self.zero_allgather_bucket_size(),
                dp_process_group=self.seq_data_parallel_group,
                gradient_accumulation_dtype=gradient_dtype,
                communication_data_type=self.communication_data_type,
                gradient_accumulation_steps=self.gradient_accumulation_steps(),
                partition_grads=self.zero_optimization_stage() == 2,
                elastic_checkpoint=self.zero_elastic_checkpoint(),
                check_grad_overflow=self.fp16_enabled(),
            )

    engine = FlatZeroEngine(
        args=None,
        model=model,
        optimizer=optimiser,
        lr_scheduler=schedule,
        dist_init_required=False,
        config=config,
        config_class=DeepSpeedConfig(config),
    )
    engine._configure_python_gc()
    return engine
