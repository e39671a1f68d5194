"""Training throughput on one GPU (or, to try the script, on a CPU): random weights, real lengths.

    python tests/bench/training.py --shape base [--parts throughput zero layout frozen]

Weights and tokens are random, which changes no time; window lengths are those of --data, or drawn
from the quantiles below. Every mode takes the same batches of the same windows, a round of steps at
a time, in turn; the table shows medians over rounds.

throughput  the recipe as Trainer runs it (bf16 autocast, windows padded to --max-length, rows
            through the default collator, fused AdamW, clipping, its look at the loss), the same
            with batches that wait on the device, and ours; examples a second, and arithmetic on
            real tokens as a share of what a large bf16 product reached in the same run
zero        plain PyTorch (bf16 weights, fused AdamW, no master copy), our ZeRO-2, DeepSpeed's
            optimiser with our settings, and DeepSpeed's defaults; all packed
frozen      half of the layers frozen, computed each time and kept
layout      windows of similar length in a batch (train.length_buckets), padded and packed; on a CPU
            also with PyTorch's own dropout, as before there was ours
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import measuring
import numpy as np
import torch
from torch import Tensor, nn

from runner.batches import collate, epoch_batches, pad
from runner.computing import choose_computing, keep_frozen
from runner.engine import deepspeed_config, start_distributed, start_engine
from runner.features import Windows
from runner.job import Model, Train, Zero
from runner.layout import batch_layout
from runner.model import freeze, optimiser_groups
from runner.noise import CpuDropout, Noise
from runner.ranks import Rank
from runner.reading import Reader
from runner.span_loss import choose_span_loss

SHAPES = {  # width, layers, heads, inner width
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "minilm": (384, 6, 12, 1536),
    "tiny": (32, 2, 2, 64),
}
# Tokens of windows at each twentieth of SQuADShifts' New Wikipedia questions, BERT's uncased
# vocabulary, 384 tokens a window and a stride of 128: for machines without the file.
QUANTILES = (
    *(35, 93, 108, 117, 124, 131, 137, 143, 148, 154, 160),
    *(167, 174, 183, 192, 204, 217, 234, 259, 303, 384),
)
RANK = Rank(0, 1, 0, 1)
Step = Callable[[np.ndarray], None]


def windows_of(lengths_N: np.ndarray, vocabulary: int) -> Windows:
    """Windows of random tokens; a third of the answers is not in the window, as with SQuAD v2."""
    draw = np.random.default_rng(0)
    total, count = int(lengths_N.sum()), len(lengths_N)
    starts_N = np.where(draw.random(count) < 1 / 3, 0, draw.integers(1, lengths_N))
    ends_N = np.minimum(starts_N + draw.integers(0, 4, count) * (starts_N > 0), lengths_N - 1)
    return Windows(
        tokens_T=draw.integers(5, vocabulary, total).astype(np.int32),
        types_T=draw.integers(0, 2, total).astype(np.uint8),
        firsts_N1=np.concatenate([[0], np.cumsum(lengths_N)]),
        questions_N=np.arange(count, dtype=np.int32),
        contexts_N2=np.stack([np.ones(count), lengths_N], axis=1).astype(np.int32),
        starts_N=starts_N.astype(np.int32),
        ends_N=ends_N.astype(np.int32),
        cls_N=np.zeros(count, np.int32),
        chars_C2=np.zeros((0, 2), np.int32),
        chars_firsts_N=np.zeros(count, np.int64),
    )


def lengths_from(args: argparse.Namespace) -> np.ndarray:
    """Lengths of the windows to train on, int64."""
    if args.data is None:
        places = np.random.default_rng(1).random(args.windows) * (len(QUANTILES) - 1)
        lengths = np.interp(places, np.arange(len(QUANTILES)), QUANTILES).astype(np.int64)
        return np.minimum(lengths, args.max_length)
    from runner.dataset import load_dataset
    from runner.features import build_windows
    from runner.job import Columns
    from runner.model import load_tokenizer

    data = load_dataset(str(args.data), columns=Columns(), unanswerable=True, on_bad_row="drop")
    tokenizer = load_tokenizer(Model(name=args.tokenizer))
    found = build_windows(data.examples, tokenizer, args.max_length, args.max_length // 3)
    return found.lengths_N[: args.windows]


def new_model(shape: str, seed: int = 0, **extra: Any) -> Any:
    """A BERT for question answering with random weights."""
    from transformers import BertConfig, BertForQuestionAnswering

    width, layers, heads, inner = SHAPES[shape]
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=30522 if shape != "tiny" else 1000,
        **extra,
    )
    return BertForQuestionAnswering(config)


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


class Bench:
    """Windows, batches and settings that all modes share."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.on_gpu = device.type == "cuda"
        self.precision = "bf16" if self.on_gpu else "fp32"
        vocabulary = 30522 if args.shape != "tiny" else 1000
        self.windows = windows_of(lengths_from(args), vocabulary)
        lengths_N = self.windows.lengths_N
        self.mixed, self.alike = (
            [
                rows
                for rows in epoch_batches(lengths_N, args.batch_size, 1, 0, buckets=buckets)
                if len(rows) == args.batch_size
            ]
            for buckets in (False, True)
        )
        self.section = Train(
            epochs=1, batch_size=args.batch_size, learning_rate=3e-5, weight_decay=0.01
        )

    # ---- modes

    def recipe(self, *, loader: bool) -> Step:
        """Hugging Face's Trainer, as a loop: one optimiser step."""
        import datasets
        from transformers import default_data_collator

        model = new_model(self.args.shape).to(self.device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.01, fused=True)
        rows = [self._padded(np.array([n])) for n in range(len(self.windows))] if loader else []
        table = datasets.Dataset.from_list(
            [{name: values[0].tolist() for name, values in row.items()} for row in rows]
        )
        ready: dict[bytes, dict[str, Tensor]] = {}

        def step(batch: np.ndarray) -> None:
            if loader:
                inputs = default_data_collator([table[int(n)] for n in batch])
                inputs = {
                    name: values.pin_memory() if self.on_gpu else values
                    for name, values in inputs.items()
                }
                inputs = {k: v.to(self.device, non_blocking=True) for k, v in inputs.items()}
            else:
                key = batch.tobytes()
                if key not in ready:
                    ready[key] = {k: v.to(self.device) for k, v in self._padded(batch).items()}
                inputs = ready[key]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
                loss = model(**inputs).loss
            loss.backward()
            bool(torch.isnan(loss))  # Trainer's logging_nan_inf_filter
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

        return step

    def _padded(self, rows: np.ndarray) -> dict[str, Tensor]:
        batch = collate(self.windows, rows)
        padded = pad(batch, 0, self.args.max_length)
        mask = padded.mask_BL
        return {
            "input_ids": padded.input_ids_BL,
            "token_type_ids": padded.types_BL,
            "attention_mask": torch.ones_like(padded.types_BL) if mask is None else mask,
            "start_positions": batch.starts_B,
            "end_positions": batch.ends_B,
        }

    def ours(
        self, zero: Zero, *, compiled: str = "off", torch_dropout: bool = False, **section: Any
    ) -> Step:
        """spantune's step, as `epoch` takes it, without its logging."""
        reader, span_loss, noise = self._engine(zero, compile=compiled, **section)
        engine, passes = reader.model, iter(range(10**9))
        if torch_dropout:
            for parent in engine.module.modules():
                for name, child in parent.named_children():
                    if isinstance(child, CpuDropout):
                        parent.register_module(name, nn.Dropout(child.p))

        def step(batch: np.ndarray) -> None:
            noise.restart(0, next(passes), 0)
            loss = span_loss(reader.read(self.windows, batch))
            engine.backward(loss)
            engine.step()

        return step

    def _engine(self, zero: Zero, **section: Any) -> tuple[Reader, Any, Noise]:
        job = Model(name="none", precision=self.precision, **section)
        model, noise = new_model(self.args.shape).train(), Noise(1, 0)
        freeze(model, job.freeze)
        computing = choose_computing(
            job,
            zero,
            model,
            self.device,
            self.precision,
            longest=self.args.max_length,
            tokens=len(self.windows.tokens_T),
            noise=noise,
        )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        layout = batch_layout(self.section, 1)
        config = deepspeed_config(zero, self.section, layout, self.precision, trained)
        span_loss = choose_span_loss("auto", model, self.device, zero.stage)
        groups = optimiser_groups(model, 0.01)
        engine = start_engine(
            model, self.device, groups, self.section, config, 10**6, computing.optimiser
        )
        reader = Reader(engine, self.device, 0, True, 8 if self.on_gpu else 1, computing.packing)
        with tempfile.TemporaryDirectory() as folder:
            size = self.args.batch_size
            sets = (self.windows,)
            reader, lines = keep_frozen(reader, computing.trunk, sets, size, Path(folder), RANK)
        for line in lines:
            print(f"  {line}", file=sys.stderr)
        engine.train()
        return reader, span_loss, noise

    def defaults(self) -> Step:
        """DeepSpeed's ZeRO-2 with nothing configured but what it must be told."""
        import deepspeed

        model, noise = new_model(self.args.shape).train(), Noise(1, 0)
        reader, span_loss = self._packed(model, noise)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.args.batch_size,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "steps_per_print": 2**31 - 1,
        }
        if self.on_gpu:
            config["bf16"] = {"enabled": True}
        optimiser = torch.optim.AdamW(optimiser_groups(model, 0.01), lr=3e-5, fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=config)
        reader = dataclasses.replace(reader, model=engine)

        def step(batch: np.ndarray) -> None:
            engine.backward(span_loss(reader.read(self.windows, batch)))
            engine.step()

        return step

    def plain(self) -> Step:
        """PyTorch alone: the same packed model and loss, bf16 weights, fused AdamW."""
        model, noise = new_model(self.args.shape).train(), Noise(1, 0)
        model = model.to(self.device, torch.bfloat16 if self.on_gpu else torch.float32)
        reader, span_loss = self._packed(model, noise)
        optimiser = torch.optim.AdamW(optimiser_groups(model, 0.01), lr=3e-5, fused=True)

        def step(batch: np.ndarray) -> None:
            span_loss(reader.read(self.windows, batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

        return step

    def _packed(self, model: Any, noise: Noise) -> tuple[Reader, Any]:
        computing = choose_computing(
            Model(name="none", precision=self.precision, compile="off"),
            Zero(),
            model,
            self.device,
            self.precision,
            longest=self.args.max_length,
            tokens=1,
            noise=noise,
        )
        span_loss = choose_span_loss("auto", model, self.device, 2)
        reader = Reader(model, self.device, 0, True, 8 if self.on_gpu else 1, computing.packing)
        return reader, span_loss

    # ---- measuring

    def measure(
        self, modes: dict[str, Step], batches: list[np.ndarray] | None = None
    ) -> list[dict[str, Any]]:
        """Steps a mode at a time, rounds in turn; the first mode is what the others are compared
        with."""
        count, rounds = self.args.steps, self.args.rounds
        batches = batches or self.mixed
        chosen = [batches[n % len(batches)] for n in range(count)]
        for name, step in modes.items():
            print(f"  warming up: {name}", file=sys.stderr)
            for rows in chosen[: min(count, self.args.warmup)]:
                step(rows)
        wait(self.device)

        def run(step: Step) -> None:
            for rows in chosen:
                step(rows)
            wait(self.device)

        clock = time.process_time if self.args.cpu_time else time.perf_counter
        times = measuring.interleaved(
            {name: lambda step=step: run(step) for name, step in modes.items()}, rounds, clock
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
            }
            for name, seconds in times.items()
        ]

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
    parser.add_argument("--parts", nargs="+", default=["throughput", "zero", "layout", "frozen"])
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
    half = SHAPES[args.shape][1] // 2
    bottom = ("embeddings", f"encoder.layer.0-{half - 1}")
    if "throughput" in args.parts:
        modes = {
            "recipe: rows, collator, padded": bench.recipe(loader=True),
            "recipe, batches ready": bench.recipe(loader=False),
            "ours, packed": bench.ours(Zero()),
        }
        if bench.on_gpu:
            modes["ours, packed and compiled"] = bench.ours(Zero(), compiled="on")
        bench.report("throughput", bench.measure(modes))
    if "zero" in args.parts:
        modes = {
            "plain PyTorch, fused AdamW": bench.plain(),
            "ZeRO-2, ours": bench.ours(Zero()),
            "ZeRO-2, DeepSpeed's with our settings": bench.ours(Zero(optimizer="deepspeed")),
            "ZeRO-2, DeepSpeed's defaults": bench.defaults(),
        }
        bench.report("what ZeRO-2 costs", bench.measure(modes))
    if "layout" in args.parts:
        modes = {
            "padded": bench.ours(Zero(), packing="off"),
            "packed": bench.ours(Zero(), packing="on"),
        }
        if not bench.on_gpu:
            before = bench.ours(Zero(), packing="off", torch_dropout=True)
            packed = bench.ours(Zero(), packing="on", torch_dropout=True)
            modes = {
                "padded, torch's dropout": before,
                "packed, torch's dropout": packed,
                **modes,
            }
        bench.report("buckets and packing", bench.measure(modes, bench.alike))
    if "frozen" in args.parts:
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


if __name__ == "__main__":
    main()
