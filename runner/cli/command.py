"""The command: reads arguments, calls one verb, and turns errors into one sentence and an exit
code."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from runner import __version__
from runner.cli.predict import (
    Opening,
    UsageError,
    check_evaluate,
    check_predict,
    columns_of,
    count,
    evaluate_arguments,
    predict_arguments,
    report_arguments,
)
from runner.cli.slurm import add_verbs, comparison
from runner.errors import Interrupted, JobError, RunnerError
from runner.job.assets import check_assets
from runner.job.load import job_schema, load_job
from runner.job.schema import Job
from runner.job.sweep import Trial, load_trials, open_trials
from runner.run.folder import RunDir, new_stamp
from runner.run.resume import Where, check_finished, finished_run, open_run
from runner.utils import signals
from runner.utils.console import complain
from runner.utils.ranks import Rank, current_rank

EPILOG = """\
exit codes: 0 done, 2 command line, 64 job file, 65 data, model or checkpoint
refused, 69 asset missing offline, 70 our bug, 71 a rank died, got stuck or ran
out of memory, 72 SLURM refuses or does not answer, 73 run folder in use, 74
reading or writing failed, 75 stopped and saved: start it again, 76 loss or
gradients are no longer numbers, 78 an [expect] gate missed
"""

OUR_MISTAKE = "a mistake in spantune, not in your job; please report it with the lines above"


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
            complain(str(error))
        return error.exit_code
    except UsageError as error:
        complain(f"spantune: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        complain(OUR_MISTAKE)
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
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="this run's own folder; a run that was cut short there goes on",
    )
    folder.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew, whatever the folder holds"
    )
    parser.add_argument(
        "--threads", type=count, metavar="N", help="CPU threads of each rank (cores / ranks)"
    )


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--into", type=Path, metavar="DIR", help="folder of the new run (beside RUN)"
    )
    parser.add_argument(
        "--ranks", type=count, metavar="N", help="processes to start (as many as RUN had)"
    )


def _load(arguments: argparse.Namespace) -> Job:
    return load_job(arguments.job, arguments.set)


def _check(arguments: argparse.Namespace) -> int:
    job = _load(arguments)
    trials = load_trials(arguments.job, arguments.set)[1] if job.sweep else []
    if not arguments.data:
        swept = f", {len(trials)} trials" if trials else ""
        said = f"{job.name}: {job.model.name} on {job.data.train}{swept}"
        _say(f"{arguments.job}: no problems ({said})")
        return 0
    check_assets(job)
    from runner.train.preflight import check_data

    for line in check_data(job, arguments.ranks):
        _say(line)
    return 0


def _rank(arguments: argparse.Namespace) -> int:
    """Be one rank of a run. One rank speaks; the others follow with the same code a moment
    later."""
    rank = current_rank()
    attempt = None

    def leave_early(name: str) -> None:
        if attempt is not None:
            with suppress(RunnerError):
                attempt.end(Interrupted.exit_code)
        if rank.is_main:
            complain(f"stopped by {name} before training began; the same command begins again")
        _leave(Interrupted.exit_code)

    signals.listen(leave_early)
    try:
        job, where = _load(arguments), _where(arguments)
        if job.sweep is not None:
            raise JobError([f"{arguments.job}: has a [sweep]; start it with run or submit"])
        opened = open_run(job, where) if rank.is_main else finished_run(job, where)
        if isinstance(opened, RunDir):
            return _tell_finished(job, opened, speaks=rank.is_main)
        attempt = opened
        check_assets(job)
        from runner.distributed.engine import stop_distributed
        from runner.train.trainer import train

        train(job, attempt=attempt, threads=arguments.threads)
        with suppress(RuntimeError):  # the run is finished, whatever becomes of the other ranks
            stop_distributed()
        code = 0
    except RunnerError as error:
        code = error.exit_code
        if rank.is_main if error.speaks is None else error.speaks:
            complain(str(error))
        elif error.speaks is None:
            time.sleep(1)  # the launcher ends all ranks at the first failure: let rank 0 speak
    except Exception:
        code = RunnerError.exit_code
        traceback.print_exc()
        complain(f"rank {rank.index}: {OUR_MISTAKE}")
    if attempt is not None:
        with suppress(RunnerError):  # the next start then waits for a silence
            attempt.end(code)
    return _leave(code)


def _where(arguments: argparse.Namespace) -> Where:
    return Where(arguments.runs, arguments.run_dir, arguments.resume, arguments.restart)


def _tell_finished(job: Job, run: RunDir, *, speaks: bool) -> int:
    if speaks:
        _say(f"{run.path}: finished already; --restart begins anew")
    check_finished(job, run)
    return 0


def _leave(code: int) -> int:
    """End now with this code: at an ordinary exit the process group's threads may abort (seen)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(arguments: argparse.Namespace) -> int:
    """Check the job on this process, then start the ranks; of a sweep, those of each trial."""
    job, trials = load_trials(arguments.job, arguments.set)
    if trials:
        return _run_sweep(arguments, job, trials)
    finished = finished_run(job, _where(arguments))
    if finished is not None:
        return _tell_finished(job, finished, speaks=True)
    from runner.run.launch import launch

    passed = [arg for item in arguments.set for arg in ("--set", item)]
    passed += ["--runs", str(arguments.runs)]
    passed += ["--run-dir", str(arguments.run_dir)] if arguments.run_dir else []
    passed += ["--resume", str(arguments.resume)] if arguments.resume else []
    passed += ["--restart"] if arguments.restart else []
    passed += ["--threads", str(arguments.threads)] if arguments.threads else []
    return launch(["rank", arguments.job, *passed], arguments.ranks)


