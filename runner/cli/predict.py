"""Arguments of the verbs that answer, score and report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.job.schema import Columns

_FOR_A_MODEL = ("output", "null_threshold", "max_answer_length", "batch_size", "device", "threads")
_FOR_PREDICTIONS = ("no_answer", "no_answer_threshold")


class UsageError(Exception):
    """The arguments do not go together; the command ends with 2, as for any wrong command line."""


@dataclass(frozen=True)
class Opening:
    """Which model is opened, where, and what is changed of how it is asked; None changes nothing.

    Attributes:
        name: run folder, model folder, hub id or package:NAME/SUBFOLDER.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        threads: of the CPU.
        null_threshold: in logits.
        max_answer_length: tokens.
        batch_size: windows.
    """

    name: str
    device: str | None
    threads: int | None
    null_threshold: float | None
    max_answer_length: int | None
    batch_size: int | None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Opening:
        """From the command line."""
        return cls(
            name=arguments.model,
            device=arguments.device,
            threads=arguments.threads,
            null_threshold=arguments.null_threshold,
            max_answer_length=arguments.max_answer_length,
            batch_size=arguments.batch_size,
        )


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `predict`."""
    _model(parser)
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="SQuAD JSON, or flat JSON, JSONL, CSV, Parquet, perhaps a slice of it: dev.json[:10];"
        " absent or -: lines of JSON from stdin, answered as they come",
    )
    parser.add_argument("--question", metavar="TEXT", help="one question, instead of a file")
    parser.add_argument("--context", metavar="TEXT", help="the text that holds its answer")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the answers there, all or none"
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("fail", "drop"),
        default="fail",
        help="end at a question that cannot be asked, or say so and go on (fail)",
    )
    parser.add_argument(
        "--n-best", type=count, default=3, metavar="N", help="candidates listed per question (3)"
    )
    _answering(parser)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `evaluate`."""
    _model(parser, "; or predictions in a .json or .jsonl file")
    parser.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="questions with answers: a file or hub name, perhaps a slice: dev.json[:1000]",
    )
    parser.add_argument(
        "--v2",
        action="store_true",
        help="score by SQuAD v2.0, as is done anyway where a question has no answer",
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("fail", "drop"),
        default="fail",
        help="refuse data with wrong rows, or leave these out (fail)",
    )
    parser.add_argument(
        "--seed", type=int, default=42, metavar="N", help="of the intervals' bootstrap (42)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for result, predictions and report (a run's own evaluations/NAME)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--no-answer",
        type=Path,
        metavar="FILE",
        help="no-answer probabilities for a file of predictions, in SQuAD v2.0's form",
    )
    parser.add_argument(
        "--no-answer-threshold",
        type=float,
        metavar="P",
        help="above this probability no answer counts as given (1.0)",
    )
    _answering(parser)


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `report`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or of an evaluation"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the page (of one run its own, of several the current one)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="RUN is the folder of a sweep: compare its trials, with intervals",
    )


def check_predict(arguments: argparse.Namespace, *, from_terminal: bool) -> None:
    """Refuse arguments of `predict` that do not go together.

    Args:
        arguments: as parsed.
        from_terminal: whether stdin is a terminal, where nobody means to type JSON.

    Raises:
        UsageError: saying what to give.
    """
    parts = arguments.question, arguments.context
    if any(part is not None for part in parts):
        if None in parts or arguments.file:
            raise UsageError("give both --question and --context and no FILE, or a FILE alone")
    elif arguments.file in (None, "-") and from_terminal:
        raise UsageError("give a FILE, or --question and --context, or lines of JSON on stdin")


def check_evaluate(arguments: argparse.Namespace) -> bool:
    """Refuse arguments of `evaluate` that would have no effect.

    Returns:
        Whether a file of predictions is to be scored, not a model.

    Raises:
        UsageError: naming the argument.
    """
    is_file = arguments.model.endswith((".json", ".jsonl"))
    idle = _FOR_A_MODEL if is_file else _FOR_PREDICTIONS
    for name in idle:
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is for a model; {arguments.model} is a file of predictions"
                if is_file
                else f"{option} is for a file of predictions (.json, .jsonl); {arguments.model} is"
                " a model"
            )
    return is_file


def columns_of(items: Sequence[str]) -> Columns:
    """Read --column KEY=NAME.

    Raises:
        UsageError: naming the keys there are.
    """
    given = {}
    for item in items:
        key, _, name = item.partition("=")
        if key not in Columns.model_fields or not name.strip():
            keys = ", ".join(Columns.model_fields)
            raise UsageError(f"--column {item}: write KEY=NAME, where KEY is one of {keys}")
        given[key] = name
    return Columns(**given)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _model(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "model",
        metavar="RUN|MODEL",
        help=f"a run folder, a model folder, a hub id, package:NAME/SUBFOLDER{more}",
    )


def _answering(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--null-threshold",
        type=float,
        metavar="T",
        help="no answer above this null difference, in logits (as stored with the model)",
    )
    parser.add_argument(
        "--max-answer-length", type=count, metavar="N", help="in tokens (as stored)"
    )
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="windows per forward pass (as stored)"
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="KEY=NAME",
        help="name of a column: question, context, id, answer or answer_start",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (a GPU if any)")
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (all cores)")
