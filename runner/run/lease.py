"""Claims a run folder for one start, shows signs of life and notes its end; a silent owner is
succeeded by the next start.

A number is taken by making a file that nobody else can make too (a link, or O_EXCL): network file
systems honour that, and no lock is ever held. What an attempt may still do after it was succeeded
is harmless: it commits under its own number only, and its heir has sealed what counts.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from runner.errors import RunDirError
from runner.run.attempts import (
    SILENT_S,
    AttemptRecord,
    EndRecord,
    attempt_numbers,
    describe,
    describe_if_alive,
    entry_file,
    read_attempt,
)
from runner.run.folder import RunDir
from runner.utils.files import storage_errors, write_json
from runner.utils.text import duration

LEASE_BEAT_S = 10.0  # seconds between signs of life


class Lease:
    """One start's claim on a run folder, held by its rank 0.

    Attributes:
        run: the run folder.
        number: counts the starts of the run, from 1.
    """

    def __init__(self, run: RunDir, owner: AttemptRecord) -> None:
        self.run = run
        self.number = owner.attempt
        self.step: int | None = None  # the newest step that is committed, as far as we know
        self._owner = owner
        self._over = threading.Event()

    @classmethod
    def acquire(cls, run: RunDir, *, anew: bool = False) -> Lease:
        """Take a run folder, or take it over from an owner that is dead.

        Args:
            run: the folder, which must be there.
            anew: nothing that the folder holds is to count.

        Raises:
            RunDirError: if its owner lives, naming host, job and age.
            StorageError: if the ledger cannot be written.
        """
        with storage_errors(run.attempts):
            run.attempts.mkdir(exist_ok=True)
            while True:
                newest = max(attempt_numbers(run), default=0)
                alive = describe_if_alive(run, newest) if newest else None
                if alive is not None:
                    raise RunDirError(f"{run.path} is being run by {alive}; nothing was started")
                owner = AttemptRecord.here(newest + 1, anew=anew)
                try:
                    _enter(run, owner)
                except FileExistsError:
                    continue  # another start was quicker: look who it is
                attempt = cls(run, owner)
                attempt._beat()
                threading.Thread(target=attempt._live, daemon=True, name="heartbeat").start()
                return attempt

    def verify(self) -> None:
        """Make sure that nobody has taken the run over, before anything is written into it.

        Raises:
            RunDirError: naming who has.
        """
        if not self.is_held():
            heir = read_attempt(self.run, self.number + 1)
            name = describe(heir) if heir else "another start"
            raise RunDirError(
                f"{self.run.path} was taken over by {name}, because this start gave no sign of life"
                f" for {duration(SILENT_S)}; it ends without writing anything more"
            )

    def is_held(self) -> bool:
        """Whether no later start has claimed the run."""
        return not entry_file(self.run, self.number + 1, "json").exists()

    def note_resumed_step(self, step: int) -> None:
        """Note the committed step that this start goes on from, 0 if there is none."""
        self.step = step
        self._owner = replace(self._owner, from_step=step)
        write_json(entry_file(self.run, self.number, "json"), self._owner)

    def seal(self, checkpoints: Sequence[str]) -> None:
        """Settle which checkpoints of earlier attempts count; what they commit later does not."""
        write_json(entry_file(self.run, self.number, "sealed"), list(checkpoints))
        for path in self.run.attempts.glob("*.rank-*"):  # what their ranks said is history
            if int(path.name.partition(".")[0]) < self.number:
                path.unlink(missing_ok=True)

    def release(self, exit_code: int) -> None:
        """Note the end of this start; the next one then need not wait for a silence."""
        self._over.set()
        end = EndRecord(exit_code, self.step, time.time())
        write_json(entry_file(self.run, self.number, "end.json"), end)

    def _live(self) -> None:
        while not self._over.wait(LEASE_BEAT_S):
            try:
                self._beat()
            except OSError:
                continue  # away for a moment; where it matters, writing fails with a sentence

    def _beat(self) -> None:
        entry_file(self.run, self.number, "alive").touch()


def _enter(run: RunDir, owner: AttemptRecord) -> None:
    """Write the entry of a new attempt: whole, and only if nobody has that number.

    Raises:
        FileExistsError: if somebody has.
    """
    path = entry_file(run, owner.attempt, "json")
    aside = path.with_name(f".{path.name}.{owner.host}.{owner.pid}.{threading.get_ident()}")
    text = json.dumps(asdict(owner), indent=2) + "\n"
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
