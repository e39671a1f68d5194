"""A client of SLURM's own commands, each with a time limit: sbatch, squeue, sacct, scancel; and the
record of a submission beside the run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from runner.errors import DataError, SlurmError, SlurmTimeout, printable
from runner.utils.files import read_json, storage_errors, write_json

SLURM_ANSWER_S = 20.0  # seconds for an answer; clients of a dead controller would try for minutes
SBATCH_ANSWER_S = 60.0  # seconds for sbatch, after which nobody knows whether there is a job
# States of a job that SLURM has ended, for a reason that the run's own end does not tell.
KILLED = {"CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
_ENDED = {*KILLED, "COMPLETED", "FAILED", "DEADLINE", "BOOT_FAIL", "REVOKED", "FORGOTTEN"}
# Of SLURM's variables, those that say where SLURM is. The others describe the job that we may be in
# ourselves, and would be taken over by the one that is submitted.
_WHERE_SLURM_IS = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER", "SLURM_TIME_FORMAT"}
_RANK = re.compile(r"RANK|WORLD_SIZE|LOCAL_\w+|MASTER_(ADDR|PORT)|OMP_NUM_THREADS")
# Options whose variable has another name than SBATCH_ and the option's.
_VARIABLES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "mem": "MEM_PER_NODE"}
# Options of which one cancels the others: no variable for any of them is passed on with one.
_ONE_OF = ({"requeue", "no-requeue"}, {"mem", "mem-per-cpu", "mem-per-gpu"})
# What sbatch prints when the controller did not answer it in time, and may have heard it.
_UNSURE = re.compile(r"timed out|Zero Bytes were transmitted", re.IGNORECASE)


@dataclass(frozen=True)
class Submission:
    """What `slurm.json` holds: how a run was given to SLURM, newest time.

    Attributes:
        job_id: SLURM's number; of an array, the array's.
        index: the trial's place in the array; None for a plain job.
        output: the file that SLURM writes the job's output to; its name counts, in our folder.
        submitted: when, in UTC.
        host: where.
        options: the [slurm] that was used, cluster defaults and all.
        defaults: the file these came from; None where there was none.
        earlier: ids of earlier submissions of the same run.
    """

    job_id: Annotated[str, Field(pattern=r"^[0-9]+$")]
    index: Annotated[int, Field(ge=0)] | None
    output: str
    submitted: str
    host: str
    options: dict[str, Any]
    defaults: str | None
    earlier: list[str]

    @property
    def name(self) -> str:
        """The job as SLURM's commands take it: 17, or 17_3 for one trial of an array."""
        return self.job_id if self.index is None else f"{self.job_id}_{self.index}"


@dataclass(frozen=True)
class SlurmJob:
    """What SLURM says of a job now.

    Attributes:
        state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ...
        reason: why it waits or has ended.
        time_left: until its time limit, as SLURM spells it.
        nodes: where it runs.
    """

    state: str
    reason: str
    time_left: str
    nodes: str

    @property
    def ended(self) -> bool:
        """Whether SLURM is done with it."""
        return self.state in _ENDED

    @property
    def waits(self) -> bool:
        """Whether it has not begun, or not begun again."""
        return self.state in {"PENDING", "REQUEUED", "CONFIGURING", "REQUEUE_HOLD"}


# A job of which neither the queue nor the accounting knows any more.
FORGOTTEN = SlurmJob("FORGOTTEN", "", "", "")


def read_submission(path: Path) -> Submission | None:
    """Read `slurm.json`; None where there is none.

    Raises:
        DataError: if it is not ours: what it names is then handed to nobody.
        StorageError: if it cannot be read now.
    """
    try:
        with storage_errors(path):
            try:
                return read_json(path, Submission)
            except FileNotFoundError:
                return None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: is damaged: {error}; remove it if SLURM has no job of this run"
        ) from None


def write_submission(path: Path, submission: Submission) -> None:
    """Write `slurm.json`."""
    write_json(path, submission)


