"""`check`, `run`, `rank`, `reproduce`, `schema`: what trains, here and now."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.cli.output import (
    RUNS_OPTION,
    SET_OPTION,
    count,
    write_data,
    write_line,
    write_table,
)
from runner.cli.report import write_trials
from runner.errors import Interrupted, JobError, RunnerError
from runner.job.assets import check_assets
from runner.job.load import job_schema, load_job
from runner.job.messages import doubts
from runner.job.schema import Job, batch_layout
from runner.job.sweep import Trial, load_trials
from runner.run.folder import RunDir
from runner.run.resume import StartOptions, acquire_run, check_finished, finished_run
from runner.run.sweep import open_trials
from runner.utils import signals
from runner.utils.console import print_error
from runner.utils.files import storage_errors
from runner.utils.processes import collector_paused
from runner.utils.ranks import current_rank
from runner.utils.tables import rich_table

OUR_MISTAKE = "a mistake in spantune, not in your job; please report it with the lines above"

# Options of `run` that it hands on to its ranks, which have the same.
RANK_OPTIONS: dict[str, dict[str, Any]] = {
    "--set": SET_OPTION | {"help": "override one value, e.g. train.epochs=2"},
    "--runs": RUNS_OPTION,
    "--run-dir": {
        "type": Path,
        "metavar": "DIR",
        "help": "this run's own folder; a run that was cut short there goes on",
    },
    "--resume": {"type": Path, "metavar": "RUN", "help": "go on with this run"},
    "--restart": {"action": "store_true", "help": "begin anew, whatever the folder holds"},
    "--threads": {
        "type": count,
        "metavar": "N",
        "help": "CPU threads of each rank (cores / ranks)",
    },
    "--verbose": {"action": "store_true", "help": "also say how the run computes, as log.txt does"},
}
SHORT = {"--verbose": ("-v",)}
ONE_FOLDER = ("--run-dir", "--resume")  # of which only one is given


def add_check(verbs: Any) -> None:
    parser = verbs.add_parser(
        "check", help="every problem of a job file; --data also reads data and tokenizer"
    )
    _add_job(parser)
    parser.add_argument("--set", **RANK_OPTIONS["--set"])
    parser.add_argument(
        "--data",
        action="store_true",
        help="also read the data, the tokenizer and the configuration",
    )
    parser.add_argument(
        "--ranks", type=count, default=1, metavar="N", help="ranks that the job is to run on (1)"
    )
    parser.set_defaults(verb=run_check)


def run_check(arguments: argparse.Namespace) -> int:
    job = load_job(arguments.job, arguments.set)
    trials = load_trials(arguments.job, arguments.set)[1] if job.sweep else []
    if not arguments.data:
        swept = f", {len(trials)} trials" if trials else ""
        trained = job.data.described(job.data.trained)
        summary = f"{job.name}: {job.model.name} on {trained}{swept}"
        write_line(f"{arguments.job}: no problems ({summary})")
        _write_doubts(job)
        return 0
    batch_layout(job.train, arguments.ranks)
    check_assets(job)
    _write_doubts(job)
    from runner.train.preflight import check_data

    for part in check_data(job, arguments.ranks):
        if isinstance(part, str):
            write_line(part)
        else:
            write_table(rich_table("", part))
    return 0


def _write_doubts(job: Job) -> None:
    for line in doubts(job):
        write_line(f"note: {line}")


def add_run(verbs: Any) -> None:
    parser = verbs.add_parser(
        "run", help="train, or go on; starts the ranks itself (as a bare JOB.toml)"
    )
    _add_job(parser)
    _add_rank_options(parser)
    parser.add_argument(
        "--ranks", type=count, metavar="N", help="processes to start: GPUs here, or CPU ranks"
    )
    parser.set_defaults(verb=run_run)


def run_run(arguments: argparse.Namespace) -> int:
    """Check the job on this process, then start the ranks; of a sweep, those of each trial."""
    job, trials = load_trials(arguments.job, arguments.set)
    _write_doubts(job)
    if trials:
        return _run_sweep(arguments, job, trials)
    finished = finished_run(job, _start_options(arguments))
    if finished is not None:
        return _report_finished(job, finished, speaks=True)
    from runner.run.launch import launch

    _write_start(job.name, arguments.ranks)
    return launch(["rank", arguments.job, *_spelled(arguments, *RANK_OPTIONS)], arguments.ranks)


def _write_start(name: str, ranks: int | None) -> None:
    """Say at once that something happens: a rank's own first line takes seconds."""
    from runner.run.launch import visible_gpus

    count = ranks or visible_gpus() or 1
    write_line(f"{name}: starting {count} rank{'s' * (count != 1)}")


def _run_sweep(arguments: argparse.Namespace, job: Job, trials: list[Trial]) -> int:
    from runner.run.launch import launch
    from runner.run.sweep import run_trials, sweep_code

    if arguments.resume or arguments.restart:
        raise JobError([f"{arguments.job}: a [sweep] goes on with --run-dir and its folder"])

    codes: dict[str, int] = {}

    def start(run: RunDir) -> int:
        command = ["rank", str(run.job), "--run-dir", str(run.path)]
        try:
            words = [*command, *_spelled(arguments, "--threads", "--verbose")]
            # What earlier trials took is no start-up of this one.
            return launch(words, arguments.ranks, since=time.time() if codes else None)
        except RunnerError as error:
            print_error(str(error))
            return error.exit_code

    folder = (arguments.run_dir or RunDir.create(arguments.runs, job.name).path).absolute()
    to_run = len(open_trials(folder, trials))
    write_line(f"{job.name}: {to_run} of {len(trials)} trials to run, {folder}")
    for name, code in run_trials(folder, job, trials, start):
        write_line(f"{name}: {'starts' if code is None else f'ended with exit code {code}'}")
        if code is not None:
            codes[name] = code
    write_trials(folder)
    return sweep_code(codes.values())


