"""`prune`: finished runs without what they have no more use for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from runner.cli.output import write_line
from runner.errors import RunnerError
from runner.run.folder import RunDir
from runner.run.sweep import SWEEP_MANIFEST, read_manifest
from runner.utils.console import print_error
from runner.utils.files import below_here, is_there
from runner.utils.text import megabytes


def add_prune(verbs: Any) -> None:
    parser = verbs.add_parser(
        "prune", help="remove the checkpoints of finished runs; model/ and all results stay"
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs, or of sweeps"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    parser.add_argument(
        "--keep", choices=("none", "best"), default="none", help="the checkpoints that stay (none)"
    )
    parser.set_defaults(verb=run_prune)


def run_prune(arguments: argparse.Namespace) -> int:
    """Prune each run; one that may not be pruned does not keep the others from it."""
    from runner.checkpoint.prune import prune

    code, freed = 0, 0
    verb = "would remove" if arguments.dry_run else "removed"
    for path in arguments.runs:
        try:
            for run in _runs(path):
                found = prune(run, arguments.keep, dry=arguments.dry_run)
                freed += found.bytes
                what = f"{verb} {found}" if found.names else "nothing to remove"
                write_line(f"{below_here(run.path)}: {what}")
        except RunnerError as error:
            print_error(str(error))
            code = code or error.exit_code
    if len(arguments.runs) > 1:
        write_line(f"{verb} {megabytes(freed)} in all")
    return code


def _runs(path: Path) -> list[RunDir]:
    """The run at a path, or the finished trials of the sweep there."""
    if not is_there(path / SWEEP_MANIFEST):
        return [RunDir.open(path)]
    trials = [RunDir(path / trial.name) for trial in read_manifest(path).trials]
    return [run for run in trials if run.finished()]
