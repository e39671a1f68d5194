"""Ranks that share a checkpoint save it together, or not at all, and load the same one.

Every step of either is agreed: a rank that fails tells the others, and all of them take the same
way on. Nothing here knows what a checkpoint means or how ranks talk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from runner.checkpoint.store import CheckpointStore, DamagedError, Manifest, Stage
from runner.errors import DataError, StorageError
from runner.run.attempts import begun_anew, sealed
from runner.run.lease import Lease
from runner.utils.disk import reason


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a checkpoint, as this one sees them.

    Attributes:
        index: this rank.
        all_gather: gives a value to every rank; returns the values of all, by rank.
    """

    index: int
    all_gather: Callable[[Any], list[Any]]


def agree(ranks: Ranks, work: Callable[[], object]) -> None:
    """Do something that may fail on some ranks before all of them do something together. Every rank
    must call this.

    Raises:
        StorageError: on every rank, if it failed on any.
    """
    failures = _tried(ranks, work)
    if failures:
        raise StorageError("; ".join(failures))


def save(
    store: CheckpointStore,
    ranks: Ranks,
    name: str,
    write: Callable[[Stage], None],
    facts: Mapping[str, Any],
) -> int:
    """Commit a checkpoint of all ranks, or none of it. Every rank must call this.

    Args:
        store: of this rank.
        ranks: all of them.
        name: the checkpoint's, the same on every rank.
        write: puts this rank's files into the stage.
        facts: JSON, of rank 0.

    Returns:
        The checkpoint's size in bytes.

    Raises:
        StorageError: on every rank, if any rank could not write: naming rank, file, reason and the
            bytes that are needed. What was committed before is untouched.
    """
    main = ranks.index == 0
    stage = store.stage(name)
    failures = _tried(ranks, lambda: store.begin(name) if main else None)
    if not failures:
        failures = _tried(ranks, lambda: write(stage))
    if not failures:
        failures = _tried(ranks, lambda: store.check_staged(stage))
    needed = sum(ranks.all_gather(stage.wanted))
    entries = {file: e for part in ranks.all_gather(stage.entries) for file, e in part.items()}
    if not failures:
        failures = _tried(ranks, lambda: store.commit(name, entries, facts) if main else None)
    if failures:
        _tried(ranks, lambda: store.abandon(name) if main else None)
        size = f"; a checkpoint needs {needed:,} bytes or more" if needed else ""
        raise StorageError(f"{'; '.join(failures)}{size}")
    return needed


def adopt_checkpoints(store: CheckpointStore, ranks: Ranks, lease: Lease | None) -> list[str]:
    """Settle which checkpoints count from now on, and remove what was never finished. Every rank
    must call this; `lease` is rank 0's, None elsewhere.

    Returns:
        Their names, newest first.

    Raises:
        DataError: if the run has lost all that it had, or what of it counts: to begin anew in
            silence would be to throw away what the user has.
        StorageError: if folder or ledger cannot be read and written.
    """
    names: list[str] = []
    refusals: list[str] = []

    def settle() -> None:
        if lease is None:
            return
        try:
            names.extend(_those_that_count(store, lease))
        except DataError as error:  # what counted stays written down: the next start is refused too
            refusals.append(str(error))
            return
        lease.seal(names)
        store.clean()

    agree(ranks, settle)
    names, refusals = ranks.all_gather((names, refusals))[0]
    if refusals:
        raise DataError(refusals[0])
    return names


def _those_that_count(store: CheckpointStore, lease: Lease) -> list[str]:
    since, counted = sealed(lease.run)
    names = store.names(since, counted)
    if names:
        return names
    lost = {*counted, *store.damaged(since, counted)}
    if lost:
        raise _nothing_whole(store, len(lost))
    # What stands there and counts no more is passed over only if its user has begun anew since.
    others = store.names(begun_anew(lease.run), ())
    if others:
        raise DataError(
            f"{store.folder}: none of its {len(others)} checkpoints counts: attempts/ names none of"
            " them; put back what it had, or begin anew with --restart"
        )
    return []


def rotate(
    store: CheckpointStore,
    lease: Lease,
    best: str | None,
    best_of: Callable[[Manifest], str | None],
) -> None:
    """Remove all checkpoints that count but the newest two, and what they know as the best (rank
    0); call it only after the newest has been read back.

    Args:
        store: of this rank.
        lease: on the run folder.
        best: the checkpoint that holds the best weights now.
        best_of: the one that held them when a checkpoint was made. Should the newest be damaged,
            the run goes on from the second, which is of no use without its own best.

    Raises:
        OSError, DamagedError: nothing, or not everything, was removed.
    """
    names = store.names(*sealed(lease.run))
    lease.verify()
    if names[2:]:
        kept = {*names[:2], best, best_of(store.manifest(names[1]))}
        store.remove([name for name in names if name not in kept])


def newest(
    store: CheckpointStore,
    ranks: Ranks,
    names: Sequence[str],
    examine: Callable[[Manifest], None],
    warn: Callable[[str], None],
) -> Manifest | None:
    """Find the newest checkpoint that is whole; damaged ones are put aside with a warning. Every
    rank must call this.

    Args:
        store: of this rank.
        ranks: all of them.
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
    main = ranks.index == 0
    names = ranks.all_gather(list(names))[0]
    for name in names:
        found: list[Manifest] = []
        damage: list[str] = []
        failures = _tried(
            ranks, partial(_check_mine, store, ranks.index, name, examine, found, damage)
        )
        if failures:
            raise StorageError(
                f"{'; '.join(failures)}; no checkpoint was touched, and the same command tries"
                " again"
            )
        damages = _of_ranks([part[0] if part else None for part in ranks.all_gather(damage)])
        if not damages:
            return found[0]

        def put_aside(name: str = name, text: str = damages[0]) -> None:
            warn(f"{text}; this checkpoint is put aside as {store.quarantine(name)}")

        agree(ranks, put_aside if main else lambda: None)
    if names:
        raise _nothing_whole(store, len(names))
    return None


def _check_mine(
    store: CheckpointStore,
    rank: int,
    name: str,
    examine: Callable[[Manifest], None],
    found: list[Manifest],
    damage: list[str],
) -> None:
    """Hold this rank's files against the manifest; adds it to `found`, or says what is damaged."""
    try:
        manifest = store.manifest(name)
        examine(manifest)
        store.check(manifest, (f for f, entry in manifest.files.items() if entry.rank == rank))
        found.append(manifest)
    except DamagedError as error:
        damage.append(str(error))


def _nothing_whole(store: CheckpointStore, count: int) -> DataError:
    return DataError(
        f"{store.folder}: none of its {count} checkpoints is whole and there; damaged-* is what is"
        " left of one; --restart begins anew"
    )


def _tried(ranks: Ranks, work: Callable[[], object]) -> list[str]:
    """Do this rank's part; returns the failures of all ranks, none if every part succeeded."""
    failure = None
    try:
        work()
    except StorageError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.filename}: {reason(error)}" if error.filename else str(error)
    return _of_ranks(ranks.all_gather(failure))


def _of_ranks(texts: Sequence[str | None]) -> list[str]:
    """The texts that there are, each with its rank."""
    return [
        text if len(texts) == 1 else f"rank {rank}: {text}"
        for rank, text in enumerate(texts)
        if text is not None
    ]
