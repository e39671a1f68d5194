"""Takes back what a command that failed has written: its own files and folders, nothing else."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType

from runner.errors import RunnerError


class Undo:
    """Remembers what stood at some paths, and puts it back if the block ends with a RunnerError.

    A folder is removed only if it was not there before and is empty then: whatever somebody else
    has put into it stays.
    """

    def __init__(self) -> None:
        self._before: dict[Path, bytes | None] = {}

    def file(self, path: Path) -> None:
        """Note what is in a file that is to be written."""
        self.folder(path.parent)
        if path not in self._before:
            self._before[path] = path.read_bytes() if path.is_file() else None

    def folder(self, path: Path) -> None:
        """Note which folders are to be made, this one and those above it."""
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                self._before.setdefault(folder, None)

    def made(self, folder: Path) -> None:
        """Note a folder that was made just now."""
        self._before[folder] = None

    def forget(self) -> None:
        """From here on nothing is taken back."""
        self._before.clear()

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, RunnerError):
            return
        for path, content in reversed(self._before.items()):
            with suppress(OSError):
                if content is not None:
                    path.write_bytes(content)
                elif path.is_dir():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
