"""The file operations of the checkpoint store, one method each, and how they become durable files
with known hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 8 * 2**20  # bytes read or hashed at once
# What says that a file is not the one that was written, now and at the next try. Anything else
# (EIO, ESTALE, EACCES, EMFILE ...) may have passed by then.
_LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG)


class Files:
    """What the store asks of the system. Each method is one operation, so that a test can make any
    of them fail, or kill the process before or after it."""

    def make_folder(self, path: Path) -> None:
        """Make a folder; its parent must be there, itself it must not."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Make a new file and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, file: int, data: memoryview) -> int:
        """Write some of `data` and return how many bytes."""
        return os.write(file, data)

    def open(self, path: Path) -> int:
        """Open a file for reading; a link is none."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def forget(self, file: int) -> None:
        """Let the next reads of a synced file come from the disk, where the system can do so."""
        with suppress(OSError):  # it is advice only; the content is the same either way
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, file: int, size: int) -> bytes:
        """Read up to `size` bytes; none at the end."""
        return os.read(file, size)

    def sync(self, file: int) -> None:
        """Wait until a file's content is on the disk."""
        os.fsync(file)

    def close(self, file: int) -> None:
        """Close a descriptor; a network file system may report a full disk only here."""
        os.close(file)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name, in one step."""
        os.rename(old, new)

    def sync_folder(self, path: Path) -> None:
        """Wait until a folder's names are on the disk."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno != errno.EINVAL:  # file systems that have no such thing
                raise
        finally:
            os.close(file)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def names(self, path: Path) -> list[str]:
        """Names in a folder, sorted; none if it is not there."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint: its size in bytes, the sha256 of its content, the rank that wrote
    it."""

    bytes: int
    sha256: str
    rank: int


class Writer:
    """A new file that hashes what is written into it; torch.save takes it for a file object.

    A failed write does not raise, because torch's own writer would hide the reason behind one of
    its own: what follows is counted and thrown away, and `entry` raises.
    """

    def __init__(self, files: Files, path: Path, rank: int) -> None:
        self._files, self._path, self._rank = files, path, rank
        self._digest = hashlib.sha256()
        self._file: int | None = None
        self.error: OSError | None = None
        self.wanted = 0  # bytes that the file would have
        try:
            self._file = files.create(path)
        except OSError as error:
            self.error = error

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`, all of it."""
        view = memoryview(data).cast("B")
        self.wanted += len(view)
        if self.error is None and self._file is not None:
            self._digest.update(view)
            try:
                left = view
                while left:
                    left = left[self._files.write(self._file, left) :]
            except OSError as error:
                self.error = error
        return len(view)

    def flush(self) -> None:
        """Nothing is held back: there is no buffer."""

    def close(self) -> None:
        """Wait for the disk and close the file; `entry` tells whether all went well."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if self.error is None:
                self._files.sync(file)
        except OSError as error:
            self.error = error
        try:
            self._files.close(file)
        except OSError as error:
            self.error = self.error or error

    def entry(self) -> Entry:
        """What was written.

        Raises:
            OSError: the first failure of any operation on the file.
        """
        if self.error is not None:
            self.error.filename = self.error.filename or str(self._path)
            raise self.error
        return Entry(self.wanted, self._digest.hexdigest(), self._rank)


def is_lasting(error: OSError) -> bool:
    """Whether a failed read says that the file itself is wrong, and not only that it cannot be read
    now."""
    return error.errno in _LASTING


def measure(
    files: Files, path: Path, rank: int, *, sync: bool = False, fresh: bool = False
) -> Entry:
    """Hash a file as it stands on the disk; with `sync`, first wait until it does; with `fresh`,
    not as the system remembers it.

    Raises:
        OSError: if it cannot be read, or is a link or no regular file.
    """
    try:
        file = files.open(path)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "is no regular file")
            if sync:
                files.sync(file)
            if fresh:
                files.forget(file)
            digest, size = hashlib.sha256(), 0
            for chunk in _chunks(files, file):
                digest.update(chunk)
                size += len(chunk)
        finally:
            files.close(file)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return Entry(size, digest.hexdigest(), rank)


def read_whole(files: Files, path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        OSError: if it cannot be read, is a link, or is longer.
    """
    try:
        file = files.open(path)
        try:
            return b"".join(_chunks(files, file, limit))
        finally:
            files.close(file)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remove_tree(files: Files, path: Path) -> None:
    """Remove a folder and all in it; links are removed, never followed."""
    if path.is_symlink():
        files.remove(path)
        return
    for name in files.names(path):
        inner = path / name
        if inner.is_dir() and not inner.is_symlink():
            remove_tree(files, inner)
        else:
            files.remove(inner)
    files.remove_folder(path)


def _chunks(files: Files, file: int, limit: int | None = None) -> Iterator[bytes]:
    size = 0
    while chunk := files.read(file, _CHUNK):
        size += len(chunk)
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"has more than {limit} bytes")
        yield chunk
