"""The flat step in one process: gradients end to end, norm and overflow, and the update.

Several ranks, ZeRO stages, micro-batches and DeepSpeed's own optimiser: in whole jobs, in
tests/train/test_trainer.py.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from runner.distributed.flat_zero import FlatGroup, FlatStep, choose_optimiser
from runner.errors import JobError
from runner.utils.ranks import free_port


@pytest.fixture(scope="module")
def process_group():
    if dist.is_initialized():
        yield dist.group.WORLD
        return
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    before = {name: os.environ.get(name) for name in address}
    os.environ |= address
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


SHAPES = ((4, 3), (5,), (2, 2, 2))
PADDING = 3  # behind the last parameter, as for a number of ranks that does not divide


def weights_of(dtype, seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def flat_group(parameters):
    """What DeepSpeed makes of a parameter group: one buffer, the parameters views of it."""
    sizes = [p.numel() for p in parameters]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    flat = torch.cat([flat, flat.new_zeros(PADDING)])
    offsets = [sum(sizes[:n]) for n in range(len(sizes))]
    for parameter, offset in zip(parameters, offsets, strict=True):
        parameter.data = flat.narrow(0, offset, parameter.numel()).view(parameter.shape)
    master = nn.Parameter(flat.detach().clone().float())
    return FlatGroup(parameters, offsets, flat, flat, master)


def optimiser_of(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_clipped_adamw(dtype, process_group):
    mine, theirs = weights_of(dtype), weights_of(torch.float32)
    for parameter, other in zip(theirs, mine, strict=True):
        parameter.data.copy_(other)  # the same numbers, also where they were rounded
    group = flat_group(mine)
    assert group.in_place is (dtype == torch.float32)
    step, adam = FlatStep([group], dtype, process_group), optimiser_of([group.master])
    reference = optimiser_of(theirs)
    for number in range(4):
        torch.manual_seed(number)
        for parameter, other in zip(mine, theirs, strict=True):
            gradient = torch.randn(parameter.shape).to(dtype)
            parameter.grad, other.grad = gradient, gradient.float()
        step.collect()
        assert all(parameter.grad is None for parameter in mine)
        shares, norm, bad, divisor = step.measure(1.0)
        expected = nn.utils.clip_grad_norm_(theirs, 0.5)
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        assert not bad
        assert divisor == 1.0
        step.apply(adam, shares, ((norm + 1e-6) / 0.5).clamp(min=1.0), bad)
        reference.step()
        for parameter, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(
                parameter.float(), other.to(dtype).float(), rtol=1e-5, atol=1e-6
            )
    assert not group.weights[-PADDING:].any()


def test_passes_add_up_and_what_has_no_gradient_counts_as_zero(process_group):
    parameters = weights_of(torch.bfloat16)
    step = FlatStep([flat_group(parameters)], torch.float32, process_group)
    step.collect()  # nothing to take: not a pass
    gradients = [[torch.randn(shape).bfloat16() for shape in SHAPES] for _ in range(3)]
    for turn in gradients:
        for place, (parameter, gradient) in enumerate(zip(parameters, turn, strict=True)):
            parameter.grad = gradient if place else None
        step.collect()
        step.collect()  # called twice a pass by DeepSpeed's engine
    (share,), *_ = step.measure(1.0)
    assert share.dtype == torch.float32
    wanted = [sum(turn[place].float() for turn in gradients) for place in range(3)]
    assert not share[: parameters[0].numel()].any()
    torch.testing.assert_close(share[12:17], wanted[1])
    torch.testing.assert_close(share[17:25].view(2, 2, 2), wanted[2])
    # The next step begins anew.
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    step.collect()
    (share,), norm, *_ = step.measure(4.0)
    assert torch.equal(share, torch.tensor([1.0] * 25 + [0.0] * PADDING))
    assert float(norm) == pytest.approx(5 / 4)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_overflowed_changes_nothing(value, process_group):
    parameters = weights_of(torch.float32)
    group = flat_group(parameters)
    step, adam = FlatStep([group], torch.float32, process_group), optimiser_of([group.master])

    def take(number):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        parameters[1].grad[2] = number
        step.collect()
        shares, norm, bad, divisor = step.measure(1.0)
        step.apply(adam, shares, torch.full_like(norm, divisor), bad)
        return norm, bad

    take(0.2)
    before = group.weights.clone()
    moments = {k: v.clone() for k, v in adam.state[group.master].items()}
    norm, bad = take(value)
    assert bad
    assert not norm.isfinite()
    assert torch.equal(group.weights, before)
    for name, moment in adam.state[group.master].items():
        assert torch.equal(moment, moments[name]), name
    _, bad = take(0.2)
    assert not bad
    assert not torch.equal(group.weights, before)


BAD_RANK = """
import torch
import torch.distributed as dist
from torch import nn
from runner.distributed.flat_zero import FlatGroup, FlatStep

dist.init_process_group("gloo")
flat = torch.ones(8)
mine = flat[4 * rank : 4 * rank + 4]
parameter, master = nn.Parameter(flat.view(8)), nn.Parameter(mine.clone())
step = FlatStep([FlatGroup([parameter], [0], flat, mine, master)], flat.dtype, dist.group.WORLD)
adam = torch.optim.AdamW([master], lr=0.1, fused=True)

def take(numbers):
    parameter.grad = torch.tensor(numbers)
    step.collect()
    shares, norm, bad, divisor = step.measure(1.0)
    step.apply(adam, shares, torch.full_like(norm, divisor), bad)

take([1.0] * 8)
before = flat.clone()
assert not torch.equal(before, torch.ones(8))
take({bad} if rank == 1 else [1.0] * 8)
assert torch.equal(flat, before), (rank, flat)
assert adam.state[master]["step"] == 1
take([1.0] * 8)
assert not torch.equal(flat, before)
assert flat.isfinite().all()
dist.barrier()
os._exit(0)
"""


@pytest.mark.parametrize(
    "bad", ["[float('nan')] * 8", "[float('inf')] * 8", "[float('nan')] + [1.0] * 7"]
)
def test_a_number_lost_on_one_rank_changes_no_weight_on_any(zygote, bad):
    """A NaN that spoils both ranks' shares counts twice, one that spoils one of them once."""
    code = "import os\n" + BAD_RANK.replace("{bad}", bad)
    codes, text = zygote.run(code=code, ranks=2)
    assert codes == [0, 0], text


@pytest.mark.parametrize(
    ("wanted", "stage", "extra", "choice", "words"),
    [
        ("auto", 1, {}, "flat", "one flat gradient"),
        ("auto", 2, {"fp16": {"loss_scale": 2}}, "flat", "one flat gradient"),
        ("auto", 2, {"bf16": {"check_grad_overflow": True}}, "deepspeed", "bf16"),
        ("auto", 0, {}, "deepspeed", "stage 0"),
        ("auto", 3, {}, "deepspeed", "stage 3"),
        (
            "auto",
            2,
            {"zero_optimization": {"overlap_comm": True}},
            "deepspeed",
            "zero_optimization",
        ),
        ("deepspeed", 2, {}, "deepspeed", "as the job says"),
    ],
)
def test_the_optimiser_is_chosen_with_a_reason(wanted, stage, extra, choice, words):
    found, reason = choose_optimiser(wanted, stage, extra)
    assert found == choice
    assert words in reason
    if wanted == "auto" and choice == "deepspeed":
        with pytest.raises(JobError, match="not possible"):
            choose_optimiser("flat", stage, extra)