def sbatch(script: Path, options: Iterable[str]) -> str:
    """Submit a script and return the job's number.

    Args:
        script: the batch script.
        options: names of the options that it sets; of the user's variables that could change them
            (SBATCH_PARTITION, ...) none is passed on.

    Raises:
        SlurmError: with SLURM's message, if it refuses.
        SlurmTimeout: if it does not answer, and may have taken the job.
    """
    done = _call(["sbatch", "--parsable", str(script)], SBATCH_ANSWER_S, _environment(options))
    if done.returncode != 0:
        message = _message(done.stderr)
        if _UNSURE.search(message):
            raise SlurmTimeout(f"sbatch: {message}; `squeue --me` shows whether the job is there")
        raise SlurmError(f"SLURM refuses the job: {message}")
    return done.stdout.strip().partition(";")[0]  # a federation appends its cluster's name


def never_starts(script: Path, options: Iterable[str]) -> str | None:
    """Why SLURM could not start this script on the nodes as they are now; None where it could."""
    done = _call(["sbatch", "--test-only", str(script)], SLURM_ANSWER_S, _environment(options))
    return None if done.returncode == 0 else _message(done.stderr)


def job_states(names: Sequence[str]) -> dict[str, SlurmJob]:
    """Ask for the state of jobs by name (17, or 17_3); those that SLURM no longer knows are left
    out.

    Raises:
        SlurmError: if SLURM is not here or does not answer.
    """
    if not names:
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%L|%N"]
    done = _call([*command, f"--jobs={','.join(names)}"], SLURM_ANSWER_S)
    # squeue fails if there is only one and it is not known; otherwise it says nothing of such.
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise SlurmError(f"squeue: {_message(done.stderr)}")
    jobs = {}
    for line in done.stdout.splitlines():
        name, *rest = line.split("|")
        if name in names and len(rest) == 4:
            jobs[name] = SlurmJob(*rest)
    missing = [name for name in names if name not in jobs]
    return jobs | (_accounted(missing) if missing else {})


def scancel(name: str) -> None:
    """Cancel a job: SLURM tells it to end, and kills what is left after a while.

    Raises:
        SlurmError: with SLURM's message, if it refuses.
    """
    done = _call(["scancel", name], SLURM_ANSWER_S)
    if done.returncode != 0:
        raise SlurmError(f"SLURM does not cancel job {name}: {_message(done.stderr)}")


def _accounted(names: Sequence[str]) -> dict[str, SlurmJob]:
    """What the accounting says of ended jobs; many clusters have none, and that is no error."""
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State"]
    try:
        done = _call([*command, f"--jobs={','.join(names)}"], SLURM_ANSWER_S)
    except SlurmError:
        return {}
    jobs = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, _, state = line.partition("|")
        if name in names and state:
            jobs[name] = SlurmJob(state.split()[0], "", "", "")  # "CANCELLED by 1000"
    return jobs


def _environment(options: Iterable[str]) -> Mapping[str, str]:
    """Our environment for a new job, without what would make it another one: variables of sbatch
    win over the lines of a script, and those of a job or a rank around us are not the new one's."""
    names = set(options)
    for group in _ONE_OF:
        names |= group if names & group else set()
    ours = {
        f"SBATCH_{_VARIABLES[name] if name in _VARIABLES else name.upper().replace('-', '_')}"
        for name in names
    }
    return {
        key: value
        for key, value in os.environ.items()
        if key not in ours
        and not (key.startswith("SLURM_") and key not in _WHERE_SLURM_IS)
        and not _RANK.fullmatch(key)
    }


def _call(
    command: list[str], seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on the path: this machine is no login node of a SLURM cluster;"
            " `spantune run JOB.toml` trains on this machine"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmTimeout(
            f"{command[0]} has not answered for {seconds:.0f} s; SLURM's controller may be down:"
            " try again later, and see `squeue --me` for what it has done meanwhile"
        ) from None
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run: {error.strerror}") from None


def _message(text: str) -> str:
    """SLURM's message in one line, without the names of its commands before each."""
    before = re.compile(r"^(\w+: (error|fatal): |allocation failure: )+")
    lines = [before.sub("", line.strip()) for line in text.splitlines()]
    return printable("; ".join(dict.fromkeys(line for line in lines if line))) or "no reason given"
