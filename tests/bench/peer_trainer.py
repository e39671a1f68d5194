"""Train and score with Hugging Face's usual recipe: the peer that spantune is measured against.

It does what the transformers question-answering example does (Trainer, features through
`datasets.map`, every window padded to the maximum length, default collator, top-20 x top-20 answer
search in Python) with Trainer's own defaults wherever no option below says otherwise. It is kept
free of our ideas on purpose: whoever makes this file faster makes the comparison wrong.

Needs torch, transformers, datasets and accelerate; nothing of spantune.
"""

import argparse
import collections
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import string
import sys
import time
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported, hence before the imports below.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
import numpy as np
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

N_BEST = 20
MAX_ANSWER_LENGTH = 30  # tokens
WARMUP = 0.1  # of the optimiser steps; transformers 5 reads a fraction in `warmup_steps`
WEIGHT_DECAY = 0.01
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train and score with Hugging Face's usual question-answering recipe."
    )
    parser.add_argument("--train", type=Path, required=True, help="SQuAD-format JSON file")
    parser.add_argument("--validation", type=Path, required=True, help="SQuAD-format JSON file")
    parser.add_argument(
        "--model", required=True, help="a folder, or package:NAME/SUBFOLDER of an installed package"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and results")
    parser.add_argument("--sample", type=int, help="questions to train on (default: all)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--max-length", type=int, default=384, help="tokens of a window")
    parser.add_argument("--stride", type=int, default=128, help="tokens neighbours share")
    parser.add_argument("--batch-size", type=int, default=16, help="windows of an optimiser step")
    parser.add_argument(
        "--eval-batch-size", type=int, default=8, help="windows of a forward pass in prediction"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument(
        "--bf16", action="store_true", help="Trainer's bf16 autocast, as users train on a GPU"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch decides)")
    return parser.parse_args()


def seconds_since_process_start() -> float:
    """Seconds since the kernel started this process, so that the imports above count as well.

    Field 22 of /proc/self/stat (proc(5)) is the start in clock ticks since boot.
    """
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class PhaseClock:
    """Gives the time since the previous mark to a named phase; the phases add up to the total."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.total = 0.0

    def mark(self, phase: str) -> None:
        now = seconds_since_process_start()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.total
        self.total = now


# ----------------------------------------------------------------------------------------- data


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Return the questions of a SQuAD-format file, one dict each, in file order."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [
        {
            "id": qa["id"],
            "question": qa["question"],
            "context": paragraph["context"],
            "answers": {
                "text": [answer["text"] for answer in qa["answers"]],
                "answer_start": [answer["answer_start"] for answer in qa["answers"]],
            },
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


def sample_questions(questions: list[dict[str, Any]], n: int, seed: int) -> list[dict[str, Any]]:
    # The one definition of "sample = N with the seed"; runner/dataset.py says the same:
    # the first N of a seeded permutation of the questions in file order, back in file order.
    chosen = np.sort(np.random.default_rng(seed).permutation(len(questions))[:n])
    return [questions[i] for i in chosen]


def find_model(name: str) -> str:
    """Return the folder a `package:NAME/SUBFOLDER` names; any other name is already one."""
    if not name.startswith("package:"):
        return name
    package, _, subfolder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"--model {name}: no package {package!r} is installed here")
    return str(Path(spec.submodule_search_locations[0]) / subfolder)


def load_model(folder: str) -> Any:
    """Return the model to train, its weights in float32: transformers 5 would take the dtype of the
    file, and Trainer, whose bf16 is autocast around float32 weights, would train in float16."""
    return AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)


# ------------------------------------------------------------------------------------- features


def encode_windows(batch: dict[str, list], tokenizer: Any, max_length: int, stride: int) -> Any:
    """Cut contexts into overlapping windows, each padded to `max_length`."""
    # Leading blanks of a question only cost tokens; with long ones a window has no room left.
    questions = [question.lstrip() for question in batch["question"]]
    question_first = tokenizer.padding_side == "right"
    return tokenizer(
        questions if question_first else batch["context"],
        batch["context"] if question_first else questions,
        truncation="only_second" if question_first else "only_first",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )


def context_bounds(sequence_ids: list[int | None], context_id: int) -> tuple[int, int]:
    """Return the first and the last token of the context in one window."""
    first = sequence_ids.index(context_id)
    last = len(sequence_ids) - 1 - sequence_ids[::-1].index(context_id)
    return first, last


def label_windows(batch: dict[str, list], tokenizer: Any, max_length: int, stride: int) -> Any:
    """Make training windows: the first answer's tokens, or [CLS] where it is not all inside."""
    windows = encode_windows(batch, tokenizer, max_length, stride)
    context_id = 1 if tokenizer.padding_side == "right" else 0
    all_offsets = windows.pop("offset_mapping")
    questions = windows.pop("overflow_to_sample_mapping")
    starts, ends = [], []
    for w, (offsets, question) in enumerate(zip(all_offsets, questions, strict=True)):
        start_token = end_token = windows["input_ids"][w].index(tokenizer.cls_token_id)
        answers = batch["answers"][question]
        if answers["text"]:
            start = answers["answer_start"][0]
            end = start + len(answers["text"][0])
            first, last = context_bounds(windows.sequence_ids(w), context_id)
            if offsets[first][0] <= start and end <= offsets[last][1]:
                start_token = first
                while start_token < last and offsets[start_token + 1][0] <= start:
                    start_token += 1
                end_token = last
                while end_token > first and offsets[end_token - 1][1] >= end:
                    end_token -= 1
        starts.append(start_token)
        ends.append(end_token)
    windows["start_positions"] = starts
    windows["end_positions"] = ends
    return windows


def locate_windows(batch: dict[str, list], tokenizer: Any, max_length: int, stride: int) -> Any:
    """Make validation windows: character offsets of context tokens, None for all others."""
    windows = encode_windows(batch, tokenizer, max_length, stride)
    context_id = 1 if tokenizer.padding_side == "right" else 0
    questions = windows.pop("overflow_to_sample_mapping")
    windows["example_id"] = [batch["id"][question] for question in questions]
    windows["offset_mapping"] = [
        [
            offset if sequence == context_id else None
            for offset, sequence in zip(offsets, windows.sequence_ids(w), strict=True)
        ]
        for w, offsets in enumerate(windows["offset_mapping"])
    ]
    return windows


# --------------------------------------------------------------------------------------- answers


def find_answers(
    questions: list[dict[str, Any]],
    windows: datasets.Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]]]:
    """Return the best answer and the n-best list of every question, by its id.

    Candidates of a window are the pairs of its 20 best starts and 20 best ends that lie in the
    context, in order, and are at most 30 tokens long; a question's windows compete by logit sum.
    """
    windows_of = collections.defaultdict(list)
    for w, question_id in enumerate(windows["example_id"]):
        windows_of[question_id].append(w)

    best_text: dict[str, str] = {}
    best_lists: dict[str, list[dict[str, Any]]] = {}
    for question in questions:
        candidates = []
        for w in windows_of[question["id"]]:
            offsets = windows[w]["offset_mapping"]
            best_starts = np.argsort(start_logits[w])[: -N_BEST - 1 : -1].tolist()
            best_ends = np.argsort(end_logits[w])[: -N_BEST - 1 : -1].tolist()
            for start in best_starts:
                for end in best_ends:
                    if offsets[start] is None or offsets[end] is None:
                        continue
                    if end < start or end - start + 1 > MAX_ANSWER_LENGTH:
                        continue
                    score = float(start_logits[w][start] + end_logits[w][end])
                    candidates.append((score, offsets[start][0], offsets[end][1]))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)
        # A window may offer no candidate at all; "empty" then is an answer that scores nothing.
        n_best = [
            {"text": question["context"][begin:end], "score": score}
            for score, begin, end in candidates[:N_BEST]
        ] or [{"text": "empty", "score": 0.0}]
        weights = [math.exp(answer["score"] - n_best[0]["score"]) for answer in n_best]
        for answer, weight in zip(n_best, weights, strict=True):
            answer["probability"] = weight / sum(weights)
        best_text[question["id"]] = n_best[0]["text"]
        best_lists[question["id"]] = n_best
    return best_text, best_lists


