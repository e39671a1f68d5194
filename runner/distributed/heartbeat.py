"""The ranks of one attempt as files: each shows that it lives and leaves a note of why it ends, so
that those who are cut off can tell whose fault it was.

`attempts/0002.rank-0001` is made whole at the start, so that the note of a rank whose disk is
full has its place.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from runner.errors import StorageError
from runner.run.attempts import entry_file, read_attempt
from runner.run.folder import RunDir
from runner.utils.console import append_log
from runner.utils.files import is_there, parse_json, storage_errors
from runner.utils.processes import machine_id, process_start, same_process

RANK_BEAT_S = 5.0  # seconds between signs of life
_HEAD, _WHOLE = 1024, 8192  # bytes: who it is, then its note


@dataclass(frozen=True)
class RankRecord:
    """Where a rank runs."""

    rank: int
    host: str
    pid: int
    machine: str
    born: float

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    def is_dead(self) -> bool:
        """Whether its process has ended, as far as this machine can see."""
        return self.machine == machine_id() and not same_process(self.pid, self.born)


@dataclass(frozen=True)
class ExitNote:
    """What a rank says at its end.

    Attributes:
        code: its exit code.
        text: why, in a sentence.
        waits: whether it was only waiting for others, or was cut off from them: the fault is not
            its own.
    """

    code: int
    text: str
    waits: bool


class RankHeartbeats:
    """The ranks' files, as one rank sees them.

    Args:
        run, attempt: whose.
        rank, world: this rank, and how many there are.
        nonce: of the attempt, if its entry is to be held against it before a word is left.
    """

    def __init__(
        self, run: RunDir, attempt: int, rank: int, world: int, nonce: str | None = None
    ) -> None:
        self._run, self._attempt, self._rank, self.world = run, attempt, rank, world
        self._nonce = nonce

    def register(self) -> None:
        """Make this rank's file.

        Raises:
            StorageError: if it cannot be made.
        """
        here = RankRecord(
            self._rank,
            socket.gethostname(),
            os.getpid(),
            machine_id(),
            process_start(os.getpid()),
        )
        path = entry_file(self._run, self._attempt, self._name(self._rank))
        with storage_errors(path), path.open("xb") as file:
            file.write(json.dumps(asdict(here)).encode().ljust(_HEAD).ljust(_WHOLE))
            file.flush()
            os.fsync(file.fileno())

    def beat(self) -> None:
        """Show that this rank lives."""
        os.utime(entry_file(self._run, self._attempt, self._name(self._rank)))

    def leave_note(self, note: ExitNote) -> None:
        """Leave this rank's note, if the file system lets it; only the first count."""
        path = entry_file(self._run, self._attempt, self._name(self._rank))
        if not self._is_ours() or self._rank in self.notes():
            return
        text = note.text
        while len(spelled := json.dumps(asdict(note) | {"text": text}).encode()) > _WHOLE - _HEAD:
            text = text[: len(text) // 2]
        try:
            with path.open("r+b") as file:
                file.seek(_HEAD)
                file.write(spelled.ljust(_WHOLE - _HEAD))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return

    def notes(self) -> dict[int, ExitNote]:
        """The notes that were left, by rank."""
        found = {}
        for rank in range(self.world):
            content = self._read(rank)[_HEAD:].strip()
            try:
                if content:
                    found[rank] = parse_json(content, ExitNote)
            except ValueError:
                continue  # being written just now
        return found

    def rank_record(self, rank: int) -> RankRecord | None:
        """Where a rank runs; None if it has not appeared."""
        try:
            return parse_json(self._read(rank)[:_HEAD], RankRecord)
        except ValueError:
            return None

    def name(self, rank: int) -> str:
        """What to call a rank."""
        return str(self.rank_record(rank) or f"rank {rank}")

    def silence(self, rank: int) -> float | None:
        """Seconds between a rank's last sign of life and this rank's; None if it has not
        appeared."""
        theirs, mine = self.last_sign(rank), self.last_sign(self._rank)
        return None if theirs is None or mine is None else max(0.0, mine - theirs)

    def last_sign(self, rank: int) -> float | None:
        """When a rank last showed that it lives, by the file system's clock; None before."""
        path = entry_file(self._run, self._attempt, self._name(rank))
        try:
            # Opened, not only looked at: a network file system then asks its server anew.
            with path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return None

    def claim_output(self, *, at_once: bool = False) -> bool:
        """Whether this rank is the one that tells the user, where one line is enough. Rank 0 is let
        first, unless it has to be another one `at_once`."""
        if self._rank and not at_once:
            time.sleep(1)
        if not self._is_ours():
            return True
        path = entry_file(self._run, self._attempt, "spoken")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def append_log(self, words: str) -> None:
        """Add to the run's log, if the run is still this attempt's, as far as can be seen now."""
        with suppress(StorageError):
            successor = is_there(entry_file(self._run, self._attempt + 1, "json"))
            if self._is_ours() and not successor:
                append_log(self._run.log, words)

    def output_is_claimed(self) -> bool:
        """Whether some rank has told the user why the run ends, as far as can be seen now."""
        try:
            return is_there(entry_file(self._run, self._attempt, "spoken"))
        except StorageError:
            return False

    def _is_ours(self) -> bool:
        """Whether the files of these names are ours: in a folder that was removed and made anew
        they are those of another run."""
        if self._nonce is None:
            return True
        try:
            found = read_attempt(self._run, self._attempt)
        except StorageError:
            return True
        return found is None or found.nonce == self._nonce

    def _name(self, rank: int) -> str:
        return f"rank-{rank:04d}"

    def _read(self, rank: int) -> bytes:
        try:
            return entry_file(self._run, self._attempt, self._name(rank)).read_bytes()
        except OSError:
            return b""


def diagnose(
    heartbeats: RankHeartbeats, rank: int, patience: float
) -> tuple[dict[int, ExitNote], list[int]]:
    """Wait until it is clear what became of each other rank: it left a note, is dead, or lives.

    Args:
        heartbeats: the ranks.
        rank: this one, which has left its own notes.
        patience: seconds after which a rank without any sign counts as dead.

    Returns:
        The notes of all, and the ranks that are dead or silent.
    """
    started, seen = time.monotonic(), {r: heartbeats.last_sign(r) for r in range(heartbeats.world)}
    while True:
        notes = heartbeats.notes()
        open_ones, gone = [], []
        for other in range(heartbeats.world):
            record = heartbeats.rank_record(other)
            if other == rank or other in notes:
                continue
            if record is not None and record.is_dead():
                gone.append(other)
            elif heartbeats.last_sign(other) == seen[other]:
                open_ones.append(other)
        faulty = any(not said.waits for said in notes.values())
        if faulty or not open_ones or time.monotonic() > started + patience:
            return notes, sorted(gone + open_ones)
        time.sleep(0.1)
