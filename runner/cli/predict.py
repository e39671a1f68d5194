"""Arguments of the verbs that answer, score and report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.cli.output import _say, count
from runner.errors import UsageError
from runner.job.inference import Opening
from runner.job.schema import Columns

_FOR_A_MODEL = ("output", "null_threshold", "max_answer_length", "batch_size", "device", "threads")

_FOR_PREDICTIONS = ("no_answer", "no_answer_threshold")


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


def _predict(arguments: argparse.Namespace) -> int:
    check_predict(arguments, from_terminal=sys.stdin.isatty())
    columns = columns_of(arguments.column)
    from runner.predict.stream import predict_questions

    source: str | int | tuple[str, str] = arguments.file or "-"
    if arguments.question is not None:
        source = (arguments.question, arguments.context)
    elif source == "-":
        source = sys.stdin.fileno()
    predict_questions(
        Opening.of(arguments),
        source,
        columns,
        on_bad_row=arguments.on_bad_row,
        listed=arguments.n_best,
        output=arguments.output,
        say=_say,
    )
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    is_file, columns = check_evaluate(arguments), columns_of(arguments.column)
    from runner.data.dataset import load_dataset

    dataset = load_dataset(
        arguments.data, columns=columns, unanswerable=True, on_bad_row=arguments.on_bad_row
    )
    v2 = arguments.v2 or any(not example.answers for example in dataset.examples)
    if is_file:
        from runner.eval.score_file import file_lines, score_file

        result = score_file(
            Path(arguments.model),
            dataset,
            v2=v2,
            no_answer=arguments.no_answer,
            threshold=arguments.no_answer_threshold,
            seed=arguments.seed,
        )
        lines = file_lines(result)
    else:
        from runner.predict.evaluate import evaluate_model, evaluation_lines

        result, folder = evaluate_model(
            Opening.of(arguments), dataset, v2=v2, seed=arguments.seed, output=arguments.output
        )
        lines = evaluation_lines(arguments.data, result, len(dataset.dropped))
        if folder is not None:
            lines.append(f"Written to {folder}: report.html, predictions.jsonl, result.json")
    for line in [json.dumps(result, indent=2, ensure_ascii=False)] if arguments.json else lines:
        _say(line)
    return 0
