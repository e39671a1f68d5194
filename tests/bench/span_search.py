"""Span search beside the loop of Hugging Face's run_qa recipe, on synthetic logits of full windows.

    python tests/bench/span_search.py [--windows 10000] [--length 384] [--rounds 5] [--recipe 1000]
                                      [--device cuda]

One CPU thread, and CPU time rather than wall time, since the machine may be shared; with a GPU,
wall time until it is done, logits and bounds on it beforehand, beside the recipe on the CPU. In
every round each method runs once, so that a change of its load meets them all; the table shows the
median of the rounds and, for the ratio, the median of the rounds' ratios.

"search" stops at spans: positions and scores. "answers" goes on to texts, probabilities and n-best
lists, one question per window. The recipe is `postprocess_qa_predictions` of Hugging Face's
question-answering/utils_qa.py told again: the 20 best starts x the 20 best ends of each window,
one dictionary per candidate, sorted; then texts and softmax. It is given its offsets in lists. The
script itself reads them from a `datasets.Dataset`, at a price that "as run_qa reads" shows,
measured on `--recipe` windows and scaled up. "three listed" is what an evaluation asks for.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from runner.eval.answers import MergeSettings, Mode, merge_answers, search

QUESTION = 14  # tokens in front of the context: [CLS], question, [SEP]
LONGEST, N_BEST = 30, 20


Chars = list[tuple[int, int] | None]


def recipe_spans(logits_NL2: np.ndarray, chars_by_window: Iterable[Chars]):
    """The recipe up to its sorted candidates, with its data types: a dictionary per candidate."""
    found = []
    for logits_L2, chars in zip(logits_NL2, chars_by_window, strict=True):
        start_L, end_L = logits_L2[:, 0], logits_L2[:, 1]
        candidates = []
        starts = np.argsort(start_L)[-1 : -N_BEST - 1 : -1].tolist()
        ends = np.argsort(end_L)[-1 : -N_BEST - 1 : -1].tolist()
        for start in starts:
            for end in ends:
                if start >= len(chars) or end >= len(chars):
                    continue
                if chars[start] is None or chars[end] is None:
                    continue
                if end < start or end - start + 1 > LONGEST:
                    continue
                candidates.append(
                    {
                        "offsets": (chars[start][0], chars[end][1]),
                        "score": start_L[start] + end_L[end],
                        "start_logit": start_L[start],
                        "end_logit": end_L[end],
                    }
                )
        found.append(sorted(candidates, key=lambda entry: entry["score"], reverse=True)[:N_BEST])
    return found


def recipe_answers(logits_NL2: np.ndarray, chars_by_window: Iterable[Chars], contexts: list[str]):
    """The whole recipe: texts and probabilities of the n-best of every question."""
    found = recipe_spans(logits_NL2, chars_by_window)
    for listed, context in zip(found, contexts, strict=False):
        for entry in listed:
            first, last = entry.pop("offsets")
            entry["text"] = context[first:last]
        scores = np.array([entry.pop("score") for entry in listed])
        weights = np.exp(scores - np.max(scores, initial=0.0))
        for entry, weight in zip(listed, weights / weights.sum(), strict=True):
            entry["probability"] = weight
    return [[{k: v if k == "text" else float(v) for k, v in e.items()} for e in q] for q in found]


def as_run_qa_reads(features: datasets.Dataset) -> Iterator[Chars]:
    """Offsets of each window, by the looks into the data set that the script takes: one through all
    windows for their questions, then two at each."""
    for feature in features:
        assert feature
    for row in range(len(features)):
        chars = features[row]["offset_mapping"]
        assert "token_is_max_context" not in features[row]
        yield chars


def make_logits(kind: str, num: int, length: int) -> torch.Tensor:
    """[num * length, 2] float32: independent normal, or with a few high peaks in each window."""
    draw = torch.Generator().manual_seed(0)
    logits_T2 = torch.randn(num * length, 2, generator=draw)
    if kind == "peaked":
        logits_T2 -= 4
        logits_T2[torch.randint(len(logits_T2), (6 * num,), generator=draw)] += 9
    return logits_T2


def seconds(work: Callable[[], object], device: str) -> float:
    """CPU time of one call, on a GPU wall time; its result is freed outside of the time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    began = clock()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    took = clock() - began
    del result
    return took


