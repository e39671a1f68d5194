"""The command: reads arguments, calls one verb, and turns errors into one sentence and an exit
code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

from runner import __version__
from runner.cli.output import _write, count
from runner.cli.predict import (
    _evaluate,
    _predict,
    evaluate_arguments,
    predict_arguments,
)
from runner.cli.report import _report, report_arguments
from runner.cli.run import (
    OUR_MISTAKE,
    _check,
    _job_arguments,
    _rank,
    _reproduce,
    _reproduce_arguments,
    _run,
    _run_arguments,
    _schema,
)
from runner.cli.slurm import add_verbs
from runner.errors import RunnerError, UsageError
from runner.utils.console import print_error
from runner.utils.ranks import Rank, current_rank

EPILOG = """\
exit codes: 0 done, 2 command line, 64 job file, 65 data, model or checkpoint
refused, 69 asset missing offline, 70 our bug, 71 a rank died, got stuck or ran
out of memory, 72 SLURM refuses or does not answer, 73 run folder in use, 74
reading or writing failed, 75 stopped and saved: start it again, 76 loss or
gradients are no longer numbers, 78 an [expect] gate missed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot spell is no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    speaks = True
    try:
        rank = current_rank()
        speaks = rank.is_main
        arguments = _parse(list(sys.argv[1:] if argv is None else argv), rank)
        return arguments.act(arguments)
    except RunnerError as error:
        if speaks:
            print_error(str(error))
        return error.exit_code
    except UsageError as error:
        print_error(f"spantune: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        print_error(OUR_MISTAKE)
        return RunnerError.exit_code


def _parse(argv: list[str], rank: Rank) -> argparse.Namespace:
    # The launcher puts --local_rank=N first; a bare JOB.toml means run, or, where a launcher has
    # started us already, be one rank of a run.
    argv = [a for a in argv if not a.startswith(("--local_rank", "--local-rank"))]
    if argv and argv[0].endswith(".toml"):
        argv.insert(0, "rank" if "RANK" in os.environ or rank.world > 1 else "run")
    parser = argparse.ArgumentParser(
        prog="spantune",
        description="Fine-tune extractive question-answering models from a job file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spantune {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    check = verbs.add_parser(
        "check", help="every problem of a job file; --data also reads data and tokenizer"
    )
    _job_arguments(check)
    check.add_argument(
        "--data",
        action="store_true",
        help="also read the data, the tokenizer and the configuration",
    )
    check.add_argument(
        "--ranks", type=count, default=1, metavar="N", help="ranks that the job is to run on (1)"
    )
    check.set_defaults(act=_check)

    run = verbs.add_parser(
        "run", help="train, or go on; starts the ranks itself (as a bare JOB.toml)"
    )
    _job_arguments(run)
    _run_arguments(run)
    run.add_argument(
        "--ranks", type=count, metavar="N", help="processes to start: GPUs here, or CPU ranks"
    )
    run.set_defaults(act=_run)

    one_rank = verbs.add_parser("rank")  # what deepspeed, torchrun or srun start on each rank
    _job_arguments(one_rank)
    _run_arguments(one_rank)
    one_rank.set_defaults(act=_rank)

    predict = verbs.add_parser(
        "predict", help="answer questions from a file, from stdin, or one given here"
    )
    predict_arguments(predict)
    predict.set_defaults(act=_predict)

    evaluate = verbs.add_parser(
        "evaluate", help="exact match and F1 of a finished model on other data"
    )
    evaluate_arguments(evaluate)
    evaluate.set_defaults(act=_evaluate)

    report = verbs.add_parser(
        "report", help="a run's page: scores, curves, errors; or several runs compared"
    )
    report_arguments(report)
    report.set_defaults(act=_report)

    again = verbs.add_parser(
        "reproduce", help="run a finished run again from its own record and compare the two"
    )
    _reproduce_arguments(again)
    again.set_defaults(act=_reproduce)
    add_verbs(verbs, _tell)

    schema = verbs.add_parser("schema", help="print the JSON Schema of a job file")
    schema.set_defaults(act=_schema)
    arguments = parser.parse_args(argv)
    arguments.typed = argv
    return arguments


def _tell(arguments: argparse.Namespace) -> int:
    for text in arguments.words(arguments):
        _write(text)
    return 0
