"""Watches over one rank of a run: shows that it lives, notices that it makes no progress or that
another rank is gone, and finds whose fault it is."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from runner.distributed.heartbeat import LOOKS, RANK_BEAT_S, ExitNote, RankHeartbeats, diagnose
from runner.errors import MachineError, RunnerError, StorageError
from runner.run.lease import Lease
from runner.utils.console import print_error
from runner.utils.text import duration

TICK_S = 1.0  # seconds between two looks
# There may be hundreds of ranks and one file server: each asks at most one operation in 5 s of it,
# and rank 0 a listing a second.
SIGN_OF_LIFE_S = RANK_BEAT_S + 7  # seconds in which a living rank surely shows itself
LOOK_S = 15.0  # seconds at most between two looks whether the run has ended elsewhere
NEIGHBOUR_S = 120.0  # seconds at most between two looks at another rank that is heard
NAMED = 8  # ranks at fault that are named; a machine often has as many
LONG_WORK_FACTOR = 12  # times as long as a step may take reading the data, saving and the like
# Where a main thread stands that waits for other ranks.
_WAITING = ("torch/distributed", "deepspeed/comm", "runner/distributed/collectives")


class Watchdog:
    """Follows this rank's main thread from a thread of its own.

    Args:
        heartbeats: the ranks' files, this one's registered.
        rank: this one's number.
        seconds: without progress, or without another rank's sign of life, that are too many.
        lease: on the run folder, on rank 0.
        connection_lost: whether an exception means that the connection to other ranks broke.
    """

    def __init__(
        self,
        heartbeats: RankHeartbeats,
        rank: int,
        seconds: float,
        lease: Lease | None,
        connection_lost: Callable[[Exception], bool],
    ) -> None:
        self._heartbeats, self._rank, self._seconds = heartbeats, rank, seconds
        self._lease, self._connection_lost = lease, connection_lost
        self.rank = rank
        self.place, self._since, self._bounded = "the start", time.monotonic(), False
        self._now = self._thawed = time.monotonic()
        self._beat_s = min(RANK_BEAT_S, seconds / 4)
        # Few ranks may look at each tick; so does rank 0, which has the lease to give back.
        self._look_s = min(LOOK_S, heartbeats.world / 4) if rank else 0.0
        self._neighbour_s = min(NEIGHBOUR_S, seconds / 4)
        # Ranks begin in the same moment; each has its own share of it, so that they take turns.
        share = rank / heartbeats.world
        self._beaten = self._now - share * self._beat_s
        self._looked = self._now - share * self._look_s
        self._next_neighbour = self._now + seconds + share * self._neighbour_s
        self._silent: float | None = None  # when another rank was first found silent
        self._spoken: float | None = None  # when it was seen that the run ends
        self._over = threading.Event()
        threading.Thread(target=self._follow, daemon=True, name="watch").start()

    def progress_at(self, place: str, *, bounded: bool = True) -> None:
        """Note progress: where the main thread is now.

        Args:
            place: completes "stopped at ..."
            bounded: whether the next note has to come within the time of a step; False for work
                that takes long, or waits for a rank that does such work: WIDE times as much.
        """
        self.place, self._since, self._bounded = place, time.monotonic(), bounded

    def close(self) -> None:
        """Stop watching: this rank leaves as it should."""
        self._over.set()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Let the ranks end with one code and one explanation, whatever ends the block on any of
        them."""
        try:
            yield
        except RunnerError as error:
            self._over.set()
            self._heartbeats.leave_note(ExitNote(error.exit_code, str(error), waits=False))
            error.speaks = self._speaks(str(error))
            raise
        except Exception as error:
            self._over.set()
            if self._connection_lost(error):
                raise self._explained(error) from None
            first = (str(error).splitlines() or [""])[0]
            text = f"at {self.place}: {type(error).__name__}: {first}"
            self._speaks(traceback.format_exc(), at_once=True)
            self._heartbeats.leave_note(ExitNote(RunnerError.exit_code, text, waits=False))
            raise

    def _explained(self, error: Exception) -> RunnerError:
        """Why other ranks can no longer be reached."""
        first = " ".join(str(error).split())[:200]
        self._heartbeats.leave_note(
            ExitNote(MachineError.exit_code, f"cut off at {self.place}", waits=True)
        )
        if self._heartbeats.folder_is_gone():
            found = StorageError(f"the run folder was moved away or removed at {self.place}")
            found.speaks = self._speaks(str(found))
            return found
        notes, gone = diagnose(self._heartbeats, self._rank, SIGN_OF_LIFE_S)
        said = next(((r, w) for r, w in sorted(notes.items()) if not w.waits), None)
        if said is not None:
            found = RunnerError(_told_by(*said))
            found.exit_code = said[1].code
        elif gone:
            names = ", ".join(_few(gone, self._heartbeats.name))
            found = MachineError(
                f"{names} died without a word at {self.place}: killed, out of memory, or its"
                " machine failed; the same command goes on from the last checkpoint"
            )
        else:
            found = MachineError(f"the connection between ranks broke at {self.place}: {first}")
        found.speaks = self._speaks(str(found))
        return found

    def _speaks(self, words: str, *, at_once: bool = False) -> bool:
        """Whether this rank is the one that tells the user; it then tells the run's log too."""
        speaks = self._heartbeats.claim_output(at_once=at_once)
        if speaks:
            self._log(words)
        return speaks

    def _log(self, words: str) -> None:
        """Tell the run's log, unless the end of the lease does."""
        if self._lease is None:
            self._heartbeats.append_log(words)

    # --- the watching thread

    def _follow(self) -> None:
        looks = (
            *(self._see_end, self._see_stillness),
            # Only now: a rank that shows that it lives, and left no note, counts as a healthy one.
            *(self._beat, self._see_neighbour),
        )
        tick = min(TICK_S, self._seconds / 4)
        while not self._over.wait(tick):
            self._look_at_clock(tick)
            for look in looks:
                # What cannot be seen for a moment is seen at the next tick; where it matters,
                # writing says so.
                with suppress(OSError, StorageError):
                    look()

    def _look_at_clock(self, tick: float) -> None:
        """Take the time of this tick, once: between two looks this process may be suspended (by
        Ctrl-Z, a scheduler, a container), and in that time no rank could make progress."""
        before, self._now = self._now, time.monotonic()
        stopped = self._now - before - tick
        if stopped > tick:
            self._thawed = self._now
            self._since = min(self._now, self._since + stopped)
            self._spoken = self._spoken and self._spoken + stopped

    def _see_end(self) -> None:
        # A main thread that goes on will notice by itself, at the next exchange.
        still = self._now > self._since + self._beat_s
        if self._spoken is None and still and self._now > self._looked + self._look_s:
            self._looked = self._now
            if self._heartbeats.output_is_claimed():
                self._spoken = self._now
        if self._spoken is not None and self._now > self._spoken + SIGN_OF_LIFE_S:
            self._follow_out()

    def _see_stillness(self) -> None:
        if self._now - self._since > self._limit():
            self._give_up(self._own_place())

    def _beat(self) -> None:
        if self._now > self._beaten + self._beat_s:
            self._heartbeats.beat()
            self._beaten = self._now

    def _see_neighbour(self) -> None:
        """Each rank looks after the next one, the last after the first."""
        # After a thaw others may go on later than this one, and show themselves later.
        if self._now < max(self._next_neighbour, self._thawed + self._seconds):
            return
        other = (self._rank + 1) % self._heartbeats.world
        if (self._heartbeats.silence(other) or 0) <= self._seconds:
            self._next_neighbour, self._silent = self._now + self._neighbour_s, None
            return
        # Silent by the file system's clock, which may have been set: two more beats tell.
        self._next_neighbour = self._now + self._beat_s
        self._silent = self._silent or self._now
        confirmed = self._now > self._silent + 2 * self._beat_s
        if confirmed and not self._heartbeats.notes([other]):
            self._give_up(ExitNote(MachineError.exit_code, f"waited at {self.place}", waits=True))

    def _limit(self) -> float:
        """Seconds without a note that are too many here."""
        return self._seconds * (1 if self._bounded else LONG_WORK_FACTOR)

    def _follow_out(self) -> None:
        """End this rank after the run has ended elsewhere: its main thread does not notice, waiting
        on a device for a rank that is gone."""
        if not self._over.is_set():
            ended = sorted(self._heartbeats.roll_call().ended.items())
            faulty = [rank for rank, waits in ended if not waits][:LOOKS]
            said = next(iter(self._heartbeats.notes(faulty).items()), None)
            if said is not None:
                self._leave(said[1].code, _told_by(*said))
            else:
                self._leave(MachineError.exit_code, f"the run has ended without rank {self._rank}")

    def _leave(self, code: int, message: str, *, speaks: bool = False) -> None:
        try:
            if self._lease is not None:
                with suppress(RunnerError):  # the next start then waits for a silence
                    self._lease.release(code, message)
            if speaks:  # only now: printing may fail, or wait for ever
                print_error(message)
        finally:
            os._exit(code)

    def _own_place(self) -> ExitNote:
        """Where this rank's main thread is."""
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        stack = traceback.extract_stack(frame)
        waits = any(part in call.filename for call in stack[-6:] for part in _WAITING)
        ours = next((c for c in reversed(stack) if "site-packages" not in c.filename), stack[-1])
        text = f"hangs in {ours.name} ({os.path.basename(ours.filename)}:{ours.lineno})"
        return ExitNote(MachineError.exit_code, text, waits)

    def _give_up(self, mine: ExitNote) -> None:
        """End this rank: it or another one is stuck."""
        place, limit = self.place, self._limit()
        key = (
            "train.timeout_minutes"
            if self._bounded
            else f"{LONG_WORK_FACTOR} train.timeout_minutes"
        )
        self._heartbeats.leave_note(mine)
        notes, gone = diagnose(self._heartbeats, self._rank, SIGN_OF_LIFE_S)
        if self._over.is_set():
            return  # the main thread has come to an end meanwhile, and explains it
        speaks, words = self._heartbeats.claim_output(), ""
        if speaks or self._lease is not None:  # whose end is noted with them
            faults = "; ".join(self._faults(notes, gone))
            words = f"no progress at {place} for {duration(limit)} ({key}): {faults}"
        if speaks:
            self._log(words)
        self._leave(MachineError.exit_code, words, speaks=speaks)

    def _faults(self, notes: dict[int, ExitNote], gone: list[int]) -> list[str]:
        """What to say of ranks that are silent, and of those that hang by themselves; where all of
        them wait for each other, of each."""
        hanging = [rank for rank, said in sorted(notes.items()) if not said.waits]
        if not gone:
            hanging = hanging or sorted({*notes, self._rank})
        name, words = self._heartbeats.name, self._heartbeats.notes(hanging[:NAMED])
        hung = ExitNote(MachineError.exit_code, "hangs", waits=True)  # if it cannot be read now
        return [
            *_few(gone, lambda rank: f"{name(rank)} gives no sign of life"),
            *_few(hanging, lambda rank: f"{name(rank)} {words.get(rank, hung).text}"),
        ]


def _few(ranks: Sequence[int], describe: Callable[[int], str]) -> list[str]:
    """Describe ranks, of many only some."""
    more = [f"and {len(ranks) - NAMED} more"] if len(ranks) > NAMED else []
    return [*map(describe, ranks[:NAMED]), *more]


def _told_by(rank: int, note: ExitNote) -> str:
    """What a rank has left, with its name."""
    name = f"rank {rank}"
    return note.text if name in note.text else f"{name}: {note.text}"
