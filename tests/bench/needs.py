"""What 1, 8, 64 and 512 GPUs would need, computed from measured parts.

    python tests/bench/needs.py [--rate 4000] [--windows 90000] [--table FILE.md]

Everything but the GPU's own rate is measured on a CPU by the other scripts here (their tables are
in README.md); the rate of one GPU is not measured yet, so it is an argument, by default the goal of
issue 6 for BERT-base on an H100 or H200. The columns:

step, ms            32 windows a GPU at that rate
epoch, s            all windows, if nothing but the GPUs took time
host, % of a step   assembling one rank's batch and starting its copy
links, GB/s         gradients there and weights back, at the speed that hides in a tenth of a step
feature build, s    once, on rank 0, for all questions; later runs map the files
start, s            what every start takes before its first step, in percent of ten epochs
answers, s          rank 0's search for n-best answers is shared; merging them is not
checkpoint, GB      weights, master weights and two moments; each rank writes its share
file server, /s     operations by which all ranks show that they live and look after each other, in
                    long work (while steps are taken: half of it), and a listing a second by rank 0
a death             operations of all ranks until one that died on another machine is named
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import measuring

BATCH = 32  # windows a GPU and step
PARAMETERS = 109e6  # BERT-base


def row(gpus: int, args: argparse.Namespace) -> dict[str, float | int]:
    """The needs of one size."""
    step = BATCH / args.rate
    epoch = args.windows / (args.rate * gpus)
    # Reduce-scatter of bf16 gradients and all-gather of bf16 weights: each GPU sends and receives
    # (n - 1) / n of either.
    traffic = 2 * (gpus - 1) / gpus * 2 * PARAMETERS
    return {
        "GPUs": gpus,
        "windows a step": BATCH * gpus,
        "steps an epoch": -(-args.windows // (BATCH * gpus)),
        "step, ms": 1e3 * step,
        "epoch, s": epoch,
        "host, % of a step": 100 * args.batch_us * 1e-6 * BATCH / step,
        "links, GB/s": traffic / (0.1 * step) / 1e9,
        "feature build, s": args.feature_us * 1e-6 * args.windows,
        "start, % of ten epochs": 100 * args.start / (args.start + 10 * epoch),
        "answers, s": args.answer_us * 1e-6 * args.validation,
        "checkpoint, GB a rank": (2 + 12 / gpus) * PARAMETERS / 1e9,
        "file server, /s": args.server_peace * gpus + 1,
        "a death": args.server_death * (gpus - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=4000, help="windows a second and GPU")
    parser.add_argument("--windows", type=int, default=90_000, help="of one epoch (SQuAD: 88,524)")
    parser.add_argument("--validation", type=int, default=10_570, help="questions")
    parser.add_argument("--feature-us", type=float, default=60, help="us a question, cold")
    parser.add_argument("--batch-us", type=float, default=2.5, help="us a window")
    parser.add_argument(
        "--answer-us", type=float, default=400, help="us a question, one CPU thread"
    )
    parser.add_argument("--start", type=float, default=12, help="seconds to the first step")
    parser.add_argument("--server-peace", type=float, default=0.19, help="a rank and second")
    parser.add_argument("--server-death", type=float, default=28, help="a rank, of one that died")
    parser.add_argument("--table", type=Path, help="append the table to this file")
    args = parser.parse_args()
    rows = [row(gpus, args) for gpus in (1, 8, 64, 512)]
    note = (
        f"{args.windows} windows an epoch, BERT-base, {args.rate:g} windows/s a GPU (assumed, not"
        f" measured); measured on the machine above: {args.feature_us:g} us a question for"
        f" features, {args.batch_us:g} us a window for batches, {args.answer_us:g} us a question"
        f" for answers, {args.start:g} s to the first step. Counted: {args.server_peace:g} file"
        f" operations a rank and second, {args.server_death:g} a rank at a death."
    )
    measuring.show(measuring.report("What 1 to 512 GPUs would need", rows, [note]), args.table)


if __name__ == "__main__":
    main()
