"""Training throughput on one GPU (or, to try the script, on a CPU): random weights, real lengths.

    python tests/bench/training.py --shape base [--parts throughput zero layout frozen]

Weights and tokens are random, which changes no time; window lengths are those of --data, or drawn
from the quantiles below. Every mode takes the same batches of the same windows, a round of steps at
a time, in turn; the table shows medians over rounds. "ours" is the loop of a run itself
(`Trainer.train_epoch`: tokens resident on a GPU, batches prepared ahead, accuracy, health, a row of
the log at the end of a round); only its rows go nowhere and nothing is saved. The models of a part
share the device's memory: with a large shape call one part at a time.

"device busy" is the share of a step in which a kernel or a copy ran, by PyTorch's profiler over ten
steps more; "host ms" a step of two windows, which the device ends long before the host has launched
all of it. Together they say whether the device or the host is what a step waits for.

throughput  the recipe as a loop that does what Trainer does (bf16 autocast, windows padded to
            --max-length, rows through the default collator, fused AdamW, clipping, its look at the
            loss), the same with batches that wait on the device, and ours; examples a second, and
            arithmetic on real tokens as a share of what a large bf16 product reached in the same
            run. Trainer itself does more in a step than this loop; compare_training.py runs it. On
            a GPU then ours compiled, in a table of its own: whoever runs out of time has the first
zero        plain PyTorch (bf16 weights, fused AdamW, no master copy), our ZeRO-2, DeepSpeed's
            optimiser with our settings, and DeepSpeed's defaults; all packed and fed alike
frozen      half of the layers frozen, computed each time and kept
layout      windows of similar length in a batch (train.length_buckets), padded and packed; on a CPU
            also with PyTorch's own dropout, as before there was ours
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import measuring
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from training_modes import RANK, SHAPES, Modes, Steps

from runner.distributed.process_group import start_distributed
from runner.job.schema import Zero


def operations(shape: str, lengths_N: np.ndarray) -> float:
    """Arithmetic of forward and backward pass over real tokens: three times 2 a weight and token,
    and attention's two products."""
    width, layers, _, inner = SHAPES[shape]
    weights = layers * (4 * width * width + 2 * width * inner)
    tokens, squares = float(lengths_N.sum()), float((lengths_N.astype(float) ** 2).sum())
    return 3 * (2 * weights * tokens + 4 * layers * width * squares)


