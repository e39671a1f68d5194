"""How time and memory grow with the number of questions: features, batches, evaluation.

    python tests/bench/growth.py --data FILE.json --model NAME [--sizes 1000 10000 100000 1000000]

The questions are those of the file, repeated as often as needed; every repetition's contexts end
in another word, so that nothing is tokenised once for several of them. That serves to count seconds
and bytes, never to score. Each size and part runs in a process of its own, whose peak of resident
memory is the table's; what the questions themselves take, and the libraries, is told apart.

features    windows made and written to the cache, from nothing
warm        the same windows found in the cache: hashes checked, files mapped
batches     one epoch: its order, and every batch of 32 assembled as the model takes it
evaluation  from logits (random ones) to an answer and its n-best for every question
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"
import measuring

SIZES = [1_000, 10_000, 100_000, 1_000_000]
PARTS = ("questions", "features", "warm", "batches", "evaluation")


def questions_of(path: Path, count: int) -> list[Any]:
    """The file's questions, repeated to `count`, contexts made different."""
    from runner.data.dataset import Example, load_dataset
    from runner.job.schema import Columns

    data = load_dataset(str(path), columns=Columns(), unanswerable=True, on_bad_row="drop")
    made: list[Any] = []
    turn = 0
    while len(made) < count:
        contexts: dict[str, str] = {}
        for e in data.examples[: count - len(made)]:
            context = contexts.setdefault(e.context, f"{e.context} {turn}")
            made.append(Example(f"{e.id}-{turn}", e.question, context, e.answers, e.answer_starts))
        turn += 1
    return made


def run_part(part: str, path: Path, model: str, count: int) -> dict[str, float]:
    """Do one part for `count` questions; seconds, and bytes at the peak."""
    from runner.data.window_cache import cached_windows
    from runner.job.schema import Model
    from runner.model.load import ModelFiles, load_tokenizer

    examples = questions_of(path, count)
    tokenizer = load_tokenizer(ModelFiles.locate(Model(name=model)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if part == "questions":
        seconds = time.perf_counter() - began
    elif part in ("features", "warm"):
        windows, cached = cached_windows(examples, f"growth {count}", tokenizer, 384, 128)
        assert cached is (part == "warm")
        seconds = time.perf_counter() - began
    else:
        windows, _ = cached_windows(examples, f"growth {count}", tokenizer, 384, 128)
        began = time.perf_counter()
        assemble(windows) if part == "batches" else answer(windows, examples)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak * 1024, "before": before * 1024}


def assemble(windows: Any) -> None:
    """One epoch's order and batches."""
    from runner.data.collate import Packing, collate
    from runner.data.loader import pack
    from runner.data.sampler import epoch_batches

    packing = Packing(0, 1, 384)
    for rows in epoch_batches(windows.lengths_N, 32, 1, 0):
        pack(collate(windows, rows), 0, packing)


def answer(windows: Any, examples: list[Any]) -> None:
    """What evaluation does with logits: `predict_windows` with a model that draws them."""
    import torch

    from runner.data.collate import Bounds, collate
    from runner.data.loader import DeviceBatch, WindowLoader
    from runner.eval.inference import predict_windows
    from runner.eval.predictions import LISTED
    from runner.job.schema import Score
    from runner.model.forward import SpanLogits, SpanModel
    from runner.utils.ranks import Rank

    class Guesser(torch.nn.Module):
        pass

    class GuessingModel(SpanModel):
        """It is given no tokens, and draws its logits at random."""

        def batch(self, windows: Any, rows: Any) -> DeviceBatch:
            here = collate(windows, rows, tokens=False)
            ids_1T = torch.empty(1, int(here.segments_B2[-1].sum()), dtype=torch.int32)
            labels = here.segments_B2, here.starts_B, here.ends_B, here.rows_B, here.counted
            return DeviceBatch(ids_1T, ids_1T, *labels, bounds=Bounds(ids_1T, 384, ()))

        def __call__(self, batch: Any) -> SpanLogits:
            return SpanLogits(torch.randn(batch.ids_RL.numel(), 2), batch)

    predict_windows(
        GuessingModel(Guesser(), WindowLoader(torch.device("cpu"), 0), True),
        windows,
        examples,
        Score(),
        Rank(0, 1, 0, 1),
        unanswerable=False,
        n_listed=LISTED,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="SQuAD-format JSON file")
    parser.add_argument("--model", required=True, help="a folder, or package:NAME/SUBFOLDER")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--table", type=Path, help="append the table to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child's part
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_part(args.one, args.data, args.model, args.sizes[0])))
        return
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {"questions": size}
            for part in args.parts:
                command = [sys.executable, __file__, "--one", part, "--sizes", str(size)]
                command += ["--data", str(args.data), "--model", args.model]
                done = subprocess.run(
                    command,
                    env={**os.environ, "SPANTUNE_CACHE": folder},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                found = json.loads(done.stdout.splitlines()[-1])
                if part == "questions":
                    row["questions and libraries, MiB"] = found["peak"] / 2**20
                else:
                    row[f"{part}, us a question"] = 1e6 * found["seconds"] / size
                    row[f"{part}, MiB on top"] = (found["peak"] - found["before"]) / 2**20
                print(f"  {size} {part}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
            rows.append(row)
    measuring.show(
        measuring.report(
            "How cost grows with the number of questions",
            rows,
            [
                "One process a cell; wall time; MiB on top: peak of resident memory, less what the"
                " questions and the libraries took before. Mapped files count as far as they were"
                " read."
            ],
        ),
        args.table,
    )


if __name__ == "__main__":
    main()
