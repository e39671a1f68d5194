"""Ranks that share a checkpoint save it together, or not at all, and load the same one.

Every step of either is agreed: a rank that fails tells the others, and all of them take the same
way on. Nothing here knows what a checkpoint means or how ranks talk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from runner.checkpoint.store import CheckpointStore, DamagedError, Manifest, Stage
from runner.errors import DataError, StorageError
from runner.run.attempts import sealed
from runner.run.lease import Lease

Value = TypeVar("Value")


class Talk(Protocol):
    """How the ranks that share a checkpoint hear from each other."""

    index: int

    def everyone(self, value: Value) -> list[Value]:
        """Give a value to every rank; returns the values of all, by rank."""
        ...


def agree(talk: Talk, work: Callable[[], object]) -> None:
    """Do something that may fail on some ranks before all of them do something together. Every rank
    must call this.

    Raises:
        StorageError: on every rank, if it failed on any.
    """
    failures = _tried(talk, work)
    if failures:
        raise StorageError("; ".join(failures))


def save(
    store: CheckpointStore,
    talk: Talk,
    name: str,
    write: Callable[[Stage], None],
    facts: Mapping[str, Any],
    fence: Callable[[], None],
) -> int:
    """Commit a checkpoint of all ranks, or none of it. Every rank must call this.

    Args:
        store: of this rank.
        talk: to the other ranks.
        name: the checkpoint's, the same on every rank.
        write: puts this rank's files into the stage.
        facts: JSON, of rank 0.
        fence: raises if the run is no longer ours; asked by rank 0 before the rename.

    Returns:
        The checkpoint's size in bytes.

    Raises:
        StorageError: on every rank, if any rank could not write: naming rank, file, reason and the
            bytes that are needed. What was committed before is untouched.
    """
    main = talk.index == 0
    stage = store.stage(name)
    failures = _tried(talk, lambda: store.begin(name) if main else None)
    if not failures:
        failures = _tried(talk, lambda: write(stage))
    if not failures:
        failures = _tried(talk, lambda: store.check_staged(stage))
    needed = sum(talk.everyone(stage.wanted))
    entries = {file: e for part in talk.everyone(stage.entries) for file, e in part.items()}
    if not failures:

        def finish() -> None:
            fence()
            store.commit(name, entries, facts)

        failures = _tried(talk, finish if main else lambda: None)
    if failures:
        _tried(talk, lambda: store.abandon(name) if main else None)
        raise StorageError(f"{'; '.join(failures)}; a checkpoint needs {needed:,} bytes")
    return needed


def adopt_checkpoints(store: CheckpointStore, talk: Talk, attempt: Lease | None) -> list[str]:
    """Settle which checkpoints count from now on, and remove what was never finished. Every rank
    must call this; `attempt` is rank 0's claim, None elsewhere.

    Returns:
        Their names, newest first.

    Raises:
        DataError: if the run has lost all that it had: to begin anew in silence would be to throw
            away what the user has.
        StorageError: if folder or ledger cannot be read and written.
    """
    names: list[str] = []
    lost: list[str] = []

    def settle() -> None:
        if attempt is None:
            return
        since, counted = sealed(attempt.run)
        names.extend(store.names(since, counted))
        if not names:
            lost.extend(sorted({*counted, *store.damaged(since, counted)}))
        if not lost:  # else what counted stays written down, for the next start to be refused too
            attempt.seal(names)
            store.clean()

    agree(talk, settle)
    names, lost = talk.everyone((names, lost))[0]
    if lost:
        raise _nothing_whole(store, len(lost))
    return names


def rotate(
    store: CheckpointStore,
    attempt: Lease,
    best: str | None,
    best_of: Callable[[Manifest], str | None],
) -> None:
    """Remove all checkpoints that count but the newest two, and what they know as the best (rank
    0); call it only after the newest has been read back.

    Args:
        store: of this rank.
        attempt: the claim on the run.
        best: the checkpoint that holds the best weights now.
        best_of: the one that held them when a checkpoint was made. Should the newest be damaged,
            the run goes on from the second, which is of no use without its own best.

    Raises:
        OSError, DamagedError: nothing, or not everything, was removed.
    """
    names = store.names(*sealed(attempt.run))
    attempt.verify()
    if names[2:]:
        kept = {*names[:2], best, best_of(store.manifest(names[1]))}
        store.remove([name for name in names if name not in kept])


def newest(
    store: CheckpointStore,
    talk: Talk,
    names: Sequence[str],
    examine: Callable[[Manifest], None],
    warn: Callable[[str], None],
) -> Manifest | None:
    """Find the newest checkpoint that is whole; damaged ones are put aside with a warning. Every
    rank must call this.

    Args:
        store: of this rank.
        talk: to the other ranks.
        names: the checkpoints that count, newest first, as rank 0 sees them.
        examine: holds a manifest against what this start can load, on every rank; raises
            DamagedError where a checkpoint before this one may do better.
        warn: told of each damaged one, on rank 0.

    Returns:
        Its manifest; None if there are no checkpoints.

    Raises:
        DataError: if there are some but none is whole.
        StorageError: if one cannot be read now. That says nothing about what it holds: nothing is
            put aside.
    """
    main = talk.index == 0
    names = talk.everyone(list(names))[0]
    for name in names:
        found: list[Manifest] = []
        damage: list[str] = []

        def look(
            name: str = name, found: list[Manifest] = found, damage: list[str] = damage
        ) -> None:
            try:
                manifest = store.manifest(name)
                examine(manifest)
                mine = (file for file, entry in manifest.files.items() if entry.rank == talk.index)
                store.check(manifest, mine)
                found.append(manifest)
            except DamagedError as error:
                damage.append(str(error))

        failures = _tried(talk, look)
        if failures:
            raise StorageError(
                f"{'; '.join(failures)}; no checkpoint was touched, and the same command tries"
                " again"
            )
        damages = _of_ranks([part[0] if part else None for part in talk.everyone(damage)])
        if not damages:
            return found[0]

        def put_aside(name: str = name, text: str = damages[0]) -> None:
            warn(f"{text}; this checkpoint is put aside as {store.quarantine(name)}")

        agree(talk, put_aside if main else lambda: None)
    if names:
        raise _nothing_whole(store, len(names))
    return None


def _nothing_whole(store: CheckpointStore, count: int) -> DataError:
    return DataError(
        f"{store.folder}: none of its {count} checkpoints is whole and there; damaged-* is what is"
        " left of one; --restart begins anew"
    )


def _tried(talk: Talk, work: Callable[[], object]) -> list[str]:
    """Do this rank's part; returns the failures of all ranks, none if every part succeeded."""
    failure = None
    try:
        work()
    except StorageError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return _of_ranks(talk.everyone(failure))


def _of_ranks(texts: Sequence[str | None]) -> list[str]:
    """The texts that there are, each with its rank."""
    return [
        text if len(texts) == 1 else f"rank {rank}: {text}"
        for rank, text in enumerate(texts)
        if text is not None
    ]
