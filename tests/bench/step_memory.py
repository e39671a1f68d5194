"""Memory and time of a training step, with and without train.gradient_checkpointing.

    python tests/bench/step_memory.py (--model NAME | --family modernbert) [--lengths 384 512]

Forward pass, loss and backward pass of packed windows that all have one length, on a GPU if there
is one. Each row runs in a process of its own. "peak" is the most memory of the process (of the
GPU's that was allocated) above what it has with weights and gradients; the optimiser's state, which
no length changes, is not in it. --family takes random weights in transformers' shape of the family.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import measuring
import numpy as np
import torch
from training_modes import windows_of

HOW = ("all kept", "gradient checkpointing")


def step(args: argparse.Namespace, length: int, how: str) -> dict[str, float]:
    """Peak bytes of one step of `args.batch_size` windows, and seconds."""
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    from runner.data.loader import WindowLoader
    from runner.job.schema import Model, Zero
    from runner.model.dropout import DropoutMasks
    from runner.model.forward import SpanModel
    from runner.model.load import ModelFiles, choose_precision, load_pretrained
    from runner.model.loss import choose_span_loss
    from runner.train.plan import choose_plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else choose_precision("fp32", device)
    section = Model(name=args.model or "none", precision=precision, packing="on")
    if args.model:
        model = load_pretrained(ModelFiles.locate(section), 0)
    else:
        config = AutoConfig.for_model(args.family, max_position_embeddings=max(args.lengths))
        model = AutoModelForQuestionAnswering.from_config(config)
    dropout = DropoutMasks(1, 0)
    plan = choose_plan(
        section, Zero(), model, device, precision,
        longest=length, tokens=1, dropout=dropout, recompute=how == HOW[1],
    )  # fmt: skip
    model = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).train()
    types = getattr(model.config, "type_vocab_size", 0) >= 2
    fed = SpanModel(model, WindowLoader(device, 0, plan.packing), types)
    span_loss = choose_span_loss("auto", model, device, 2)
    words = model.config.vocab_size
    windows = windows_of(np.full(args.batch_size, length), words)

    def take(rows: np.ndarray) -> float:
        began = time.perf_counter()
        span_loss(fed(fed.batch(windows, rows))).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def most() -> int:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    few = windows_of(np.full(2, 8), words)
    span_loss(
        fed(fed.batch(few, np.arange(2)))
    ).backward()  # gradients, code and workspace are there
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = most()
    seconds = [take(np.arange(args.batch_size)) for _ in range(args.steps)]
    return {"peak": most() - before, "seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a model as a job names it")
    which.add_argument("--family", help="a family of transformers, with random weights")
    parser.add_argument("--lengths", type=int, nargs="+", default=[384, 512])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--how", choices=HOW, help="one row alone, as JSON")
    parser.add_argument("--table", type=Path, help="append the table to this file")
    args = parser.parse_args()
    if args.how:
        print(json.dumps(step(args, args.lengths[0], args.how)))
        return
    rows = []
    which_model = ["--model", args.model] if args.model else ["--family", args.family]
    for length in args.lengths:
        first = None
        for how in HOW:
            command = [sys.executable, __file__, *which_model, "--how", how]
            command += ["--lengths", str(length), "--batch-size", str(args.batch_size)]
            command += ["--steps", str(args.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            first = first or found
            rows.append(
                {
                    "tokens of a window": length,
                    "activations": how,
                    "peak, MiB": found["peak"] / 2**20,
                    "of it": found["peak"] / first["peak"],
                    "seconds": found["seconds"],
                    "times as long": found["seconds"] / first["seconds"],
                }
            )
    note = f"{args.model or args.family}, {args.batch_size} packed windows, {args.steps} steps."
    measuring.show(measuring.report("Memory of a step", rows, [note]), args.table)


if __name__ == "__main__":
    main()
