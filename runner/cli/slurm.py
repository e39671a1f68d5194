"""`submit`, `status`, `logs`, `cancel`, `may-requeue`: runs on a cluster, from its login node."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from runner.cli.output import (
    RUNS_OPTION,
    SET_OPTION,
    count,
    write,
    write_data,
    write_line,
    write_table,
)
from runner.errors import JobError, RunnerError, printable, printable_lines
from runner.run.attempts import check_budget
from runner.run.folder import RunDir
from runner.slurm.control import cancel_runs, follow_log
from runner.slurm.request import SubmitRequest, node_command, prepare
from runner.slurm.status import RunStatus, find_runs, named_runs, run_statuses, table_rows
from runner.slurm.submit import draft, submit_run, submit_sweep
from runner.utils.files import below_here
from runner.utils.tables import rich_table


def add_submit(verbs: Any) -> None:
    parser = verbs.add_parser("submit", help="give jobs to SLURM; --dry-run shows the batch script")
    parser.add_argument("jobs", metavar="JOB.toml", nargs="+", help="the job files")
    help_text = "override one value in each of them, e.g. slurm.partition=debug"
    parser.add_argument("--set", **SET_OPTION, help=help_text)
    parser.add_argument("--runs", **RUNS_OPTION)
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="the run's or sweep's own folder; what was cut short there goes on",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, no more")
    parser.set_defaults(verb=run_submit)


def run_submit(arguments: argparse.Namespace) -> int:
    if arguments.run_dir is not None and len(arguments.jobs) > 1:
        raise JobError(["--run-dir: takes the run of one job, not of several"])
    words = (word for word in arguments.command_line if word != "--dry-run")
    written_by = shlex.join(["spantune", *words])
    # All are checked before the first is submitted.
    requests = [prepare(path, arguments.set, written_by) for path in arguments.jobs]
    for request in requests:
        if arguments.dry_run:
            script = draft(request, arguments.runs, arguments.run_dir)
            if script is None:
                write(_finished(request, arguments.run_dir))
            else:
                write_data(script)
        else:
            _submit(request, arguments.runs, arguments.run_dir)
    return 0


def _submit(request: SubmitRequest, root: Path, run_dir: Path | None) -> None:
    name = request.job.name
    if request.section.container:  # a command that the job brings, with the user's rights
        write_line(f"{name}: each rank is run by: {shlex.join(node_command(request.section)[:-2])}")
    submitted = (submit_sweep if request.trials else submit_run)(request, root, run_dir)
    if submitted is None:
        write(_finished(request, run_dir))
        return
    array = f", an array of {submitted.runs} trials" if request.trials else ""
    write_line(f"{name}: job {submitted.job_id}{array}, {request.where()}")
    if submitted.doubt:
        write_line(f"  SLURM could not start it on the nodes as they are now: {submitted.doubt}")
    verbs = ("status {}", "cancel {}", "report --sweep {}")
    for verb in verbs if request.trials else ("status {}", "logs {} -f", "cancel {}"):
        write_line(f"  spantune {verb.format(shlex.quote(below_here(submitted.folder)))}")
    for note in request.notes():
        write_line(f"  {note}")


def _finished(request: SubmitRequest, run_dir: Path | None) -> str:
    return f"{request.job.name}: finished already, {run_dir}\n"


def add_status(verbs: Any) -> None:
    parser = verbs.add_parser("status", help="how far runs are, from their folders and from SLURM")
    parser.add_argument("named", metavar="RUN", nargs="*", type=Path, help="run folders (all)")
    parser.add_argument("--runs", **RUNS_OPTION)
    parser.add_argument(
        "--watch", type=count, nargs="?", const=10, metavar="SECONDS", help="look again (10)"
    )
    parser.set_defaults(verb=run_status)


def run_status(arguments: argparse.Namespace) -> int:
    table, statuses = _status_table(arguments)
    if arguments.watch and not _are_over(statuses):
        with Live(table, auto_refresh=False, transient=True) as live:
            while not _are_over(statuses):
                time.sleep(arguments.watch)
                table, statuses = _status_table(arguments)
                live.update(table, refresh=True)
    write_table(table)
    for run in (status.run for status in statuses if status.state == "preempted"):
        job, folder = (shlex.quote(below_here(path)) for path in (run.job, run.path))
        write_line(f"preempted; go on with: spantune submit {job} --run-dir {folder}")
    return 0


def _are_over(statuses: Sequence[RunStatus]) -> bool:
    return all(status.over for status in statuses)


def _status_table(arguments: argparse.Namespace) -> tuple[RenderableType, Sequence[RunStatus]]:
    """The table of all runs that are asked for, and where each of them stands."""
    statuses, silence = run_statuses(find_runs(arguments.named, arguments.runs))
    rows = table_rows(statuses, arguments.runs)
    table = rich_table("", rows) if rows else Text(printable(f"no runs in {arguments.runs}"))
    messages = _messages(statuses, arguments.runs)
    return Group(*([Text(silence)] if silence else []), table, *messages), statuses


def _messages(statuses: Sequence[RunStatus], root: Path) -> list[Text]:
    """Why runs are over: of one run all that it says, of several a line each."""
    if len(statuses) == 1:
        return [Text(printable_lines(status.message)) for status in statuses if status.message]
    firsts = [
        (status.name(root), status.message.split("\n")[0]) for status in statuses if status.message
    ]
    return [
        Text(printable(f"{name}: {first}"), no_wrap=True, overflow="ellipsis")
        for name, first in firsts
    ]


def add_logs(verbs: Any) -> None:
    parser = verbs.add_parser("logs", help="what a run says")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    parser.set_defaults(verb=run_logs)


def run_logs(arguments: argparse.Namespace) -> int:
    for text in follow_log(RunDir.open(arguments.run), forever=arguments.follow):
        write(text)
    return 0


def add_cancel(verbs: Any) -> None:
    parser = verbs.add_parser("cancel", help="tell runs to save and end")
    parser.add_argument(
        "named", metavar="RUN", nargs="+", type=Path, help="run folders, or those of sweeps"
    )
    parser.set_defaults(verb=run_cancel)


def run_cancel(arguments: argparse.Namespace) -> int:
    failures: list[RunnerError] = []
    for run, outcome in cancel_runs(named_runs(arguments.named)):
        if isinstance(outcome, RunnerError):
            failures.append(outcome)
        else:
            write_line(f"{below_here(run.path)}: {outcome}")
    if failures:
        raise type(failures[0])("\n".join(dict.fromkeys(map(str, failures))))
    return 0


def add_may_requeue(verbs: Any) -> None:
    parser = verbs.add_parser("may-requeue")  # asked by the batch script
    parser.add_argument("run", type=Path)
    parser.set_defaults(verb=run_may_requeue)


def run_may_requeue(arguments: argparse.Namespace) -> int:
    check_budget(RunDir.open(arguments.run))
    return 0
