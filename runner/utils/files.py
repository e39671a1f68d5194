"""Writes files whole or not at all, and says in a sentence why that failed; reads JSON as what it
is declared to be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from runner.errors import RunnerError, StorageError
from runner.utils.disk import full_disk, is_full, no_room
from runner.utils.text import first_problem

Kind = TypeVar("Kind")
Fence = Callable[[], None]  # raises if a folder is no longer ours


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
    # A pipe that nobody reads is an error, which to open would else wait for ever.
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def write_atomic(path: Path, text: str, fence: Fence | None = None) -> None:
    """Write a text file aside and rename it into place; `fence`, asked before the rename, raises
    if the place is no longer ours.

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
            if fence is not None:
                fence()
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, to be filled. It takes that name in the end, unless
    somebody else has stored there first: theirs will do. After an exception nothing is left.

    Raises:
        OSError: if it cannot be made or renamed.
    """
    # Not named after the process: two machines that share the place may have the same number.
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        aside.mkdir(parents=True)
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: Any, fence: Fence | None = None) -> None:
    """Write a record (a dataclass) or plain values as indented JSON, as `write_atomic`."""
    write_atomic(path, json.dumps(to_jsonable(value), indent=2, ensure_ascii=False) + "\n", fence)


def to_jsonable(value: Any) -> Any:
    """What `json.dumps` takes for a record; other values as they are."""
    if not is_dataclass(value):
        return value
    return _adapter(type(value)).dump_python(value, mode="json", by_alias=True, warnings="error")


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON file as what it is declared to be.

    Args:
        path: the file.
        kind: a dataclass, whose keys are all there and no others; `list[str]`; `dict[str, Any]`.

    Raises:
        OSError: if it cannot be read.
        ValueError, RecursionError: if it is no JSON or something else, in one line.
    """
    return parse_json(read_regular(path).decode("utf-8"), kind)


def read_regular(path: Path, start: int = 0, most: int = -1) -> bytes:
    """Read a file of a folder that anybody may have filled: up to `most` bytes from `start` on.

    Raises:
        OSError: if it cannot be read, or is no file but a pipe, say, which would block for ever.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        file.seek(start)
        return file.read(most)


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def parse_json(text: str | bytes, kind: type[Kind]) -> Kind:
    """As `read_json`, of a text."""
    adapter = _adapter(kind)
    try:
        try:
            return adapter.validate_json(text, strict=True, extra="forbid")
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise
        # `json` says better what is wrong; and it takes \udcff, the spelling of a byte of a file
        # name that is no UTF-8, which pydantic refuses.
        return adapter.validate_python(json.loads(text), extra="forbid")
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@contextmanager
def storage_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an OSError into one sentence that names the file and, for a full disk or quota, what to
    do. The file is `path`, unless the error names one that is neither in nor beside it."""
    try:
        yield
    except shutil.Error as error:  # of a whole folder: (from, to, why) of each file
        found = error.args[0]
        raise StorageError(f"{found[0][1]}: {found[0][2]}" if found else str(path)) from error
    except OSError as error:
        name = _failed(error, path)
        if is_full(error):
            raise StorageError(no_room(error, name)) from error
        raise StorageError(f"{name or 'a file'}: {error.strerror or error}") from error


@contextmanager
def rust_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors and tokenizers raise where they cannot write into an OSError: the
    system's number stands only in their text, "... (os error 28)"."""
    try:
        yield
    except Exception as error:
        from safetensors import SafetensorError

        found = re.search(r"os error (\d+)", str(error))
        if isinstance(error, OSError) or not (found or isinstance(error, SafetensorError)):
            raise
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def is_there(path: Path) -> bool:
    """Whether a file or folder is there; `Path.exists` takes much that cannot be read for absent.

    Raises:
        StorageError: if that cannot be told now; it may well be there.
    """
    with storage_errors(path):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def _failed(error: OSError, path: Path | None) -> Path | None:
    named = error.filename2 or error.filename
    if not isinstance(named, str | bytes | os.PathLike):
        return path
    found = Path(os.fsdecode(named))
    near = path is not None and {path, path.parent} & set(found.parents)
    return path if near else found


@contextmanager
def full_disk_errors() -> Iterator[None]:
    """Tell a full disk as such, wherever it was found and whatever a library made of it.

    Raises:
        StorageError: naming the file system that is full.
    """
    try:
        yield
    except RunnerError:
        raise
    except Exception as error:
        full = full_disk(error)
        if full is None:
            raise
        raise StorageError(no_room(full, None)) from error
