"""Controls runs that are under way: follows the log of one, and tells some to save and end."""

from __future__ import annotations

import codecs
import os
import signal
import time
from collections.abc import Iterator, Sequence

from runner.errors import DataError, RunDirError, RunnerError, SlurmError, StorageError
from runner.run.attempts import describe
from runner.run.folder import RunDir
from runner.slurm.client import read_submission, scancel
from runner.slurm.starts import log_file, newest_start, read_log
from runner.slurm.status import run_statuses
from runner.slurm.submit import in_queue
from runner.utils.processes import machine_id

LOG_POLL_S = 0.5  # seconds between looks at a file that grows
STATE_POLL_S = 10.0  # seconds between questions to SLURM


def follow_log(run: RunDir, *, forever: bool) -> Iterator[str]:
    """Yield what a run's log holds so far, and with `forever` also what is added to it, until the
    run is over. While there is nothing yet, its state is yielded once.

    Raises:
        RunDirError: if there is nothing, and it is not to be waited for, saying how the run stands.
    """
    path = log_file(run)
    # A letter may be written in two parts.
    decode = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace").decode
    place, last_query, last_state = 0, 0.0, ""
    while True:
        raw = read_log(path, place)
        place += len(raw)
        if raw:
            yield decode(raw)
            continue
        if not forever:
            if place == 0:
                [status], _ = run_statuses([run])
                raise RunDirError(
                    f"{run.path} has said nothing yet: there is no {path.name}; {status.sentence}"
                )
            return
        if time.monotonic() - last_query > STATE_POLL_S or not last_query:
            last_query = time.monotonic()
            [status], silence = run_statuses([run])
            if read_log(path, place):  # there is more since: what it said last comes first
                continue
            if place == 0 and last_state != status.sentence:
                last_state = status.sentence
                yield f"{last_state}\n"
            if status.over and not silence:
                yield decode(b"", final=True)
                return
        time.sleep(LOG_POLL_S)


def cancel_runs(runs: Sequence[RunDir]) -> Iterator[tuple[RunDir, str | RunnerError]]:
    """Tell runs to save and end, whatever started them. Yields for each what was done, in a
    sentence, or why it could not be (SlurmError; RunDirError, if it runs on another machine outside
    of SLURM): one that cannot be told does not keep the others going. SLURM is asked once."""
    unfinished = [run for run in runs if not run.finished()]
    silence, waiting = None, {}
    try:
        waiting = in_queue(run for run in unfinished if not _is_damaged(run))
    except SlurmError as error:
        silence = error
    for run in runs:
        if silence is not None and run in unfinished and run.slurm.is_file():
            yield run, silence
            continue
        try:
            outcome = _cancel(run, in_queue=run.path in waiting)
        except RunnerError as error:
            yield run, error
        else:
            yield run, outcome


def _is_damaged(run: RunDir) -> bool:
    try:
        read_submission(run.slurm)
    except (DataError, StorageError):
        return True
    return False


def _cancel(run: RunDir, *, in_queue: bool) -> str:
    if run.finished():
        return "finished already"
    submission = read_submission(run.slurm)
    if submission is not None and in_queue:
        scancel(submission.name)
        return f"job {submission.name} is cancelled: it saves, ends, and is not requeued"
    start = newest_start(run)
    if start is None or not start.alive:
        return "is not running"
    record = start.record
    if record.machine != machine_id():  # its pid means something else here
        raise RunDirError(f"{run.path} is being run by {describe(record)}: cancel it there")
    try:
        os.kill(record.pid, signal.SIGTERM)
    except ProcessLookupError:
        return "is not running"
    return f"process {record.pid} is told to save and end"
