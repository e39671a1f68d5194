"""`python -m span_kernels.bench`: fused, eager and torch.compile side by side on this GPU.

Every figure is the time the GPU needs for one forward and backward pass, from a CUDA graph, so that
neither Python nor launching is in it ("cold", "warm"), and once more as launched from Python
("launched"). Contestants take turns within a round; the median of the rounds is printed, and the
bandwidth is compared with a large copy's in the same run.

    --sweep    also time the neighbours of `head_plan`'s choice
    --rounds   rounds of each measurement (default 50)

Exit codes: 0 measured; 69 no CUDA device or no Triton; 70 the contestants disagree.
"""

import argparse
import contextlib
import datetime
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

import torch

from span_kernels.bench_cases import (
    BERT_BASE_PARAMETERS,
    CASES,
    Case,
    Contestant,
    Inputs,
    head_bytes,
    head_contestants,
    logits_bytes,
    logits_contestants,
    make_inputs,
    norm_contestants,
)
from span_kernels.launch import HeadPlan, head_plan

UNAVAILABLE, DISAGREE = 69, 70
GRAPHED_REPEATS = 10
FLUSH_BYTES = 512 << 20  # ten times the L2 cache of an H200


class Timing(NamedTuple):
    cold_us: float  # foreign data read into L2 before every pass
    warm_us: float  # passes back to back
    launched_us: float  # as a Python program launches it


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m span_kernels.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or find_spec("triton") is None:
        print("span_kernels.bench: needs a CUDA device and Triton; nothing was measured.")
        return UNAVAILABLE
    import triton

    copy = copy_bandwidth(options.rounds)
    print(
        f"{torch.cuda.get_device_name()}, {datetime.date.today()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, copy {copy / 1e9:.0f} GB/s, median of {options.rounds}\n"
    )
    print(header())
    for case in CASES:
        torch.compiler.reset()  # every case is compiled for its own sizes
        inputs = make_inputs(case, "cuda")
        for part, contestants, moved in (
            ("head", head_contestants(case, inputs), head_bytes(inputs)),
            ("logits", logits_contestants(case, inputs), logits_bytes(inputs)),
        ):
            name = f"{case.name}, {part}"
            problem = disagreement(contestants)
            if problem:
                print(f"span_kernels.bench: {name}: {problem}", file=sys.stderr)
                return DISAGREE
            print_rows(name, measure(contestants, options.rounds), moved, copy)
    flat = torch.randn(BERT_BASE_PARAMETERS, device="cuda").bfloat16()
    timings = measure(norm_contestants(flat), options.rounds)
    # A norm reads and writes nothing, so its bytes are half of a copy's of the same size.
    print_rows("norm, 109M bf16", timings, flat.numel() * flat.element_size(), copy)
    if options.sweep:
        for case in CASES:
            print("\n" + sweep(case, make_inputs(case, "cuda"), options.rounds), flush=True)
    return 0


def header() -> str:
    titles = "case", "variant", "cold us", "warm us", "launched us", "GB/s cold", "% of copy"
    return table_row(*titles, "x eager", "x compile") + "\n" + "|---" * 9 + "|"


def table_row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def format_rows(name: str, timings: dict[str, Timing], moved: int, copy: float) -> list[str]:
    """Markdown rows of one case. The last columns say how many times faster the fused variant is,
    cold; `moved` is the least number of bytes, so GB/s counts wasted traffic as slowness."""
    lines = []
    for variant, timing in timings.items():
        speed = moved / timing.cold_us * 1e6
        ratios = ["", ""]
        if variant == "fused":
            rivals = (timings["eager"], timings["compile"])
            ratios = [f"{rival.cold_us / timing.cold_us:.2f}" for rival in rivals]
        times = (f"{t:.1f}" for t in timing)
        figures = f"{speed / 1e9:.0f}", f"{100 * speed / copy:.0f}"
        lines.append(table_row(name, variant, *times, *figures, *ratios))
    return lines


def print_rows(name: str, timings: dict[str, Timing], moved: int, copy: float) -> None:
    print("\n".join(format_rows(name, timings, moved, copy)), flush=True)


