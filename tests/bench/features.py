"""Feature preparation and batch assembly beside Hugging Face's recipe, on real questions.

    python tests/bench/features.py --data FILE.json --model NAME [--rounds 5] [--table FILE.md]

Each round prepares all questions of the file four times: the recipe's `datasets.map`
(peer_trainer.py's function, as run_qa has it: a context is tokenised again for each of its
questions, labels in a Python loop), ours from nothing, ours from the cache (files mapped, their
hashes checked), and the recipe's own cache. Then it assembles batches: the recipe's rows through
its default collator, ours padded and packed: a whole epoch's in a row, then with caches that are
cold from other work, as between the steps of a training. Windows and labels are the same; a test of
tests/data/test_windows.py holds them against the recipe's. Wall time, all of the machine's cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import measuring
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="SQuAD-format JSON file")
    parser.add_argument("--model", required=True, help="a folder, or package:NAME/SUBFOLDER")
    parser.add_argument("--sample", type=int, help="only the first questions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--table", type=Path, help="append the tables to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/datasets"
        os.environ["SPANTUNE_CACHE"] = f"{folder}/spantune"
        measure(args)


def measure(args: argparse.Namespace) -> None:
    import datasets
    import peer_trainer
    from transformers import default_data_collator

    from runner.data.collate import Packing, collate
    from runner.data.dataset import load_dataset
    from runner.data.loader import TOGETHER, pack, pad
    from runner.data.window_cache import cached_windows
    from runner.data.windows import build_windows
    from runner.job.schema import Columns, Model
    from runner.model.load import ModelFiles, load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(ModelFiles.locate(Model(name=args.model)))
    settings = {"tokenizer": tokenizer, "max_length": 384, "stride": 128}
    questions = peer_trainer.read_questions(args.data)[: args.sample]
    rows = datasets.Dataset.from_list(questions)
    data = load_dataset(str(args.data), columns=Columns(), unanswerable=True, on_bad_row="fail")
    examples, sha = data.examples[: args.sample], data.sha256

    def recipe(fresh: bool) -> datasets.Dataset:
        return rows.map(
            peer_trainer.label_windows,
            batched=True,
            remove_columns=rows.column_names,
            fn_kwargs=settings,
            load_from_cache_file=not fresh,
            cache_file_name=os.path.join(os.environ["HF_DATASETS_CACHE"], "windows.arrow"),
        )

    os.makedirs(os.environ["HF_DATASETS_CACHE"], exist_ok=True)
    windows, _ = cached_windows(examples, sha, tokenizer, 384, 128)
    recipe_rows = recipe(True)
    if len(recipe_rows) != len(windows):
        sys.exit(f"the recipe has {len(recipe_rows)} windows, ours are {len(windows)}")
    times = measuring.interleaved(
        {
            "recipe, map": lambda: recipe(True),
            "ours, cold": lambda: build_windows(examples, tokenizer, 384, 128),
            "ours, warm": lambda: cached_windows(examples, sha, tokenizer, 384, 128),
            "recipe, its cache": lambda: recipe(False),
        },
        args.rounds,
    )
    peer = times["recipe, map"]
    table = [
        {
            "features": name,
            "seconds": statistics.median(seconds),
            "us a question": 1e6 * statistics.median(seconds) / len(questions),
            "times faster than map": measuring.ratio(peer, seconds),
        }
        for name, seconds in times.items()
    ]
    measuring.show(
        measuring.report(
            f"Features of {len(questions)} questions ({len(windows)} windows)",
            table,
            [f"Medians of {args.rounds} interleaved rounds."],
        ),
        args.table,
    )

    size = args.batch_size
    order = np.random.default_rng(0).permutation(len(windows))
    batches = [order[n : n + size] for n in range(0, len(order) // size * size, size)]
    packing = Packing(0, 1, 384)
    assemble = {
        "recipe: rows, default collator": lambda batch: default_data_collator(
            [recipe_rows[int(n)] for n in batch]
        ),
        "ours, padded": lambda batch: pad(collate(windows, batch), 0),
        "ours, packed": lambda batch: pack(collate(windows, batch), 0, packing),
        "ours, collate alone": lambda batch: collate(windows, batch),
    }
    recipe = next(iter(assemble))
    epochs = {name: (make, len(batches)) for name, make in assemble.items()}
    # The recipe's loader makes one at a time.
    cold = {recipe: (assemble[recipe], 1)}
    for count in (1, TOGETHER):
        for name in ("ours, padded", "ours, packed"):
            cold[f"{name}, {count} in a row"] = (assemble[name], count)
    for title, cases, rounds in (
        ("an epoch's, one after another", epochs, 2 * args.rounds + 1),
        ("caches cold from other work", cold, 20 * args.rounds + 1),
    ):
        times = measuring.interleaved(
            {
                name: partial(following, make, iter(cycle(batches)), count)
                for name, (make, count) in cases.items()
            },
            rounds,
        )
        seconds_N = {
            name: [second / (size * cases[name][1]) for second in seconds]
            for name, seconds in times.items()
        }
        table = [
            {
                "batches": name,
                "us a window": 1e6 * statistics.median(seconds),
                "times faster": measuring.ratio(seconds_N[recipe], seconds),
            }
            for name, seconds in seconds_N.items()
        ]
        about = [f"Medians of {rounds} interleaved rounds."]
        heading = f"Batches of {size} windows, {title}"
        measuring.show(measuring.report(heading, table, about), args.table)


def following(
    assemble: Callable[[np.ndarray], object], batches: Iterator[np.ndarray], count: int
) -> None:
    """Assemble the next batches; none is kept while the next is made, as in training."""
    for batch in islice(batches, count):
        assemble(batch)


if __name__ == "__main__":
    main()
