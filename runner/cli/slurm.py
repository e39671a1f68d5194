"""The verbs of the desk for runs on a cluster: their arguments, and what each of them says."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from runner.cli.output import Words, _drawn
from runner.errors import JobError, RunnerError
from runner.run.attempts import check_budget
from runner.run.folder import RunDir
from runner.slurm.control import cancel_runs, follow_log
from runner.slurm.request import SubmitRequest, prepare
from runner.slurm.status import find_runs, named_runs, run_statuses, table_rows
from runner.slurm.submit import draft, submit_run, submit_sweep
from runner.utils.files import below_here
from runner.utils.tables import rich_table


def add_verbs(verbs: Any, act: Callable[[argparse.Namespace], int]) -> None:
    """Add the verbs to the command.

    Args:
        verbs: argparse's subparsers.
        act: prints what `arguments.words(arguments)` yields, and returns the exit code.
    """
    every = {"type": Path, "default": Path("runs"), "help": "folder of all runs (runs)"}

    submit = verbs.add_parser("submit", help="give jobs to SLURM; --dry-run shows the batch script")
    submit.add_argument("jobs", metavar="JOB.toml", nargs="+", help="the job files")
    submit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override one value in each of them, e.g. slurm.partition=debug",
    )
    submit.add_argument("--runs", **every)
    submit.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="the run's or sweep's own folder; what was cut short there goes on",
    )
    submit.add_argument("--dry-run", action="store_true", help="print the batch script, no more")
    submit.set_defaults(act=act, words=_submit)

    status = verbs.add_parser("status", help="how far runs are, from their folders and from SLURM")
    status.add_argument("named", metavar="RUN", nargs="*", type=Path, help="run folders (all)")
    status.add_argument("--runs", **every)
    status.add_argument(
        "--watch", type=_seconds, nargs="?", const=10, metavar="SECONDS", help="look again (10)"
    )
    status.set_defaults(act=act, words=_status)

    logs = verbs.add_parser("logs", help="what a run says")
    logs.add_argument("run", metavar="RUN", type=Path, help="the run folder")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    logs.set_defaults(act=act, words=_logs)

    stop = verbs.add_parser("cancel", help="tell runs to save and end")
    stop.add_argument(
        "named", metavar="RUN", nargs="+", type=Path, help="run folders, or those of sweeps"
    )
    stop.set_defaults(act=act, words=_cancel)

    may_requeue = verbs.add_parser("may-requeue")  # asked by the batch script
    may_requeue.add_argument("run", type=Path)
    may_requeue.set_defaults(act=act, words=_may_requeue)


def _submit(arguments: argparse.Namespace) -> Words:
    if arguments.run_dir is not None and len(arguments.jobs) > 1:
        raise JobError(["--run-dir: takes the run of one job, not of several"])
    options = ["--dry-run"]
    written_by = shlex.join(["spantune", *(w for w in arguments.typed if w not in options)])
    # All are checked before the first is submitted.
    orders = [prepare(path, arguments.set, written_by) for path in arguments.jobs]
    for order in orders:
        if arguments.dry_run:
            script = draft(order, arguments.runs, arguments.run_dir)
            yield script or _finished(order, arguments.run_dir)
        else:
            yield from _submitted(order, arguments.runs, arguments.run_dir)


def _submitted(order: SubmitRequest, root: Path, run_dir: Path | None) -> Words:
    name = order.job.name
    done = (submit_sweep if order.trials else submit_run)(order, root, run_dir)
    if done is None:
        yield _finished(order, run_dir)
        return
    array = f", an array of {done.runs} trials" if order.trials else ""
    yield f"{name}: job {done.job_id}{array}, {order.where()}\n"
    if done.doubt:
        yield f"  SLURM could not start it on the nodes as they are now: {done.doubt}\n"
    verbs = ("status {}", "cancel {}", "report --sweep {}")
    for verb in verbs if order.trials else ("status {}", "logs {} -f", "cancel {}"):
        yield f"  spantune {verb.format(shlex.quote(below_here(done.folder)))}\n"
    for note in order.notes():
        yield f"  {note}\n"


def _finished(order: SubmitRequest, run_dir: Path | None) -> str:
    return f"{order.job.name}: finished already, {run_dir}\n"


def _status(arguments: argparse.Namespace) -> Words:
    def look() -> tuple[RenderableType, bool]:
        found, silence = run_statuses(find_runs(arguments.named, arguments.runs))
        rows = table_rows(found, arguments.runs)
        shown = rich_table("", rows) if rows else Text(f"no runs in {arguments.runs}")
        return Group(*([Text(silence)] if silence else []), shown), all(s.over for s in found)

    shown, over = look()
    if arguments.watch and not over:
        with Live(shown, auto_refresh=False, transient=True) as live:
            while not over:
                time.sleep(arguments.watch)
                shown, over = look()
                live.update(shown, refresh=True)
    yield _drawn(shown)


def _logs(arguments: argparse.Namespace) -> Words:
    yield from follow_log(RunDir.open(arguments.run), forever=arguments.follow)


def _cancel(arguments: argparse.Namespace) -> Words:
    failures: list[RunnerError] = []
    for run, outcome in cancel_runs(named_runs(arguments.named)):
        if isinstance(outcome, RunnerError):
            failures.append(outcome)
        else:
            yield f"{below_here(run.path)}: {outcome}\n"
    if failures:
        raise type(failures[0])("\n".join(dict.fromkeys(map(str, failures))))


def _may_requeue(arguments: argparse.Namespace) -> Words:
    check_budget(RunDir.open(arguments.run))
    yield ""


def _seconds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)
