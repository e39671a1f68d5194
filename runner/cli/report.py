"""`report`: a run's page, several runs compared, a sweep's trials side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runner.cli.output import write_line, write_table
from runner.errors import RunnerError
from runner.utils.files import below_here
from runner.utils.tables import rich_table


def add_report(verbs: Any) -> None:
    parser = verbs.add_parser(
        "report", help="a run's page: scores, curves, errors; or several runs compared"
    )
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
    parser.set_defaults(verb=run_report)


def run_report(arguments: argparse.Namespace) -> int:
    if arguments.sweep:
        for folder in arguments.runs:
            write_trials(Path(folder))
        return 0
    from runner.report.render import write_comparison, write_report

    if len(arguments.runs) == 1:
        lines = write_report(arguments.runs[0], folder=arguments.output)
    else:
        lines = write_comparison(arguments.runs, arguments.output or Path())
    for line in lines:
        write_line(line)
    return 0


def write_trials(folder: Path) -> None:
    """Print the table of a sweep's trials, and make the page that compares them.

    Raises:
        DataError: if it is no sweep, or a trial's result cannot be read.
    """
    # These bring numpy.
    from runner.report.render import write_comparison
    from runner.report.sweep_table import NOTE, compare_trials, ranked_trials

    rows, ranked = compare_trials(folder), ranked_trials(folder)
    if len(rows) > 1 and ranked:
        marks = ["best", *[""] * (len(rows) - 1)]
        rows = [{" ": mark, **row} for mark, row in zip(marks, rows, strict=True)]
    write_table(rich_table(below_here(folder), rows))
    write_line(NOTE)
    if ranked:
        write_line(f"Best: {below_here(ranked[0].path)}")
    if len(ranked) > 1:
        try:
            for line in write_comparison([run.path for run in ranked], folder)[-2:]:
                write_line(line)
        except RunnerError as error:  # the table is there, with or without it
            write_line(f"no page: {error}")