def disagreement(contestants: dict[str, Contestant]) -> str | None:
    """A sentence if the fused variant is not the eager one up to the rounding of bfloat16."""
    loss, grads = contestants["fused"]()  # type: ignore[misc]
    eager_loss, eager_grads = contestants["eager"]()  # type: ignore[misc]
    if not torch.allclose(loss.float(), eager_loss.float(), rtol=0.02):
        return f"fused loss {loss.item():.5f}, eager {eager_loss.item():.5f}"
    for fused, eager in list(zip(grads, eager_grads, strict=True))[:2]:  # the bias is exactly 0
        error = (fused.double() - eager.double()).norm() / eager.double().norm()
        if not error <= 0.02:  # so that NaN is a difference
            return f"a gradient of shape {list(fused.shape)} differs by {error.item():.1%}"
    return None


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [event_us(lambda: target.copy_(source)) for _ in range(rounds)]
    return 2 * source.numel() / statistics.median(times) * 1e6


def event_us(work: Callable[[], object]) -> float:
    """Microseconds between two events around `work` on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def graph_of(work: Contestant, repeats: int) -> torch.cuda.CUDAGraph:
    """`work`, `repeats` times, as one CUDA graph; compiled and warmed up before on a side stream,
    as PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    return graph


def measure(contestants: dict[str, Contestant], rounds: int) -> dict[str, Timing]:
    """Median times of every contestant, taking turns so that a drift of the clock hits them all."""
    flush = torch.ones(FLUSH_BYTES // 4, device="cuda")
    once = {name: graph_of(work, 1) for name, work in contestants.items()}
    often = {name: graph_of(work, GRAPHED_REPEATS) for name, work in contestants.items()}
    times: dict[str, list[Timing]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            # Read, not written: dirty lines would have to be stored at the contestant's expense.
            # Meanwhile the host queues the graph, so the events enclose the GPU's work alone.
            flush.sum()
            cold = event_us(once[name].replay)
            often[name].replay()
            warm = event_us(often[name].replay) / GRAPHED_REPEATS
            torch.cuda.synchronize()
            launched = event_us(work)
            times[name].append(Timing(cold, warm, launched))
    return {
        name: Timing(*(statistics.median(column) for column in zip(*rows, strict=True)))
        for name, rows in times.items()
    }


def neighbours(plan: HeadPlan) -> list[HeadPlan]:
    """The plan and what is close to it, each within the limits of the kernel."""
    variants = [
        plan._replace(tile=tile, group=group, stages=stages)
        for tile, group, stages in product(
            (plan.tile // 2, plan.tile, plan.tile * 2),
            (plan.group // 2, plan.group, plan.group * 2),
            (1, 2, 3, 4),
        )
        if tile >= 8 and group >= 1
    ]
    return variants + [v._replace(lanes=2 * v.lanes, warps=2 * v.warps) for v in variants]


def sweep(case: Case, inputs: Inputs, rounds: int) -> str:
    """The pass over the hidden states with other plans: the ten fastest and the chosen one."""
    from triton.runtime.errors import OutOfResources

    from span_kernels.pool_kernel import THREAD_COLUMNS, pool

    hidden_TD, weight_2D, bias_2 = (x.detach() for x in inputs[:3])
    chosen = head_plan(hidden_TD.shape[0], case.width, case.dtype, THREAD_COLUMNS)

    def contestant(plan: HeadPlan) -> Contestant:
        return lambda: pool(hidden_TD, weight_2D, bias_2, inputs.segments_B2, plan)

    plans = []
    for plan in neighbours(chosen):
        with contextlib.suppress(OutOfResources):  # more shared memory than this GPU has
            contestant(plan)()
            plans.append(plan)
    timings = measure(
        {str(i): contestant(plan) for i, plan in enumerate(plans)}, max(rounds // 5, 5)
    )
    ranked = sorted(timings.items(), key=lambda item: item[1].cold_us)
    lines = [f"sweep, {case.name}: cold us, warm us, plan"]
    for rank, (index, timing) in enumerate(ranked):
        plan = plans[int(index)]
        if rank < 10 or plan == chosen:
            mark = "  <- head_plan" if plan == chosen else ""
            lines.append(f"{timing.cold_us:8.1f} {timing.warm_us:8.1f}  {tuple(plan)}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
