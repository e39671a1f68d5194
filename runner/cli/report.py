"""`report`: a run's page, several runs compared, a sweep's trials side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from runner.cli.output import Words, _drawn, _say, _write
from runner.report.sweep_table import NOTE, compare_trials
from runner.utils.files import below_here
from runner.utils.tables import rich_table


def comparison(folder: Path) -> Words:
    """The table of a sweep's trials, as lines for the terminal.

    Raises:
        DataError: if it is no sweep, or a trial's result cannot be read.
    """
    yield _drawn(rich_table(below_here(folder), compare_trials(folder)))
    yield f"{NOTE}\n"


def _report(arguments: argparse.Namespace) -> int:
    if arguments.sweep:
        for folder in arguments.runs:
            for text in comparison(Path(folder)):
                _write(text)
        return 0
    from runner.report.render import write_comparison, write_report

    if len(arguments.runs) == 1:
        lines = write_report(arguments.runs[0], folder=arguments.output)
    else:
        lines = write_comparison(arguments.runs, arguments.output or Path())
    for line in lines:
        _say(line)
    return 0


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `report`."""
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
