"""The ranks of one attempt as files: each shows that it lives and leaves a note of why it ends, so
that those who are cut off can tell whose fault it was.

`attempts/0002.rank-0001` is made whole at the start, so that the note of a rank whose disk is
full has its place. Who left one also makes `0002.rank-0001.ends` or `.waits` beside it, without
content: one listing then tells what became of each of hundreds of ranks, and few files are read.

Ranks are on many machines, so what one writes has to be seen by the others although their file
system may keep what it once read. Relied upon is what NFS calls close-to-open: a file, or a folder,
that is opened is compared with the server's. So files are opened and folders listed; that a name is
looked for (`stat`) may be answered from memory for a minute.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.errors import MachineError, StorageError
from runner.run.attempts import entry_file, read_attempt
from runner.run.folder import RunDir
from runner.utils.console import append_log
from runner.utils.files import is_there, parse_json, storage_errors
from runner.utils.processes import machine_id, process_start, same_process

RANK_BEAT_S = 10.0  # seconds between signs of life
LOOKS = 4  # other ranks whose files each rank may read at an end, however many there are
_HEAD, _WHOLE = 1024, 8192  # bytes: who it is, then its note
_LONGEST_PAUSE_S = 4.0  # between two listings at an end; each pause is twice the last
_MARGIN_S = 5.0  # seconds after which the ranks that were cut off have left their notes
_LATER_S = 12.0  # seconds by which others are more patient than the lowest rank


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


@dataclass(frozen=True)
class Sight:
    """What a look at a rank's file shows: its last sign of life by the file system's clock, where
    it runs, and what it said at its end; None for what is not there."""

    sign: float | None
    record: RankRecord | None
    note: ExitNote | None


@dataclass(frozen=True)
class RollCall:
    """What one listing shows: the ranks that left a note and whether each only `waits`, and whether
    some rank tells the user why the run ends."""

    ended: dict[int, bool]
    claimed: bool


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
        self._records: dict[int, RankRecord] = {}  # they never change
        self._left_note = False

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
        if self._left_note or not self._is_ours():
            return
        text = note.text
        while len(spelled := json.dumps(asdict(note) | {"text": text}).encode()) > _WHOLE - _HEAD:
            text = text[: len(text) // 2]
        with suppress(OSError):
            with path.open("r+b") as file:
                file.seek(_HEAD)
                file.write(spelled.ljust(_WHOLE - _HEAD))
                file.flush()
                os.fsync(file.fileno())
            self._left_note = True
            # Only now, so that who sees the name finds the note; without it (a full disk) those who
            # look at this rank's file find it too, later.
            _create(path.with_name(f"{path.name}.{'waits' if note.waits else 'ends'}"))

    def roll_call(self) -> RollCall:
        """What became of all ranks, as far as their names tell it: by one listing.

        Raises:
            OSError: if that cannot be told now.
        """
        start, ended, claimed = f"{self._attempt:04d}.", {}, False
        for name in os.listdir(self._run.attempts):
            if name.startswith(start):
                kind, _, end = name[len(start) :].partition(".")
                claimed = claimed or kind == "spoken"
                if end in ("waits", "ends") and kind[5:].isdecimal():
                    ended[int(kind[5:])] = end == "waits"
        return RollCall(ended, claimed)

    def notes(self, ranks: Iterable[int] | None = None) -> dict[int, ExitNote]:
        """The notes that were left by some ranks, or by all: a file for each is read."""
        asked = range(self.world) if ranks is None else ranks
        return {rank: note for rank in asked if (note := self.look(rank).note) is not None}

    def look(self, rank: int) -> Sight:
        """Look at a rank's file; one that cannot be read now shows nothing."""
        sign, content = self._read(rank, _WHOLE)
        record, note = None, None
        try:
            record = self._records[rank] = parse_json(content[:_HEAD], RankRecord)
            if said := content[_HEAD:].strip():
                note = parse_json(said, ExitNote)
        except ValueError:
            pass  # not there, or being written just now
        return Sight(sign, record, note)

    def rank_record(self, rank: int) -> RankRecord | None:
        """Where a rank runs; None if it has not appeared."""
        return self._records.get(rank) or self.look(rank).record

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
        return self._read(rank, 0)[0]

    def claim_output(self, *, at_once: bool = False) -> bool:
        """Whether this rank is the one that tells the user, where one line is enough. Rank 0 is let
        first, unless it has to be another one `at_once`."""
        if self._rank and not at_once:
            time.sleep(1 + self._rank / self.world)
        if not self._is_ours():
            return True
        path = entry_file(self._run, self._attempt, "spoken")
        try:
            _create(path)
        except FileExistsError:
            return False
        except OSError as error:  # if the folder is gone, rank 0 sees that too
            return self._rank == 0 or not isinstance(error, FileNotFoundError)
        return True

    def append_log(self, words: str) -> None:
        """Add to the run's log, if the run is still this attempt's, as far as can be seen now."""
        with suppress(StorageError):
            successor = is_there(entry_file(self._run, self._attempt + 1, "json"))
            if self._is_ours() and not successor:
                append_log(self._run.log, words)

    def folder_is_gone(self) -> bool:
        """Whether the ranks' files were moved away or removed, so that nobody can leave word."""
        with suppress(StorageError):
            return not is_there(self._run.attempts)
        return False

    def output_is_claimed(self) -> bool:
        """Whether some rank has told the user why the run ends, as far as can be seen now."""
        try:
            return self.roll_call().claimed
        except OSError:
            return False

    def _is_ours(self) -> bool:
        """Whether the files of these names are ours: in a folder that was removed and made anew
        they are those of another run."""
        if self._nonce is None:
            return True
        with suppress(StorageError):
            found = read_attempt(self._run, self._attempt)
            return found is None or found.nonce == self._nonce
        return True

    def _name(self, rank: int) -> str:
        return f"rank-{rank:04d}"

    def _read(self, rank: int, most: int) -> tuple[float | None, bytes]:
        """When a rank's file was written last, and up to `most` bytes of it."""
        try:
            path = entry_file(self._run, self._attempt, self._name(rank))
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.fstat(file).st_mtime, os.pread(file, most, 0) if most else b""
            finally:
                os.close(file)
        except OSError:
            return None, b""


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))