def measure(
    kind: str, num: int, length: int, rounds: int, recipe: int, device: str
) -> list[dict[str, float | str]]:
    """One row per method: name, median seconds, median ratio of the recipe's time to it."""
    logits_T2 = make_logits(kind, num, length)
    segments_N2 = torch.stack([torch.arange(num) * length, torch.full((num,), length)], 1)
    contexts_N2 = torch.tensor([QUESTION, length - 1]).expand(num, 2)
    chars_L2 = np.stack([np.arange(length) * 5, np.arange(length) * 5 + 4], 1)
    chars_T2 = np.tile(chars_L2, (num, 1))
    contexts = ["word " * length] * num
    ids = [str(n) for n in range(num)]
    logits_NL2 = logits_T2.view(num, length, 2).numpy()
    tokens = [
        tuple(pair) if QUESTION <= p < length - 1 else None
        for p, pair in enumerate(chars_L2.tolist())
    ]
    features = datasets.Dataset.from_dict({"offset_mapping": [tokens] * recipe})

    there = [tensor.to(device) for tensor in (logits_T2, segments_N2, contexts_N2)]

    def found(mode: Mode, n_best: int = N_BEST):
        return search(*there, n_best=n_best, mode=mode)

    def answered(mode: Mode, n_best: int = N_BEST, n_listed: int | None = None):
        settings = MergeSettings(n_best, mode=mode, n_listed=n_listed)
        spans, offset_N = found(mode, n_best), segments_N2[:, 0].numpy()
        return list(
            merge_answers(spans, np.arange(num), offset_N, chars_T2, ids, contexts, settings)
        )

    methods: dict[str, tuple[str, float, Callable[[], object]]] = {
        "recipe: spans": (
            "recipe: spans",
            1,
            lambda: recipe_spans(logits_NL2, [tokens] * num),
        ),
        "search, exact, best 1": ("recipe: spans", 1, lambda: found("exact", 1)),
        "search, exact, best 20": ("recipe: spans", 1, lambda: found("exact")),
        "search, run_qa, best 20": ("recipe: spans", 1, lambda: found("run_qa")),
        "recipe: answers": (
            "recipe: answers",
            1,
            lambda: recipe_answers(logits_NL2, [tokens] * num, contexts),
        ),
        "recipe: answers, as run_qa reads": (
            "recipe: answers",
            num / recipe,
            lambda: recipe_answers(logits_NL2[:recipe], as_run_qa_reads(features), contexts),
        ),
        "answers, exact, best 1": ("recipe: answers", 1, lambda: answered("exact", 1)),
        "answers, exact, best 20": ("recipe: answers", 1, lambda: answered("exact")),
        "answers, exact, best 20, three listed": (
            "recipe: answers",
            1,
            lambda: answered("exact", n_listed=3),
        ),
        "answers, run_qa, best 20": ("recipe: answers", 1, lambda: answered("run_qa")),
    }
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(rounds + 1):
        for name, (_, scale, work) in methods.items():
            took = seconds(work, device) * scale
            if round_:  # the first round warms up
                taken[name].append(took)
    theirs = recipe_answers(logits_NL2[:recipe], as_run_qa_reads(features), contexts)
    mine = answered("run_qa")[:recipe]
    same = [a.text for a in mine] == [q[0]["text"] if q else "empty" for q in theirs]
    if not same:
        raise SystemExit("the texts differ from the recipe's: nothing to compare")
    return [
        {
            "logits": kind,
            "method": name,
            "seconds": median(taken[name]),
            "ratio": median(a / b for a, b in zip(taken[peer], taken[name], strict=True)),
        }
        for name, (peer, _, _) in methods.items()
    ]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Span search beside run_qa's loop")
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--recipe", type=int, default=1_000, help="windows that are read as run_qa reads"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python tests/bench/span_search.py {' '.join(sys.argv[1:])}".rstrip())
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    where = "1 thread" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{versions}, {platform.machine()}, {where}\n")
    print("| logits | method | seconds | recipe's time / its time |\n|---|---|---:|---:|")
    for kind in ("random", "peaked"):
        for row in measure(
            kind,
            args.windows,
            args.length,
            args.rounds,
            min(args.recipe, args.windows),
            args.device,
        ):
            print(
                f"| {row['logits']} | {row['method']} | {row['seconds']:.3f} | {row['ratio']:.1f} |"
            )


if __name__ == "__main__":
    main()
