"""The command: reads arguments, calls one verb, and turns errors into one sentence and an exit
code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from runner import __version__
from runner.console import complain
from runner.errors import RunnerError
from runner.job import Job
from runner.jobfile import job_schema, load_job
from runner.ranks import current_rank

EPILOG = """\
exit codes: 0 done, 64 job file, 65 data or model refused, 69 asset missing offline,
70 our bug, 73 run folder taken, 74 reading or writing failed, 75 interrupted after a
checkpoint, 78 an [expect] gate missed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parse(list(sys.argv[1:] if argv is None else argv))
    rank = current_rank()
    try:
        return arguments.act(arguments)
    except RunnerError as error:
        if rank.is_main:
            complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        complain(
            "This is a mistake in spantune, not in your job; please report it with the lines above."
        )
        return 70


def _parse(argv: list[str]) -> argparse.Namespace:
    # The launcher puts --local_rank=N first; a bare JOB.toml means run.
    argv = [a for a in argv if not a.startswith(("--local_rank", "--local-rank"))]
    if argv and argv[0].endswith(".toml"):
        argv.insert(0, "run" if "RANK" not in os.environ else "rank")
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
        "--ranks", type=_count, default=1, metavar="N", help="ranks that the job is to run on (1)"
    )
    check.set_defaults(act=_check)

    run = verbs.add_parser(
        "run", help="train; starts deepspeed itself (a bare JOB.toml means the same)"
    )
    _job_arguments(run)
    _run_arguments(run)
    run.add_argument(
        "--ranks", type=_count, metavar="N", help="processes to start: GPUs here, or CPU ranks"
    )
    run.set_defaults(act=_run)

    rank = verbs.add_parser("rank")  # what deepspeed, torchrun or srun start on each rank
    _job_arguments(rank)
    _run_arguments(rank)
    rank.set_defaults(act=_rank)

    schema = verbs.add_parser("schema", help="print the JSON Schema of a job file")
    schema.set_defaults(act=_schema)
    return parser.parse_args(argv)


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.toml", help="the job file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override one value, e.g. train.epochs=2",
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (runs)")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="this run's own folder, instead of a new one"
    )
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="CPU threads of each rank (cores / ranks)"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _load(arguments: argparse.Namespace) -> Job:
    return load_job(arguments.job, arguments.set)


def _check(arguments: argparse.Namespace) -> int:
    job = _load(arguments)
    if not arguments.data:
        print(f"{arguments.job}: no problems ({job.name}: {job.model.name} on {job.data.train})")
        return 0
    from runner.check import check_data

    for line in check_data(job, arguments.ranks):
        print(line)
    return 0


def _rank(arguments: argparse.Namespace) -> int:
    job = _load(arguments)
    from runner.train import train

    train(job, runs=arguments.runs, run_dir=arguments.run_dir, threads=arguments.threads)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    """Check the job on this process, then let deepspeed start the ranks."""
    _load(arguments)
    from runner.launch import launch

    passed = [arg for item in arguments.set for arg in ("--set", item)]
    passed += ["--runs", str(arguments.runs)]
    passed += ["--run-dir", str(arguments.run_dir)] if arguments.run_dir else []
    passed += ["--threads", str(arguments.threads)] if arguments.threads else []
    return launch([arguments.job, *passed], arguments.ranks)


def _schema(_: argparse.Namespace) -> int:
    print(job_schema(), end="")
    return 0