def diagnose(
    heartbeats: RankHeartbeats, rank: int, patience: float
) -> tuple[dict[int, ExitNote], list[int]]:
    """Wait until it is clear what became of each other rank: it left a note, is dead, or lives.

    Hundreds of ranks ask that in the same moment. So each lists names, ever more seldom, and looks
    twice at the files of ranks that left no note, if those are few. Where they are many, only the
    lowest rank that left a note does; it is the first to lose patience, and when it has spoken the
    others end.

    Args:
        heartbeats: the ranks.
        rank: this one, which has left its own note.
        patience: seconds after which a rank without any sign counts as dead.

    Returns:
        The notes of all (those of ranks that only wait without their words), and the ranks that are
        dead or silent.
    """
    inquiry, pause = _Inquiry(heartbeats, rank), 0.1 * (1 + rank / heartbeats.world)
    while rest := inquiry.ask(patience):
        time.sleep(min(pause, rest))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    return inquiry.notes, inquiry.gone


class _Inquiry:
    """What one rank knows of the others; `notes` and `gone` are what `diagnose` returns."""

    def __init__(self, heartbeats: RankHeartbeats, rank: int) -> None:
        self._heartbeats, self._rank = heartbeats, rank
        self._began = time.monotonic()
        self._claimed: float | None = None  # when it was seen that somebody explains the end
        self._first: dict[int, Sight] = {}  # of ranks that had left no note
        self._last: dict[int, Sight] = {}
        self.notes: dict[int, ExitNote] = {}
        self.gone: list[int] = []

    def ask(self, patience: float) -> float:
        """List the names once more; returns the seconds that are left to wait, 0 if none are."""
        missing, now = self._call_roll(), time.monotonic()
        lowest = self._rank <= min(self.notes, default=self._rank)
        if self._claimed is None:
            mine = len(missing) <= LOOKS or (lowest and now > self._began + _MARGIN_S)
            if mine and not self._first:
                self._began = now  # whether they live is seen from here on
            until = self._began + patience + (0 if lowest else _LATER_S)
            if mine and (not self._first or now >= until):
                self._look_at(missing)
        else:
            until = self._claimed + _MARGIN_S  # the note of who explains it may come after that
        unclear, self.gone = [], []
        for rank in (rank for rank in missing if rank not in self.notes):
            sight = self._last.get(rank)
            dead = sight is not None and sight.record is not None and sight.record.is_dead()
            still = sight is not None and sight.sign == self._first[rank].sign
            unclear += [rank] if not dead and (still or sight is None) else []
            self.gone += [rank] if dead or still else []
        faulty = any(not note.waits for note in self.notes.values())
        return 0.0 if faulty or not unclear else max(0.0, until - now)

    def _call_roll(self) -> list[int]:
        """Note who left a note; returns the ranks that left none."""
        try:
            roll = self._heartbeats.roll_call()
        except OSError:  # perhaps the next time
            roll = RollCall({}, claimed=False)
        if roll.claimed and self._claimed is None:
            self._claimed = time.monotonic()
        faulty = sorted(rank for rank, waits in roll.ended.items() if not waits)
        waiting = ExitNote(MachineError.exit_code, "", waits=True)
        self.notes |= {rank: waiting for rank, waits in roll.ended.items() if waits}
        self.notes |= self._heartbeats.notes(faulty[:LOOKS])
        known = {self._rank, *roll.ended, *self.notes}
        return [rank for rank in range(self._heartbeats.world) if rank not in known]

    def _look_at(self, ranks: list[int]) -> None:
        for rank in ranks:
            sight = self._last[rank] = self._heartbeats.look(rank)
            self._first.setdefault(rank, sight)
            if sight.note is not None:
                self.notes[rank] = sight.note