def matrix_peak(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Operations a second of a large product of matrices, the best of some."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait(device)
        began = clock()
        a @ b
        wait(device)
        best = min(best, clock() - began)
    return 2 * size**3 / best


def wait(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what spans (begin, end) cover together."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


class Bench(Modes):
    """Measures modes against each other."""

    def measure(
        self, modes: dict[str, Steps], batches: list[np.ndarray] | None = None
    ) -> list[dict[str, Any]]:
        """Steps a mode at a time, rounds in turn; the first mode is what the others are compared
        with."""
        count, rounds = self.args.steps, self.args.rounds
        batches = batches or self.mixed
        chosen = [batches[n % len(batches)] for n in range(count)]
        for name, steps in modes.items():
            print(f"  warming up: {name}", file=sys.stderr)
            steps(chosen[: self.args.warmup])
        wait(self.device)

        def run(steps: Steps) -> None:
            steps(chosen)
            wait(self.device)

        clock = time.process_time if self.args.cpu_time else time.perf_counter
        times = measuring.interleaved(
            {name: lambda steps=steps: run(steps) for name, steps in modes.items()}, rounds, clock
        )
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        peak = matrix_peak(self.device, dtype, clock)
        lengths_N = self.windows.lengths_N[np.concatenate(chosen)]
        work = operations(self.args.shape, lengths_N)
        first = times[next(iter(times))]
        return [
            {
                "mode": name,
                "ms a step": 1e3 * statistics.median(seconds) / count,
                "examples a second": count * self.args.batch_size / statistics.median(seconds),
                "real tokens a second": float(lengths_N.sum()) / statistics.median(seconds),
                "% of the matrix peak": 100 * work / statistics.median(seconds) / peak,
                "times the first": measuring.ratio(first, seconds),
                **self._waiting(modes[name], chosen[:10], 1e3 * statistics.median(seconds) / count),
            }
            for name, seconds in times.items()
        ]

    def _waiting(self, steps: Steps, batches: list[np.ndarray], step_ms: float) -> dict[str, float]:
        """What a step waits for: how busy the device is, and the host alone."""
        if self.args.cpu_time:
            return {}
        kind = ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU
        with profile(activities=[kind]) as seen:
            steps(batches)
            wait(self.device)
        busy_us = covered(
            (event.time_range.start, event.time_range.end)
            for event in seen.events() or ()
            if event.device_type.name == kind.name and not event.is_user_annotation
        )
        few = [rows[:2] for rows in batches]
        steps(few)
        wait(self.device)
        began = time.perf_counter()
        steps(few)
        wait(self.device)
        host_ms = 1e3 * (time.perf_counter() - began) / len(few)
        return {
            "device busy, %": 100 * busy_us / 1e3 / len(batches) / step_ms,
            "host ms": host_ms,
        }

    def report(self, part: str, rows: list[dict[str, Any]], *notes: str) -> None:
        """Show and store a part's table."""
        args = self.args
        lengths_N = self.windows.lengths_N
        settings = (
            f"{args.shape} shape, batches of {args.batch_size} windows of {lengths_N.mean():.0f}"
            f" tokens on average, {self.precision}; medians of {args.rounds} interleaved rounds of"
            f" {args.steps} steps."
        )
        if args.cpu_time:
            settings += " CPU seconds of one thread."
        if args.shape == "tiny":
            settings += " A trial of the script, not a result."
        text = measuring.report(f"Training, {part}", rows, [settings, *notes])
        measuring.show(text, args.table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, help="SQuAD-format JSON file whose lengths to take")
    parser.add_argument("--tokenizer", help="the model whose tokenizer cuts it")
    parser.add_argument("--windows", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU: one thread and its own seconds, which company changes little",
    )
    parser.add_argument("--table", type=Path, help="append the tables to this file")
    args = parser.parse_args()
    device = start_distributed(RANK, 1 if args.cpu_time else None)
    bench = Bench(args, device)
    for part in args.parts:
        PARTS[part](bench)
        gc.collect()  # engines hold themselves: the next part needs their memory


def throughput(bench: Bench) -> None:
    modes = {
        "recipe: rows, collator, padded": bench.recipe(loader=True),
        "recipe, batches ready": bench.recipe(loader=False),
        "ours, packed": bench.ours(Zero()),
    }
    bench.report("throughput", bench.measure(modes))
    if bench.on_gpu:
        compiled = {"ours, packed and compiled": bench.ours(Zero(), compiled="on")}
        modes = dict(list(modes.items())[:1]) | compiled
        bench.report("throughput, compiled", bench.measure(modes))


def zero(bench: Bench) -> None:
    modes = {
        "plain PyTorch, fused AdamW": bench.plain(),
        "ZeRO-2, ours": bench.ours(Zero()),
        "ZeRO-2, DeepSpeed's with our settings": bench.ours(Zero(optimizer="deepspeed")),
        "ZeRO-2, DeepSpeed's defaults": bench.defaults(),
    }
    bench.report("what ZeRO-2 costs", bench.measure(modes))


def layout(bench: Bench) -> None:
    modes: dict[str, Steps] = {}
    if not bench.on_gpu:
        modes = {
            "padded, torch's dropout": bench.ours(Zero(), packing="off", torch_dropout=True),
            "packed, torch's dropout": bench.ours(Zero(), packing="on", torch_dropout=True),
        }
    modes |= {
        "padded": bench.ours(Zero(), packing="off"),
        "packed": bench.ours(Zero(), packing="on"),
    }
    bench.report("buckets and packing", bench.measure(modes, bench.alike))


def frozen(bench: Bench) -> None:
    half = SHAPES[bench.args.shape][1] // 2
    bottom = ("embeddings", f"encoder.layer.0-{half - 1}")
    modes = {
        "all layers trained": bench.ours(Zero()),
        f"{half} layers frozen": bench.ours(Zero(), freeze=bottom),
        f"{half} layers frozen and kept": bench.ours(Zero(), freeze=bottom, cache_frozen=True),
    }
    bench.report(
        "frozen layers",
        bench.measure(modes),
        "Kept: from the second epoch on; the first pays for computing them once, in one pass.",
        "The share of the peak counts the arithmetic of training all layers.",
    )


PARTS = {"throughput": throughput, "zero": zero, "layout": layout, "frozen": frozen}


if __name__ == "__main__":
    main()
