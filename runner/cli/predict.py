"""`predict` and `evaluate`: a finished model at work on other questions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from runner.cli.output import count, write_data, write_line
from runner.errors import StorageError, UsageError
from runner.job.schema import Columns, Language

# Arguments of `evaluate` that only a model has a use for, and only a file of predictions.
FOR_A_MODEL = ("output", "null_threshold", "max_answer_length", "batch_size", "device", "threads")
FOR_A_FILE = ("no_answer", "no_answer_threshold")


def add_predict(verbs: Any) -> None:
    parser = verbs.add_parser(
        "predict", help="answer questions from a file, from stdin, or one given here"
    )
    _add_model(parser)
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="a file of questions of any format that is read, perhaps a slice of it: dev.json[:10];"
        " absent or -: lines of JSON from stdin, answered as they come",
    )
    parser.add_argument("--question", metavar="TEXT", help="one question, instead of a file")
    parser.add_argument("--context", metavar="TEXT", help="the text that holds its answer")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the answers there, all or none"
    )
    parser.add_argument(
        "--json", action="store_true", help="as a line of JSON, which all but a terminal get anyway"
    )
    _add_bad_rows(parser, "end at a question that cannot be asked, or say so and go on (fail)")
    parser.add_argument(
        "--n-best", type=count, default=3, metavar="N", help="candidates listed per question (3)"
    )
    _add_inference(parser)
    parser.set_defaults(verb=run_predict)


def run_predict(arguments: argparse.Namespace) -> int:
    _check_predict(arguments, from_terminal=sys.stdin is not None and sys.stdin.isatty())
    columns = _columns(arguments.column)
    from runner.predict.locate import locate_model
    from runner.predict.questions import Questions

    source: str | int | tuple[str, str] = arguments.file or "-"
    if arguments.question is not None:
        source = (arguments.question, arguments.context)
    elif source == "-":
        if sys.stdin is None:
            raise StorageError("stdin: is closed; give a FILE, or --question and --context")
        source = sys.stdin.fileno()
    # What is wrong here must not wait for torch and the model.
    questions = Questions.find(source, columns, arguments.on_bad_row)
    locate_model(arguments.model)
    from runner.predict.stream import in_words, predict_questions

    is_read_here = sys.stdout is not None and sys.stdout.isatty()
    counts = predict_questions(
        _model_loader(arguments, listed=arguments.n_best),
        questions,
        on_bad_row=arguments.on_bad_row,
        output=arguments.output,
        say=lambda line: write_data(f"{line}\n"),
        spell=in_words if _asks_one(arguments) and is_read_here else None,
    )
    if arguments.output is not None:
        answers = f"{counts.answered} answer{'s' * (counts.answered != 1)}"
        write_line(f"{answers} written to {arguments.output}")
    return 0


def _asks_one(arguments: argparse.Namespace) -> bool:
    """Whether a person asks a question, who need not read JSON."""
    return arguments.question is not None and not arguments.json and arguments.output is None


def _check_predict(arguments: argparse.Namespace, *, from_terminal: bool) -> None:
    """Refuse arguments that do not go together; at a terminal nobody means to type JSON."""
    parts = arguments.question, arguments.context
    if any(part is not None for part in parts):
        if None in parts or arguments.file:
            raise UsageError("give both --question and --context and no FILE, or a FILE alone")
    elif arguments.file in (None, "-") and from_terminal:
        raise UsageError("give a FILE, or --question and --context, or lines of JSON on stdin")


def add_evaluate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "evaluate", help="exact match and F1 of a finished model on other data"
    )
    _add_model(parser, "; or predictions in a .json or .jsonl file")
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
    ways = "refuse data with wrong rows, leave these out, or mend their answers (fail)"
    _add_bad_rows(parser, ways, "repair")
    parser.add_argument(
        "--no-answer-text",
        metavar="TEXT",
        help="an answer in the data that means that there is none, such as ANSWERNOTFOUND",
    )
    parser.add_argument(
        "--language",
        choices=get_args(Language),
        metavar="CODE",
        help="whose words are compared: en as in SQuAD's script, de, zh ... after MLQA's rules (as"
        " stored with the model; en)",
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
    _add_inference(parser)
    parser.set_defaults(verb=run_evaluate)


def run_evaluate(arguments: argparse.Namespace) -> int:
    is_file = arguments.model.endswith((".json", ".jsonl"))
    _check_evaluate(arguments, is_file=is_file)
    columns = _columns(arguments.column)
    from runner.data.dataset import load_dataset

    dataset = load_dataset(
        arguments.data,
        columns=columns,
        unanswerable=True,
        on_bad_row=arguments.on_bad_row,
        no_answer=arguments.no_answer_text,
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
            language=arguments.language or "en",
            seed=arguments.seed,
        )
        lines = file_lines(result)
    else:
        from runner.predict.evaluate import evaluate_model, evaluation_lines

        result, folder = evaluate_model(
            _model_loader(arguments, listed=None),
            dataset,
            on_bad_row=arguments.on_bad_row,
            v2=v2,
            language=arguments.language,
            seed=arguments.seed,
            output=arguments.output,
        )
        lines = evaluation_lines(arguments.data, result)
        if folder is not None:
            lines.append(f"Written to {folder}: report.html, predictions.jsonl, result.json")
    lines += dataset.contradictions
    if arguments.json:
        write_data(f"{json.dumps(result, indent=2, ensure_ascii=False)}\n")
    else:
        for line in lines:
            write_line(line)
    return 0


def _check_evaluate(arguments: argparse.Namespace, *, is_file: bool) -> None:
    """Refuse arguments that would have no effect."""
    for name in FOR_A_MODEL if is_file else FOR_A_FILE:
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is for a model; {arguments.model} is a file of predictions"
                if is_file
                else f"{option} is for a file of predictions (.json, .jsonl); {arguments.model} is"
                " a model"
            )


def _columns(items: Sequence[str]) -> Columns:
    """Read --column KEY=NAME."""
    given = {}
    for item in items:
        key, _, name = item.partition("=")
        if key not in Columns.model_fields or not name.strip():
            keys = ", ".join(Columns.model_fields)
            raise UsageError(f"--column {item}: write KEY=NAME, where KEY is one of {keys}")
        given[key] = name
    return Columns(**given)


def _model_loader(arguments: argparse.Namespace, *, listed: int | None) -> Callable[[], Any]:
    """Opens the model as the arguments say: called once it is clear that there is something for it
    to do, for that takes seconds."""
    from runner.predict.predictor import open_model

    return partial(
        open_model,
        arguments.model,
        device=arguments.device,
        threads=arguments.threads,
        null_threshold=arguments.null_threshold,
        max_answer_length=arguments.max_answer_length,
        batch_size=arguments.batch_size,
        listed=listed,
    )


def _add_model(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "model",
        metavar="RUN|MODEL",
        help=f"a run folder, a model folder, a hub id, package:NAME/SUBFOLDER{more}",
    )


def _add_bad_rows(parser: argparse.ArgumentParser, help_text: str, *more: str) -> None:
    ways = ("fail", "drop", *more)
    parser.add_argument("--on-bad-row", choices=ways, default="fail", help=help_text)


def _add_inference(parser: argparse.ArgumentParser) -> None:
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