# SQuAD v1.1's metric (Rajpurkar et al., 2016, section 6.1, and its official evaluation script).


def normalize_answer(text: str) -> str:
    without_punctuation = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def token_f1(prediction: str, truth: str) -> float:
    predicted = normalize_answer(prediction).split()
    true = normalize_answer(truth).split()
    shared = (collections.Counter(predicted) & collections.Counter(true)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(true)
    return 2 * precision * recall / (precision + recall)


def score_answers(
    questions: list[dict[str, Any]], predictions: dict[str, str]
) -> tuple[float, float]:
    """Return exact match and F1 in percent, each question against its most favourable truth."""
    exact = f1 = 0.0
    for question in questions:
        prediction = predictions[question["id"]]
        truths = question["answers"]["text"]
        exact += max(normalize_answer(prediction) == normalize_answer(truth) for truth in truths)
        f1 += max(token_f1(prediction, truth) for truth in truths)
    return 100 * exact / len(questions), 100 * f1 / len(questions)


# ------------------------------------------------------------------------------------------ main


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    args = read_arguments()
    clock = PhaseClock()
    if args.threads:
        torch.set_num_threads(args.threads)
        # The tokenizer's thread pool reads this when it first works.
        os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    set_seed(args.seed)  # also draws the weights of the new answer head

    train = read_questions(args.train)
    if args.sample is not None:
        if args.sample > len(train):
            sys.exit(f"--sample {args.sample}: {args.train.name} has {len(train)} questions")
        train = sample_questions(train, args.sample, args.seed)
    validation = read_questions(args.validation)
    if not all(question["answers"]["text"] for question in validation):
        sys.exit(f"{args.validation.name}: a question has no answer; this scores SQuAD v1.1 only")
    model_folder = find_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = load_model(model_folder)
    clock.mark("start")

    settings = {"tokenizer": tokenizer, "max_length": args.max_length, "stride": args.stride}
    train_rows = datasets.Dataset.from_list(train)
    train_windows = train_rows.map(
        label_windows,
        batched=True,
        remove_columns=train_rows.column_names,
        fn_kwargs=settings,
        desc="training windows",
    )
    validation_rows = datasets.Dataset.from_list(validation)
    validation_windows: Any = validation_rows.map(
        locate_windows,
        batched=True,
        remove_columns=validation_rows.column_names,
        fn_kwargs=settings,
        desc="validation windows",
    )
    clock.mark("features")

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out),
            seed=args.seed,
            learning_rate=args.learning_rate,
            warmup_steps=WARMUP,
            weight_decay=WEIGHT_DECAY,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.eval_batch_size,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=args.bf16,
            # A bar in a log file is thousands of lines; on a terminal users do see one.
            disable_tqdm=not sys.stderr.isatty(),
        ),
        train_dataset=train_windows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    outcome = trainer.train()
    clock.mark("training")
    trainer.save_model(str(args.out / "model"))
    clock.mark("saving")

    logits: Any = trainer.predict(validation_windows).predictions
    clock.mark("prediction")

    answers, n_best = find_answers(validation, validation_windows, *logits)
    exact_match, f1 = score_answers(validation, answers)
    write_json(args.out / "predictions.json", answers)
    write_json(args.out / "n_best.json", n_best)
    clock.mark("postprocessing")

    result = {
        "exact_match": exact_match,
        "f1": f1,
        "train_loss": outcome.training_loss,
        "steps": outcome.global_step,
        "questions": {"train": len(train), "validation": len(validation)},
        "windows": {"train": len(train_windows), "validation": len(validation_windows)},
        "seconds": {**clock.seconds, "total": clock.total},
        "threads": torch.get_num_threads(),
        "device": str(trainer.args.device),
        "bf16": args.bf16,
        "seed": args.seed,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json(args.out / "result.json", result)

    rows = {
        "exact match": f"{exact_match:.2f} %",
        "F1": f"{f1:.2f} %",
        "training loss": f"{outcome.training_loss:.4f} nats",
        "windows": f"{len(train_windows)} train, {len(validation_windows)} validation",
        "steps": str(outcome.global_step),
        **{f"{phase} time": f"{seconds:.1f} s" for phase, seconds in result["seconds"].items()},
    }
    for name, value in rows.items():
        print(f"{name:<20}{value}")


if __name__ == "__main__":
    main()
