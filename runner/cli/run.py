"""`check`, `run`, `rank`, `reproduce`, `schema`: their arguments, and what each does."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from runner.cli.output import _say, _write, count
from runner.cli.report import comparison
from runner.errors import Interrupted, JobError, RunnerError
from runner.job.assets import check_assets
from runner.job.load import job_schema, load_job
from runner.job.schema import Job
from runner.job.sweep import Trial, load_trials
from runner.run.folder import RunDir, new_stamp
from runner.run.resume import StartOptions, acquire_run, check_finished, finished_run
from runner.run.sweep import open_trials
from runner.utils import signals
from runner.utils.console import print_error
from runner.utils.ranks import current_rank

OUR_MISTAKE = "a mistake in spantune, not in your job; please report it with the lines above"


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
                attempt.release(Interrupted.exit_code)
        if rank.is_main:
            print_error(f"stopped by {name} before training began; the same command begins again")
        _leave(Interrupted.exit_code)

    signals.listen(leave_early)
    try:
        job, where = _load(arguments), _where(arguments)
        if job.sweep is not None:
            raise JobError([f"{arguments.job}: has a [sweep]; start it with run or submit"])
        opened = acquire_run(job, where) if rank.is_main else finished_run(job, where)
        if isinstance(opened, RunDir):
            return _tell_finished(job, opened, speaks=rank.is_main)
        attempt = opened
        check_assets(job)
        from runner.distributed.process_group import stop_distributed
        from runner.train.trainer import train

        train(job, attempt=attempt, threads=arguments.threads)
        with suppress(RuntimeError):  # the run is finished, whatever becomes of the other ranks
            stop_distributed()
        code = 0
    except RunnerError as error:
        code = error.exit_code
        if rank.is_main if error.speaks is None else error.speaks:
            print_error(str(error))
        elif error.speaks is None:
            time.sleep(1)  # the launcher ends all ranks at the first failure: let rank 0 speak
    except Exception:
        code = RunnerError.exit_code
        traceback.print_exc()
        print_error(f"rank {rank.index}: {OUR_MISTAKE}")
    if attempt is not None:
        with suppress(RunnerError):  # the next start then waits for a silence
            attempt.release(code)
    return _leave(code)


def _where(arguments: argparse.Namespace) -> StartOptions:
    return StartOptions(arguments.runs, arguments.run_dir, arguments.resume, arguments.restart)


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
            print_error(str(error))
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


def _schema(_: argparse.Namespace) -> int:
    _say(job_schema().removesuffix("\n"))
    return 0