def _reproduce(arguments: argparse.Namespace) -> int:
    from runner.run.reproduce import check_reproduction, reproduce

    found = reproduce(arguments.run, into=arguments.into, ranks=arguments.ranks)
    _say("")
    _say(f"{found.run.path} and, again, {found.again.path}:")
    for line in found.lines():
        _say(line)
    check_reproduction(found)
    return 0


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


def _report(arguments: argparse.Namespace) -> int:
    if arguments.sweep:
        for folder in arguments.runs:
            for text in comparison(Path(folder)):
                _write(text)
        return 0
    from runner.report.report import write_comparison, write_report

    if len(arguments.runs) == 1:
        lines = write_report(arguments.runs[0], folder=arguments.output)
    else:
        lines = write_comparison(arguments.runs, arguments.output or Path())
    for line in lines:
        _say(line)
    return 0


def _run_sweep(arguments: argparse.Namespace, job: Job, trials: list[Trial]) -> int:
    from runner.run.launch import launch
    from runner.run.sweep import run_trials, sweep_code

    if arguments.resume or arguments.restart:
        raise JobError([f"{arguments.job}: a [sweep] goes on with --run-dir and its folder"])
    passed = ["--threads", str(arguments.threads)] if arguments.threads else []

    def start(run: RunDir) -> int:
        words = ["rank", str(run.job), "--run-dir", str(run.path), *passed]
        try:
            return launch(words, arguments.ranks)
        except RunnerError as error:
            complain(str(error))
            return error.exit_code

    folder = (arguments.run_dir or arguments.runs / job.name / new_stamp()).absolute()
    _say(f"{job.name}: {len(open_trials(folder, trials))} of {len(trials)} trials to run, {folder}")
    codes: dict[str, int] = {}
    for name, code in run_trials(folder, job, trials, start):
        _say(f"{name}: {'starts' if code is None else f'ended with exit code {code}'}")
        if code is not None:
            codes[name] = code
    for text in comparison(folder):
        _write(text)
    return sweep_code(codes.values())


def _tell(arguments: argparse.Namespace) -> int:
    for text in arguments.words(arguments):
        _write(text)
    return 0


def _schema(_: argparse.Namespace) -> int:
    _say(job_schema().removesuffix("\n"))
    return 0


def _say(text: str) -> None:
    _write(f"{text}\n")


def _write(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
