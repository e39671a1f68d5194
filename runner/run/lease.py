"""The lease on a run folder: one start has it, renews it by signs of life, and gives it back at its
end; from a holder that is silent the next start takes it over.

A number is taken by making a file that nobody else can make too (a link, or O_EXCL): network file
systems honour that, and no lock is ever held. What a holder may still do after its lease was taken
over is harmless: it commits under its own number only, and its successor has sealed what counts.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

from runner.errors import RunDirError, RunnerError, StorageError
from runner.run.attempts import (
    SILENT_S,
    AttemptRecord,
    EndRecord,
    attempt_numbers,
    describe,
    describe_if_alive,
    entry_file,
    read_attempt,
    stands_still,
)
from runner.run.folder import RunDir
from runner.utils.console import append_log
from runner.utils.files import is_there, storage_errors, write_json
from runner.utils.text import duration

LEASE_BEAT_S = 10.0  # seconds between signs of life


class Lease:
    """One start's lease on a run folder, held by its rank 0.

    Attributes:
        run: the run folder.
        number: counts the starts of the run, from 1.
        nonce: of this start's entry.
    """

    def __init__(self, run: RunDir, record: AttemptRecord) -> None:
        self.run = run
        self.number, self.nonce = record.attempt, record.nonce
        self.step: int | None = None  # the newest step that is committed, as far as we know
        self._record = record
        self._over = threading.Event()
        # Held open: no folder that is made later in its place is then the same one.
        self._folder = os.open(run.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._folder)

    @classmethod
    def acquire(cls, run: RunDir, *, anew: bool = False) -> Lease:
        """Take the lease, or take it over from a holder that is dead.

        Args:
            run: the folder, which must be there.
            anew: nothing that the folder holds is to count.

        Raises:
            RunDirError: if its holder lives, naming host, job and age.
            StorageError: if the ledger cannot be written.
        """
        with storage_errors(run.attempts):
            run.attempts.mkdir(exist_ok=True)
            while True:
                newest = max(attempt_numbers(run), default=0)
                alive = describe_if_alive(run, newest) if newest else None
                if alive is not None and not stands_still(run, newest):
                    raise RunDirError(f"{run.path} is being run by {alive}; nothing was started")
                record = AttemptRecord.here(newest + 1, anew=anew)
                try:
                    _create_entry(run, record)
                except FileExistsError:
                    continue  # another start was quicker: look who it is
                lease = cls(run, record)
                lease._beat()
                threading.Thread(target=lease._keep_beating, daemon=True, name="heartbeat").start()
                return lease

    def verify(self) -> None:
        """The fence: make sure that the folder is still the one that this start began in, and that
        nobody has taken the run over, before anything in it is written, renamed or removed.

        Raises:
            RunDirError: naming who has.
            StorageError: if that cannot be found out now.
        """
        self._check_folder()
        if not self.is_held():
            successor = read_attempt(self.run, self.number + 1)
            name = describe(successor) if successor else "another start"
            raise RunDirError(
                f"{self.run.path} was taken over by {name}, because this start gave no sign of life"
                f" for {duration(SILENT_S)}; it ends without writing anything more"
            )

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Tell what fails in a start that was taken over as just that: its files were removed."""
        try:
            yield
        except StorageError:
            self.verify()
            raise

    def is_held(self) -> bool:
        """Whether no later start has claimed the run."""
        return not is_there(entry_file(self.run, self.number + 1, "json"))

    def _check_folder(self) -> None:
        found = read_attempt(self.run, self.number)
        if found is not None:
            ours = found.nonce == self.nonce
        else:  # of the ledger, somebody may have removed a part
            with storage_errors(self.run.path):
                ours = os.path.samestat(os.fstat(self._folder), os.stat(self.run.path))
        if not ours:
            raise RunDirError(
                f"{self.run.path} was removed while this start ran, and made anew by somebody else:"
                " this start ends without writing anything more"
            )

    def note_resumed_step(self, step: int) -> None:
        """Note the committed step that this start goes on from, 0 if there is none."""
        self.step = step
        self._record = replace(self._record, from_step=step)
        write_json(entry_file(self.run, self.number, "json"), self._record, self.verify)

    def seal(self, checkpoints: Sequence[str]) -> None:
        """Settle which checkpoints of earlier attempts count; what they commit later does not."""
        sealed = entry_file(self.run, self.number, "sealed")
        write_json(sealed, list(checkpoints), self.verify)
        for path in self.run.attempts.glob("*.rank-*"):  # their exit notes are history
            if int(path.name.partition(".")[0]) < self.number:
                path.unlink(missing_ok=True)

    def release(self, exit_code: int, message: str = "", last_words: str = "") -> None:
        """Note the end of this start; the next one then need not wait for a silence.

        Args:
            exit_code: of the run.
            message: why it ends; nothing after success.
            last_words: what the run's log gets, if that is more: a traceback, say.

        Raises:
            RunDirError: if the folder is somebody else's by now.
            StorageError: if it cannot be written.
        """
        self._over.set()
        # Before the end, after which a follower of the log leaves, and an heir may begin.
        if message:
            with suppress(RunnerError):
                self.verify()
                append_log(self.run.log, last_words or message)
        end = EndRecord(exit_code, self.step, time.time(), message)
        write_json(entry_file(self.run, self.number, "end.json"), end, self._check_folder)

    def _keep_beating(self) -> None:
        while not self._over.wait(LEASE_BEAT_S):
            try:
                self._beat()
            except (OSError, RunnerError):
                continue  # away for a moment; where it matters, writing fails with a sentence

    def _beat(self) -> None:
        self._check_folder()
        entry_file(self.run, self.number, "alive").touch()


def _create_entry(run: RunDir, record: AttemptRecord) -> None:
    """Write the entry of a new attempt, whole; FileExistsError if its number is taken."""
    path = entry_file(run, record.attempt, "json")
    aside = path.with_name(f".{path.name}.{record.host}.{record.pid}.{threading.get_ident()}")
    text = json.dumps(asdict(record), indent=2) + "\n"
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        with path.open("x", encoding="utf-8") as file:  # a file system without links
            file.write(text)
    finally:
        aside.unlink(missing_ok=True)