def add_rank(verbs: Any) -> None:
    parser = verbs.add_parser("rank")  # what deepspeed, torchrun or srun start on each rank
    _add_job(parser)
    _add_rank_options(parser)
    parser.set_defaults(verb=run_rank)


def run_rank(arguments: argparse.Namespace) -> int:
    """Be one rank of a run. One rank speaks; the others follow with the same code a moment
    later."""
    rank = current_rank()
    lease = None

    def exit_early(name: str) -> None:
        words = f"stopped by {name} before training began; the same command begins again"
        if lease is not None:
            with suppress(RunnerError):
                lease.release(Interrupted.exit_code, words)
        if rank.is_main:
            print_error(words)
        _exit(Interrupted.exit_code)

    signals.listen(exit_early)
    signals.follow_launcher()
    code, message, words, waits = 0, "", "", False
    try:
        with storage_errors():
            job, options = load_job(arguments.job, arguments.set), _start_options(arguments)
            if job.sweep is not None:
                raise JobError([f"{arguments.job}: has a [sweep]; start it with run or submit"])
            # Only rank 0 holds the lease; the others see for themselves whether the run is
            # finished.
            acquired = acquire_run(job, options) if rank.is_main else finished_run(job, options)
            if isinstance(acquired, RunDir):
                return _report_finished(job, acquired, speaks=rank.is_main)
            lease = acquired
            check_assets(job)
            with collector_paused(for_good=True):
                from runner.distributed.process_group import stop_distributed
                from runner.train.trainer import train

            train(job, lease=lease, threads=arguments.threads, verbose=arguments.verbose)
            with suppress(RuntimeError):  # the run is finished, whatever becomes of other ranks
                stop_distributed()
    except RunnerError as error:
        code, message, waits = error.exit_code, str(error), error.speaks is None
        if rank.is_main if error.speaks is None else error.speaks:
            words = message
    except Exception as error:
        code = RunnerError.exit_code
        said = traceback.format_exception_only(error)[0].splitlines()[0]
        message = f"{said}; a mistake in spantune, not in your job: its traceback is in log.txt"
        words = f"{traceback.format_exc()}rank {rank.index}: {OUR_MISTAKE}"
    if lease is not None:
        with suppress(RunnerError):  # the next start then waits for a silence
            lease.release(code, message, words)
    if words:  # only now: printing may fail, or wait for ever
        print_error(words)
    elif waits:
        time.sleep(1)  # the launcher ends all ranks at the first failure: let rank 0 speak
    return _exit(code)


def _exit(code: int) -> int:
    """End now with this code: at an ordinary exit the process group's threads may abort (seen)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # it is not there, full, or gone
            stream.flush()
    os._exit(code)


def add_reproduce(verbs: Any) -> None:
    parser = verbs.add_parser(
        "reproduce", help="run a finished run again from its own record and compare the two"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--into", type=Path, metavar="DIR", help="folder of the new run (beside RUN)"
    )
    parser.add_argument(
        "--ranks", type=count, metavar="N", help="processes to start (as many as RUN had)"
    )
    parser.set_defaults(verb=run_reproduce)


def run_reproduce(arguments: argparse.Namespace) -> int:
    from runner.run.reproduce import check_reproduction, reproduce

    reproduction = reproduce(arguments.run, into=arguments.into, ranks=arguments.ranks)
    write_line("")
    write_line(f"{reproduction.run.path} and, again, {reproduction.again.path}:")
    for line in reproduction.lines():
        write_line(line)
    check_reproduction(reproduction)
    return 0


def add_schema(verbs: Any) -> None:
    parser = verbs.add_parser("schema", help="print the JSON Schema of a job file")
    parser.set_defaults(verb=run_schema)


def run_schema(_: argparse.Namespace) -> int:
    write_data(job_schema())
    return 0


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.toml", help="the job file")


def _add_rank_options(parser: argparse.ArgumentParser) -> None:
    one_folder = parser.add_mutually_exclusive_group()
    for flag, settings in RANK_OPTIONS.items():
        group = one_folder if flag in ONE_FOLDER else parser
        group.add_argument(*SHORT.get(flag, ()), flag, **settings)


def _spelled(arguments: argparse.Namespace, *flags: str) -> list[str]:
    """Options as they were given, for another command line."""
    words: list[str] = []
    for flag in flags:
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
        if value is True:
            words.append(flag)
        elif value not in (None, False):
            for item in value if isinstance(value, list) else [value]:
                words += [flag, str(item)]
    return words


def _start_options(arguments: argparse.Namespace) -> StartOptions:
    return StartOptions(arguments.runs, arguments.run_dir, arguments.resume, arguments.restart)


def _report_finished(job: Job, run: RunDir, *, speaks: bool) -> int:
    if speaks:
        write_line(f"{run.path}: finished already; --restart begins anew")
        _remove_checkpoints(job, run)
    check_finished(job, run)
    return 0


def _remove_checkpoints(job: Job, run: RunDir) -> None:
    """End what the run's own end began, or what the job asks for by now."""
    from runner.checkpoint.prune import prune

    try:
        found = prune(run, job.train.keep_checkpoints)
    except RunnerError as error:  # the run is finished, with or without them
        write_line(f"checkpoints stay: {error}")
        return
    if found.names:
        write_line(f"removed {found} (train.keep_checkpoints)")
