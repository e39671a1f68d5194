"""Peak memory of span search and answers as the number of windows grows.

    python tests/bench/search_memory.py [--windows 10000 100000 1000000] [--length 384]

Each row runs in a process of its own. Memory is the process's peak resident size above what it has
before the work: for "search, one call" also less its logits and what it returns, which are the
caller's, so that the workspace remains. "search and answers" makes the logits of a batch at a time,
one question a window, as evaluation and `predict` do: "dropped" forgets each answer once it is made
(`predict`), "kept" keeps them all with three candidates each (evaluation).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from runner.eval.answers import MergeSettings, join, merge_answers, search  # noqa: E402

QUESTION, N_BEST, BATCH, BLOCK = 14, 20, 32, 32_768
CASES = ("search, one call", "search and answers, dropped", "search and answers, kept")


def peak() -> int:
    """Bytes, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_call(num: int, length: int) -> int:
    """Bytes of workspace."""
    draw = torch.Generator().manual_seed(0)
    logits_T2 = torch.empty(num * length, 2).normal_(generator=draw)
    segments_N2 = torch.stack([torch.arange(num) * length, torch.full((num,), length)], 1)
    contexts_N2 = torch.tensor([QUESTION, length - 1]).expand(num, 2)
    before = peak()
    spans = search(logits_T2, segments_N2, contexts_N2, n_best=N_BEST)
    tensors = spans.score_NK, spans.start_NK, spans.end_NK, spans.null_score_N
    return peak() - before - sum(tensor.nbytes for tensor in tensors)


def in_blocks(num: int, length: int, *, keep: bool) -> int:
    """Bytes above what the process has before."""
    draw = torch.Generator().manual_seed(0)
    segments_B2 = torch.stack([torch.arange(BATCH) * length, torch.full((BATCH,), length)], 1)
    contexts_B2 = torch.tensor([QUESTION, length - 1]).expand(BATCH, 2)
    chars_L2 = np.stack([np.arange(length) * 5, np.arange(length) * 5 + 4], 1)
    context = "word " * length
    before = peak()
    kept: deque[object] = deque(maxlen=None if keep else 1)
    for first in range(0, num, BLOCK):
        size = min(BLOCK, num - first)
        parts = []
        for place in range(0, size, BATCH):
            rows = min(BATCH, size - place)
            logits_T2 = torch.empty(rows * length, 2).normal_(generator=draw)
            parts.append(search(logits_T2, segments_B2[:rows], contexts_B2[:rows], n_best=N_BEST))
        kept.extend(
            merge_answers(
                join(parts),
                np.arange(size),
                np.zeros(size, np.int64),
                chars_L2,
                [str(first + n) for n in range(size)],
                [context] * size,
                MergeSettings(N_BEST, n_listed=3),
            )
        )
    return peak() - before


def main() -> None:
    """Print a Markdown table; with --case, the bytes and seconds of one row."""
    parser = argparse.ArgumentParser(description="Peak memory of span search")
    parser.add_argument("--windows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--case", choices=CASES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        num, began = args.windows[0], time.process_time()
        if args.case == CASES[0]:
            found = one_call(num, args.length)
        else:
            found = in_blocks(num, args.length, keep=args.case == CASES[2])
        print(json.dumps([found, time.process_time() - began]))
        return
    print(f"python tests/bench/search_memory.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"torch {torch.__version__}, Python {platform.python_version()}, 1 thread\n")
    print("| | windows | MiB | CPU seconds |\n|---|---:|---:|---:|")
    for case in CASES:
        for num in args.windows:
            command = [sys.executable, __file__, "--case", case, "--windows", str(num)]
            done = subprocess.run(
                [*command, "--length", str(args.length)], capture_output=True, text=True, check=True
            )
            found, seconds = json.loads(done.stdout)
            print(f"| {case} | {num:,} | {found / 2**20:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
