"""Which file system is full, and what is free on it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LITTLE = 2**20  # bytes: a file system with less is told as full where no file is named
# What is written to without being named by a job, and the variable that says where that is.
_PLACES = (
    *(("TMPDIR", ""), ("SPANTUNE_CACHE", "~/.cache/spantune"), ("XDG_CACHE_HOME", "~/.cache")),
    *(("HF_HOME", "~/.cache/huggingface"), ("HOME", "~"), ("", "/dev/shm"), ("", ".")),
)


def is_full(error: BaseException) -> bool:
    """Whether an error is that of a full disk or a used-up quota."""
    return isinstance(error, OSError) and error.errno in _FULL


def full_disk(error: BaseException | None) -> OSError | None:
    """The full disk that an error is, or that it comes from."""
    while error is not None:
        if isinstance(error, OSError) and is_full(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def no_room(error: OSError, place: str | Path | None) -> str:
    """Say of a full disk where it is, and what to do.

    Args:
        error: as `full_disk` finds it.
        place: what was being written; None: the file that the error names, or else what is found
            full by a look at all places that are written to.
    """
    named = place or error.filename2 or error.filename
    path = Path(os.fsdecode(named)) if named else _full_place()
    # What a quota leaves is not what the file system tells.
    there = f"{room(path)} there: " if path and error.errno != errno.EDQUOT else ""
    return f"{path or 'a file'}: {error.strerror}; {there}free some space or choose another folder"


def reason(error: OSError) -> str:
    """Why an operation on a file failed; of a full disk also that inodes are lacking, if so."""
    lacks = is_full(error) and error.filename and _free(Path(os.fsdecode(error.filename))) == -1
    return f"{error.strerror}{' (no inode is free)' if lacks else ''}"


def room(path: Path, unit: str = "bytes ") -> str:
    """What is free on the file system on which a path is or would be: `12,345 bytes are free`."""
    free = _free(path)
    if free is None:
        return "how many bytes are free cannot be told"
    if free < 0:
        return "no inode is free"
    return f"{free:,} {unit}are free"


def _free(path: Path) -> int | None:
    """Bytes; -1 where there may be no further file, None where it cannot be told."""
    path = path.absolute()
    while path != path.parent and not path.exists():
        path = path.parent
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return -1 if found.f_files and not found.f_favail else found.f_bavail * found.f_frsize


def _full_place() -> Path | None:
    for variable, usual in _PLACES:
        named = os.environ.get(variable) or usual or tempfile.gettempdir()
        place = Path(named).expanduser()
        free = _free(place)
        if free is not None and free < _LITTLE:
            return place
    return None
