"""The command: reads arguments, calls one verb, and turns errors into one sentence and an exit
code.

A verb is a pair of functions in its family's module: `add_NAME(verbs)` declares its arguments,
`run_NAME(arguments)` does it and returns the exit code. It imports what is heavy inside, so that
`--help` and `check` take a third of a second.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches

from runner import __version__
from runner.cli import init, predict, prune, report, run, slurm
from runner.errors import RunnerError, UsageError
from runner.utils.console import print_error, stdout_errors
from runner.utils.files import full_disk_errors, storage_errors
from runner.utils.ranks import current_rank, speaks_for_all
from runner.utils.signals import hear_children
from runner.utils.text import shorten

EPILOG = """\
exit codes: 0 done, 2 command line, 64 job file, 65 data, model or checkpoint
refused, 69 asset missing offline, 70 our bug, 71 a rank died, got stuck or ran
out of memory, 72 SLURM refuses or is not here, 73 run folder in use, or none
there, 74 reading or writing failed, 75 stopped and saved: start it again, 76
loss or gradients are no longer numbers, 78 an [expect] gate missed, or a run
not reproduced
"""

ADD_VERBS = (  # in the order of --help
    init.add_init,
    run.add_check,
    run.add_run,
    run.add_rank,
    predict.add_predict,
    predict.add_evaluate,
    report.add_report,
    run.add_reproduce,
    prune.add_prune,
    slurm.add_submit,
    slurm.add_status,
    slurm.add_logs,
    slurm.add_cancel,
    slurm.add_may_requeue,
    run.add_schema,
)


HIDDEN_VERBS = ("rank", "may-requeue")  # what a launcher and a batch script say
# Words for our verbs that people know from elsewhere.
OTHER_VERBS = {
    **dict.fromkeys(("new", "create", "draft", "make"), "init"),
    **dict.fromkeys(("train", "fit", "finetune", "fine-tune", "start", "resume"), "run"),
    **dict.fromkeys(("eval", "test", "score"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "answer", "ask", "pipeline"), "predict"),
    **dict.fromkeys(("validate", "lint", "verify"), "check"),
    **dict.fromkeys(("compare", "show", "plot"), "report"),
    **dict.fromkeys(("sbatch", "queue"), "submit"),
    **dict.fromkeys(("ls", "list", "squeue", "ps"), "status"),
    **dict.fromkeys(("log", "tail"), "logs"),
    **dict.fromkeys(("stop", "kill", "scancel"), "cancel"),
    **dict.fromkeys(("clean", "rm", "gc", "tidy"), "prune"),
    **dict.fromkeys(("sweep", "tune"), "run, with a [sweep] in the job"),
    **dict.fromkeys(("help", "version"), "--help or --version"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    hear_children()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot spell is no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        with storage_errors(), full_disk_errors():
            return arguments.verb(arguments)
    except RunnerError as error:
        if speaks_for_all():
            print_error(str(error))
        return error.exit_code
    except UsageError as error:
        print_error(f"spantune: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        print_error(f"{traceback.format_exc()}{run.OUR_MISTAKE}")
        return RunnerError.exit_code


def _parse(argv: list[str]) -> argparse.Namespace:
    # The launcher puts --local_rank=N first; a bare JOB.toml means run, or, where a launcher has
    # started us already, be one rank of a run.
    argv = [a for a in argv if not a.startswith(("--local_rank", "--local-rank"))]
    if argv and argv[0].endswith(".toml"):
        launched = "RANK" in os.environ or current_rank().world > 1
        argv.insert(0, "rank" if launched else "run")
    parser = argparse.ArgumentParser(
        prog="spantune",
        description="Fine-tune extractive question-answering models from a job file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spantune {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for add_verb in ADD_VERBS:
        add_verb(verbs)
    try:
        if not argv:
            parser.print_help()
            parser.exit(0)
        _check_verb(argv[0], list(verbs.choices))
        arguments = parser.parse_args(argv)
    finally:
        with stdout_errors():  # --help has printed and ends
            if sys.stdout is not None:
                sys.stdout.flush()
    arguments.command_line = argv
    return arguments


def _check_verb(word: str, verbs: Sequence[str]) -> None:
    """Lead a verb that we do not have to the one that was meant."""
    if word.startswith("-") or word in verbs:
        return
    if os.path.isfile(word):
        raise UsageError(f"{shorten(word)}: a job file has a name that ends in .toml")
    known = [verb for verb in verbs if verb not in HIDDEN_VERBS]
    close = get_close_matches(word.lower(), [*known, *OTHER_VERBS], 1)
    meant = OTHER_VERBS.get(close[0], close[0]) if close else ""
    hint = f"did you mean {meant}?" if meant else f"there are {', '.join(known)}"
    raise UsageError(f"no verb {shorten(word)}; {hint} (spantune --help says more)")
