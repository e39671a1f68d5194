"""Writes files whole or not at all, and says in a sentence why that failed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.errors import StorageError


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def below_here(name: str | Path) -> str:
    """Spell a path relative to the current folder where it is below it; other names stay."""
    path, here = Path(name), Path.cwd()
    return str(path.relative_to(here)) if here in path.parents else str(name)


def open_own(path: Path, mode: str, **options: Any) -> Any:
    """Open a text file of a run; a link that somebody has put in its place is refused, because it
    could lead to a file that is not the run's."""
    return open(path, mode, encoding="utf-8", opener=_without_links, **options)


def _without_links(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file aside and rename it into place.

    Raises:
        StorageError: naming the file and the reason; what stood there before is untouched.
    """
    with storage_errors(path):
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            # A command line may hold bytes that are no UTF-8; \udcff is their spelling in JSON too.
            with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, aside and renamed."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def storage_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an OSError into one sentence that names the file and, for a full disk or quota, what to
    do."""
    try:
        yield
    except OSError as error:
        name = path or error.filename or "a file"
        hint = "; free some space or choose another folder with --runs" if _is_full(error) else ""
        raise StorageError(f"{name}: {error.strerror or error}{hint}") from error


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
