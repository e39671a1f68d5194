"""Removes the checkpoints of a finished run, which nothing reads any more: the tuned weights stand
in `model/`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.checkpoint.store import CheckpointStore
from runner.errors import DataError, RunDirError
from runner.run.folder import RunDir, checkpoint_place
from runner.run.lease import Lease
from runner.run.ownership import check_ours
from runner.run.provenance import read_record
from runner.utils.files import Fence, below_here, file_sha256, is_there, storage_errors
from runner.utils.text import megabytes

Kept = Literal["none", "best", "all"]  # train.keep_checkpoints

_OURS = re.compile(r"step-|damaged-step-|\.stage-|\.trash-")  # names that the store gives


@dataclass(frozen=True)
class Superfluous:
    """What a finished run has no more use for.

    Attributes:
        names: folders in `checkpoints/`.
        bytes: that their removal sets free; what `model/` holds too is not counted.
    """

    names: list[str]
    bytes: int

    def __str__(self) -> str:
        count = len(self.names)
        return f"{count} checkpoint{'s' * (count != 1)}, {megabytes(self.bytes)}"


def find_superfluous(run: RunDir, keep: Kept) -> Superfluous:
    """What may be removed of a run, which must be finished.

    Raises:
        DataError: if its checkpoints stand elsewhere, behind a link, or which of them is the best
            cannot be told.
        StorageError: if they cannot be listed now.
    """
    if keep == "all" or not is_there(run.checkpoints):
        return Superfluous([], 0)
    if run.checkpoints.is_symlink():
        raise DataError(f"{run.checkpoints}: is a link, which is not followed: remove it yourself")
    best = read_record(run.result).get("step") if keep == "best" else None
    with storage_errors(run.checkpoints):
        folders = [
            path
            for path in sorted(run.checkpoints.iterdir())
            if _OURS.match(path.name) and path.is_dir() and not path.is_symlink()
        ]
        removed = [path for path in folders if best is None or not _holds_best(path, best)]
        if best is not None and len(removed) == len(folders):
            raise DataError(
                f"{run.checkpoints}: none is of step {best}, which {run.result.name} names as the"
                " best: nothing was removed"
            )
        return Superfluous([path.name for path in removed], sum(map(_freed, removed)))


def remove_superfluous(run: RunDir, found: Superfluous, fence: Fence) -> None:
    """Remove what `find_superfluous` has found; a removal that is cut short is ended by the next.

    Raises:
        RunDirError: by `fence`, if the folder is no longer ours.
        StorageError: if something cannot be removed.
    """
    store = CheckpointStore(run.checkpoints, 0, fence=fence)
    with storage_errors(run.checkpoints):
        store.clean()
        store.remove([name for name in found.names if not name.startswith(".")])
        if not any(run.checkpoints.iterdir()):
            fence()
            run.checkpoints.rmdir()


def prune(run: RunDir, keep: Kept, *, dry: bool = False) -> Superfluous:
    """Remove what a finished run that nobody runs has no more use for; with `dry`, only look.

    Raises:
        DataError: if the folder is none of ours, `model/` has other weights than the result names,
            or as `find_superfluous`.
        RunDirError: if the run is not finished, or somebody is running it.
        StorageError: if something cannot be read or removed.
    """
    check_ours(run)
    _check_finished(run)
    found = find_superfluous(run, keep)
    if dry or not found.names:
        return found
    lease = Lease.acquire(run)
    try:
        _check_finished(run)  # another start may have begun anew, and be over
        _check_model(run)
        found = find_superfluous(run, keep)
        remove_superfluous(run, found, lease.verify)
    finally:
        lease.release(0)
    return found


def _check_finished(run: RunDir) -> None:
    if not run.finished():
        raise RunDirError(
            f"{below_here(run.path)}: has no {run.result.name}, so it is not finished and goes on"
            " from its checkpoints; none was removed"
        )


def _check_model(run: RunDir) -> None:
    """Make sure that `model/` has the weights: the checkpoints may be all that is left of them."""
    weights, named = run.weights, read_record(run.result).get("weights_sha256")
    with storage_errors(weights):
        whole = is_there(weights) and file_sha256(weights) == named
    if not whole:
        raise DataError(
            f"{weights}: does not hold the weights that {run.result.name} names, so the checkpoints"
            " may be all that is left of them; none was removed"
        )


def _holds_best(folder: Path, step: object) -> bool:
    place = checkpoint_place(folder.name)
    return place is not None and place[0] == step and (folder / "best").is_dir()


def _freed(folder: Path) -> int:
    found = [path.lstat() for path in folder.rglob("*") if not path.is_dir()]
    return sum(status.st_size for status in found if status.st_nlink == 1)
