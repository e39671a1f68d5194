"""What a user can get wrong, each with the exit code that the command documents.

The codes follow sysexits.h where one fits, so that batch scripts can tell a bad job file (64, never
requeue) from an interruption after a checkpoint (75, requeue me).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def printable(text: str) -> str:
    """Spell line breaks, control and invisible characters as escapes: one problem stays one line,
    and a name taken from a file cannot steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """As `printable`, of a text whose line breaks and tabs are meant."""
    return "".join(c if c.isprintable() or c in "\n\t" else printable(c) for c in text)


class RunnerError(Exception):
    """A failure explained in sentences: where, what was found, what is allowed, the likely fix.

    `cli` prints the text without a traceback and exits with `exit_code`. Anything that is not a
    RunnerError is our own mistake: it keeps its traceback and exits with 70.

    Attributes:
        speaks: whether this rank is to print it, once the ranks have settled which of them does.
    """

    exit_code = 70
    speaks: bool | None = None


class JobError(RunnerError):
    """The job file or an override cannot be used; `problems` holds one line for each problem found
    (64)."""

    exit_code = 64

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(printable(problem) for problem in problems)
        super().__init__("\n".join(self.problems))


class DataError(RunnerError):
    """A data set, model folder, checkpoint or run folder was read and refused (65)."""

    exit_code = 65


class BadRowsError(DataError):
    """Questions cannot be cut into windows or labelled (65); `rows` holds what is wrong with each,
    by its position."""

    def __init__(self, rows: Mapping[int, str], message: str = "") -> None:
        self.rows = dict(rows)
        super().__init__(message)


class AssetError(RunnerError):
    """A data set or model is neither on this machine nor reachable (69)."""

    exit_code = 69


class MachineError(RunnerError):
    """A rank died, got stuck or ran out of memory: neither the job's text nor spantune is at fault
    (71)."""

    exit_code = 71


class SlurmError(RunnerError):
    """SLURM is not here, does not answer, or refuses what it is asked (72)."""

    exit_code = 72


class SlurmTimeout(SlurmError):
    """SLURM has not answered in time: what it was asked to do may have been done (72)."""


class RunDirError(RunnerError):
    """The run folder is in use by another start (73)."""

    exit_code = 73


class StorageError(RunnerError):
    """Reading or writing a file failed: disk full, quota, permission (74)."""

    exit_code = 74


class Interrupted(RunnerError):
    """The run was told to stop and has committed its state; start it again to go on (75)."""

    exit_code = 75


class DivergedError(RunnerError):
    """The loss, the gradients or the weights are no longer numbers (76)."""

    exit_code = 76


class ExpectationError(RunnerError):
    """The run finished, but its scores are outside what the job's [expect] declares (78)."""

    exit_code = 78


class UsageError(Exception):
    """The arguments do not go together; the command ends with 2, as for any wrong command line."""
