"""What the name of a data set or of a model in a job points to: a file, a hub repository, an
installed package."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.utils.text import shorten

_TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
FILE_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet")
_READABLE = f"{', '.join(_TEXT_SUFFIXES)}, each also as .gz, or .parquet"

_SLICE = re.compile(r"\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]\Z", re.ASCII)

_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?:#(?P<config>[\w.-]+))?"
    r"(?::(?P<split>[\w.+-]+))?",
    re.ASCII,
)

_SHARE = re.compile(r"(\d{1,2}(?:\.\d+)?) ?%", re.ASCII)

_HUB_MODEL = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Slice:
    """A range of questions, `[start:stop]` as in Python, each bound a count or a percentage."""

    start: str | None
    stop: str | None

    def bounds(self, total: int) -> tuple[int, int]:
        """Return the half-open range of question positions for a data set of `total` questions."""
        start, stop, _ = slice(
            self._place(self.start, total), self._place(self.stop, total)
        ).indices(total)
        return start, max(start, stop)

    def is_empty(self) -> bool:
        """Whether no data set has a question in this range, as far as bounds of one kind tell:
        `[:0]`, `[200:100]`, `[50%:20%]`."""
        start, stop = self.start or "0", self.stop or "100%"
        alike = start == "0" or start.endswith("%") == stop.endswith("%")
        one_end = start.startswith("-") == stop.startswith("-")
        return alike and one_end and int(start.rstrip("%")) >= int(stop.rstrip("%"))

    @staticmethod
    def _place(bound: str | None, total: int) -> int | None:
        if bound is None:
            return None
        if bound.endswith("%"):
            # From the end, -1% is 99%: as a count it could round to 0, which is the beginning.
            percent = int(bound[:-1])
            return max(0, round((percent + 100 * (percent < 0)) * total / 100))
        return int(bound)


@dataclass(frozen=True)
class DataSource:
    """A parsed data name: `path/file.json[:1000]` or
    `owner/name@revision#config:split[10%:20%]`."""

    text: str
    kind: Literal["file", "hub"]
    location: str
    split: str | None = None
    revision: str | None = None
    config: str | None = None
    slice: Slice | None = None

    def relocated(self, location: Path) -> str:
        """Spell this source with another location of its file and the same slice."""
        tail = _SLICE.search(self.text)
        return f"{location}{tail[0] if tail else ''}"


def file_suffix(name: str) -> str | None:
    """Which of FILE_SUFFIXES a file's name ends in, a .gz after it aside; None if in none."""
    name = name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in (_TEXT_SUFFIXES if name.endswith(".gz") else FILE_SUFFIXES) else None


def parse_data(text: str) -> DataSource:
    """Read a data name; raise ValueError with a sentence where it has no meaning."""
    name, part = text, None
    found = _SLICE.search(text)
    if found:
        name, part = text[: found.start()], Slice(found["start"], found["stop"])
    elif text.endswith("]"):
        raise ValueError(
            f"{text!r} ends in a slice that cannot be read; write [:1000], [100:200] or [10%:20%],"
            " counted in questions"
        )
    if part and part.is_empty():
        raise ValueError(f"{text!r} ends in a slice that never holds a question")
    if file_suffix(name) is not None:
        return DataSource(text=text, kind="file", location=name, slice=part)
    hub = _HUB.fullmatch(name)
    if hub is None:
        raise ValueError(
            f"{text!r} is neither a file of a kind that is read ({_READABLE}) nor a hub"
            " name such as rajpurkar/squad:train[:1000]"
        )
    return DataSource(
        text=text,
        kind="hub",
        location=hub["repo"],
        split=hub["split"] or "train",
        revision=hub["revision"],
        config=hub["config"],
        slice=part,
    )


def parse_share(text: str) -> float | None:
    """The share of the training questions that `10%` stands for, more than 0 and less than 1; None
    for the name of a data set."""
    found = _SHARE.fullmatch(text)
    return float(found[1]) / 100 if found and float(found[1]) > 0 else None


def set_name(text: str) -> str:
    """What a set of questions is called unless the job says it: as its file, or as its repository
    and split."""
    if parse_share(text) is not None:
        return "held-out"
    source = parse_data(text)
    last = source.location.rpartition("/")[2]
    words = Path(last).stem if source.kind == "file" else f"{last}-{source.split}"
    return re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")[:40].rstrip("-") or "data"


def find_file(location: str, beside: Path) -> Path | None:
    """Find a relative path beside the job file first, then in the current folder; None if it is in
    neither."""
    # os.path tells of names too long or with NUL bytes, and of users not there, without raising.
    path = Path(os.path.expanduser(location))
    if path.is_absolute():
        return path if os.path.exists(path) else None
    for folder in (beside, Path.cwd()):
        if os.path.exists(folder / path):
            return (folder / path).resolve()
    return None


def located_data(name: str, beside: Path) -> tuple[str, str | None]:
    """A data name, absolute where it is that of a file; what to say where the file is not there.
    What the schema refuses is passed over."""
    try:
        source = parse_data(name)
    except ValueError:
        return name, None
    if source.kind == "hub":
        return name, unread_here(source, beside)
    found, shown = find_file(source.location, beside), json.dumps(shorten(source.location))
    if found is None:
        return name, f"no file {shown} beside the job file or in the current folder"
    if found.is_dir():
        return name, f"{shown} is a folder; name a file in it"
    return source.relocated(found), None


def unread_here(source: DataSource, beside: Path) -> str | None:
    """What to say where the name of a hub data set is that of a file or folder, which comes first;
    None where it is not, and where a revision or config says that the hub is meant."""
    if source.kind == "file":
        return None
    names = {_SLICE.sub("", source.text)}
    if source.revision is None and source.config is None:
        names.add(source.location)
    for name in sorted(names):
        if (found := find_file(name, beside)) is not None:
            return _unread(name, found)
    return None


def _unread(name: str, found: Path) -> str:
    if found.is_dir():
        hub = f"for the hub's data set of this name write {name}@main"
        return f"{name!r} is a folder here; name a file in it ({_READABLE}); {hub}"
    packed = found.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")
    fix = "unpack it" if packed else "convert it, or rename it if it is one of them"
    return f"{name!r} is a file here, and of none of the kinds that are read ({_READABLE}); {fix}"


def is_hub_model(name: str) -> bool:
    """Whether the hub could have a model of this name: `owner/name`, or `name` for the oldest."""
    return _HUB_MODEL.fullmatch(name) is not None


def package_folder(name: str) -> Path | None:
    """Find `PACKAGE/SUBFOLDER` (what follows `package:`) without importing the package; None if it
    is not installed."""
    package, _, subfolder = name.partition("/")
    if not package.isidentifier():  # a dot would import the package around it
        return None
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec, such as __main__
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / subfolder
    return folder if os.path.isdir(folder) else None


def public_name(name: str) -> str:
    """A name as others may see it: of a file or folder, its last part."""
    return name.rpartition("/")[2] if name.startswith("/") else name


def describe_sample(sample: int | None) -> str:
    """What must follow the name of a slice of which only a sample was taken."""
    return "" if sample is None else f", {sample:,} of its questions drawn with the seed"
