"""Keeps a run's checkpoints on disk: written aside, hashed, read back, and renamed into place as a
whole.

A checkpoint is a folder `step-000040-a0002` with files and a `manifest.json` that names each file's
size and sha256 and carries the facts needed to go on. It is made as `.stage-...`, so that whatever
stands under a checkpoint's name was whole when it got that name; it is removed as `.trash-...`, so
that it is never half there. Nothing here knows what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.files import (
    Entry,
    Files,
    Writer,
    is_lasting,
    measure,
    read_whole,
    remove_tree,
)
from runner.errors import DataError
from runner.run.folder import checkpoint_place
from runner.utils.files import Fence, is_there

CHECKPOINT_MANIFEST = "manifest.json"
FORMAT = 1
_LIMIT = 2**26  # bytes of a manifest
_STAGE, _TRASH, _DAMAGED = ".stage-", ".trash-", "damaged-"


class DamagedError(DataError):
    """A checkpoint is not what was committed (65)."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        name: its folder's name.
        files: by name relative to the folder.
        facts: what `save` was given.
    """

    name: str
    files: Mapping[str, Entry]
    facts: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.files.values())


class Stage:
    """A checkpoint in the making, as one rank sees it."""

    def __init__(self, files: Files, folder: Path, rank: int) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.wanted = 0  # bytes that this rank's files have, or would have
        self._files, self._rank = files, rank

    def put(self, name: str, write: Callable[[Writer], None]) -> None:
        """Write the file `name` with a function that is given the open file.

        Raises:
            OSError: if it could not be written and synced.
        """
        path = self.folder / name
        if not path.parent.exists():
            self._files.make_folder(path.parent)
        writer = Writer(self._files, path, self._rank)
        try:
            write(writer)
        finally:
            self.wanted += writer.wanted
            writer.close()
        self.entries[name] = writer.entry()

    def adopt(self, name: str) -> None:
        """Take in a file or folder that some library has written into the stage."""
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            for inner in self._files.names(path):
                self.adopt(f"{name}/{inner}")
            return
        self.entries[name] = measure(self._files, path, self._rank, sync=True)
        self.wanted += self.entries[name].bytes


class CheckpointStore:
    """The checkpoints of one run, for one attempt at it.

    Args:
        folder: `checkpoints/` of the run.
        rank: this process's.
        files: how files are written; tests put failing ones here.
        fence: raises if the folder is no longer ours; asked before each rename and removal.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        files: Files | None = None,
        fence: Fence = lambda: None,
    ) -> None:
        self.folder = folder
        self._rank = rank
        self._files = files or Files()
        self._fence = fence

    # --- writing

    def begin(self, name: str) -> None:
        """Make the stage of a checkpoint (rank 0)."""
        self._fence()
        if not is_there(self.folder):
            self._files.make_folder(self.folder)
            self._files.sync_folder(self.folder.parent)  # or a power cut takes all that is in it
        stage = self.folder / f"{_STAGE}{name}"
        if is_there(stage):  # of a save that failed
            remove_tree(self._files, stage)
        self._files.make_folder(stage)

    def stage(self, name: str) -> Stage:
        """The stage of a checkpoint, for this rank to write into."""
        return Stage(self._files, self.folder / f"{_STAGE}{name}", self._rank)

    def check_staged(self, stage: Stage) -> None:
        """Read back what this rank has written, from the disk as far as the system lets us.

        Raises:
            OSError: if it is not what was written.
        """
        for name, entry in stage.entries.items():
            if measure(self._files, stage.folder / name, self._rank, fresh=True) != entry:
                raise OSError(f"{stage.folder / name}: reads back other than it was written")

    def commit(self, name: str, entries: Mapping[str, Entry], facts: Mapping[str, Any]) -> Manifest:
        """Write the manifest and give the stage its name (rank 0): from then on it counts."""
        manifest = Manifest(name, dict(sorted(entries.items())), facts)
        stage = self.folder / f"{_STAGE}{name}"
        writer = Writer(self._files, stage / CHECKPOINT_MANIFEST, self._rank)
        writer.write(_spell(manifest))
        writer.close()
        writer.entry()
        for folder in sorted({(stage / file).parent for file in entries} | {stage}, reverse=True):
            self._files.sync_folder(folder)
        self._fence()
        self._files.rename(stage, self.folder / name)
        self._files.sync_folder(self.folder)
        return manifest

    def abandon(self, name: str) -> None:
        """Remove the stage of a checkpoint that could not be written (rank 0)."""
        self._fence()
        stage = self.folder / f"{_STAGE}{name}"
        if is_there(stage):
            remove_tree(self._files, stage)

    # --- reading

    def names(self, sealed_by: int, counted: Iterable[str]) -> list[str]:
        """The checkpoints that count, newest first: those listed, and those of the attempts from
        `sealed_by` on."""
        return _that_count(self._files.names(self.folder), sealed_by, counted)

    def later_than(self, sealed_by: int) -> list[str]:
        """The checkpoints of attempts after `sealed_by`, which is to be the newest that could
        commit any: there are some only if its successor's list was lost."""
        return _that_count(self._files.names(self.folder), sealed_by + 1, ())

    def damaged(self, sealed_by: int, counted: Iterable[str]) -> list[str]:
        """The checkpoints that would count, had they not been put aside."""
        found = (
            re.fullmatch(rf"{_DAMAGED}(step-.*?-a\d+)(-\d+)?", name, re.ASCII)
            for name in self._files.names(self.folder)
        )
        return _that_count({match[1] for match in found if match}, sealed_by, counted)

    def manifest(self, name: str) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            DamagedError: if it is not as it was committed.
            OSError: if it cannot be read now, which says nothing about it.
        """
        path = self.folder / name / CHECKPOINT_MANIFEST
        try:
            raw = read_whole(self._files, path, _LIMIT)
            table = json.loads(raw)
            body = table["checkpoint"]
            entries = {file: Entry(**entry) for file, entry in body["files"].items()}
            found = Manifest(body["name"], entries, body["facts"])
            if body["format"] != FORMAT:
                raise DamagedError(f"{path}: has format {body['format']!r}, not {FORMAT}")
            if _spell(found) != raw:
                raise DamagedError(f"{path}: is not what was written (its sha256 differs)")
        except OSError as error:
            if not is_lasting(error):
                raise
            raise DamagedError(f"{path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DamagedError(f"{path}: is damaged") from None
        if found.name != name:
            raise DamagedError(f"{path}: belongs to {found.name}")
        for file in entries:
            if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", file, re.ASCII):
                raise DamagedError(f"{path}: names the file {file!r}")
        return found

    def check(self, manifest: Manifest, files: Iterable[str]) -> None:
        """Hold files of a checkpoint against its manifest.

        Raises:
            DamagedError: naming the first that is not as it was committed.
            OSError: if one cannot be read now, which says nothing about it.
        """
        for name in files:
            path, entry = self.folder / manifest.name / name, manifest.files[name]
            try:
                found = measure(self._files, path, entry.rank)
            except OSError as error:
                if not is_lasting(error):
                    raise
                raise DamagedError(f"{path}: {error.strerror or error}") from None
            if found.bytes != entry.bytes:
                raise DamagedError(f"{path}: has {found.bytes} bytes, not {entry.bytes}")
            if found.sha256 != entry.sha256:
                raise DamagedError(f"{path}: is not what was written (its sha256 differs)")

    def quarantine(self, name: str) -> str:
        """Rename a damaged checkpoint so that nobody takes it for one; returns the new name."""
        new = f"{_DAMAGED}{name}"
        number = 1
        while is_there(self.folder / new):
            number += 1
            new = f"{_DAMAGED}{name}-{number}"
        self._fence()
        self._files.rename(self.folder / name, self.folder / new)
        self._files.sync_folder(self.folder)
        return new

    # --- tidying

    def remove(self, names: Sequence[str]) -> None:
        """Remove checkpoints: none of them is ever half there under its name."""
        for name in names:
            self._fence()
            self._files.rename(self.folder / name, self.folder / f"{_TRASH}{name}")
        if names:
            self._files.sync_folder(self.folder)
        self._empty_trash()

    def clean(self) -> None:
        """Remove what saving and removing left behind when they were cut short."""
        self._empty_trash()
        for name in self._files.names(self.folder):
            if name.startswith(_STAGE):
                # Renamed first: an earlier start that thaws may still be writing into it.
                self._fence()
                self._files.rename(self.folder / name, self.folder / f"{_TRASH}{name[1:]}")
        self._empty_trash()

    def _empty_trash(self) -> None:
        for name in self._files.names(self.folder):
            if name.startswith(_TRASH):
                self._fence()
                remove_tree(self._files, self.folder / name)


def _that_count(names: Iterable[str], sealed_by: int, counted: Iterable[str]) -> list[str]:
    """Of these, the checkpoints that are listed or of the attempts from `sealed_by` on, newest
    first."""
    counted = set(counted)
    places = {name: checkpoint_place(name) for name in names}
    found = {
        name: place
        for name, place in places.items()
        if place is not None and (name in counted or (sealed_by and place[2] >= sealed_by))
    }
    return sorted(found, key=lambda name: found[name], reverse=True)


def _spell(manifest: Manifest) -> bytes:
    """The only text that a manifest may have, byte for byte."""
    body = {
        "format": FORMAT,
        "name": manifest.name,
        "facts": manifest.facts,
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
    }
    text = json.dumps(body, indent=1, sort_keys=True)
    table = {"checkpoint": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return (json.dumps(table, indent=1, sort_keys=True) + "\n").encode()
