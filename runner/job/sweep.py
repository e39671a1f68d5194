"""The trials of a job with [sweep]: which values each has, its job, its name, and the manifest."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import DataError, JobError
from runner.job.load import (
    NO_MATTER,
    Source,
    check_table,
    dump_job,
    in_order,
    load_job,
    read_source,
)
from runner.job.schema import Job, Sweep
from runner.job.toml_lines import Path as KeyPath
from runner.run.folder import RunDir, write_atomic, write_json

Keys = tuple[str, ...]

MANIFEST = "sweep.json"
JOB = "sweep.toml"
MAX_TRIALS = 1000  # SLURM's default limit of an array
# Keys that may name a file.
_FILES = (("data", "train"), ("data", "validation"), ("data", "tuning"), ("model", "name"))
# A trial's place in an array, its folder and its script are not its own to choose.
_FIXED = {
    "name": "names the folder of all trials",
    "slurm": "is the same for all trials of an array",
    "sweep": "cannot vary itself",
    "seed": "has an axis of its own; write sweep.seeds = [1, 2, 3]",
}


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of its folder, made of its values and of a hash of its whole job.
        values: what it has of each key that the sweep varies; the seed last.
        job: its job, which runs by itself.
    """

    name: str
    values: dict[str, Any]
    job: Job


def load_trials(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Job, list[Trial]]:
    """Read a job file; return its job, and its trials if it has a [sweep].

    Raises:
        JobError: with one line a problem, those of all trials at once.
    """
    job = load_job(path, overrides)
    if job.sweep is None:
        return job, []
    source = read_source(path, overrides)
    return job, list(_trials(job.sweep, source))


def write_manifest(folder: Path, job: Job, trials: Sequence[Trial]) -> list[str]:
    """Make or renew the folder of a sweep: `sweep.toml` and `sweep.json`; return the names of all
    its trials, in the order of their array indices.

    A trial keeps its index for ever. Trials of an earlier start that the job no longer has stay in
    the manifest, because their results stay in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = manifest_entries(folder, job, trials)
    write_atomic(folder / JOB, dump_job(job))
    write_json(
        folder / MANIFEST,
        {
            "name": job.name,
            "trials": [{"name": name, "values": values} for name, values in entries.items()],
        },
    )
    return list(entries)


def manifest_entries(folder: Path, job: Job, trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """The values of all trials that a sweep has or had, by name, in the order of their array
    indices: those of `folder`, if it holds the sweep already, then new ones.

    Raises:
        DataError: if it holds the sweep of another job.
    """
    known = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    if known and known["name"] != job.name:
        raise DataError(
            f"{folder} holds the sweep of another job, {known['name']}; give another folder"
        )
    entries = {entry["name"]: entry["values"] for entry in known["trials"]} if known else {}
    return entries | {trial.name: trial.values for trial in trials if trial.name not in entries}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `sweep.json`: the sweep's `name`, and `trials` with `name` and `values`.

    Raises:
        DataError: if there is none, or none that can be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        _ = manifest["name"], [(entry["name"], entry["values"]) for entry in manifest["trials"]]
    except FileNotFoundError:
        raise DataError(f"{folder} is no folder of a sweep: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / MANIFEST}: cannot be read: {error}") from None
    return manifest


def open_trials(folder: Path, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have no result yet: failed ones, and those that never ran."""
    return [trial for trial in trials if not RunDir(folder / trial.name).finished()]


def _trials(sweep: Sweep, source: Source) -> Iterator[Trial]:
    axes, problems = _axes(sweep.over)
    lengths = {len(values) for values in axes.values()}
    if sweep.mode == "zip" and len(lengths) > 1:
        problems.append(
            (("sweep", "over"), f"zip takes lists of one length, these have {sorted(lengths)}")
        )
    if problems:
        raise JobError(in_order(problems, source))
    combine = itertools.product if sweep.mode == "grid" else zip
    places = list(combine(*(range(len(values)) for values in axes.values()))) if axes else [()]
    count = len(places) * max(1, len(sweep.seeds))
    if count > MAX_TRIALS:
        raise JobError(
            in_order([(("sweep",), f"{count} trials are more than {MAX_TRIALS}")], source)
        )
    found: dict[tuple[KeyPath, str], None] = {}
    seen: dict[str, str] = {}
    trials = []
    for place in places:
        chosen = dict(zip(axes, place, strict=True))
        for seed in sweep.seeds or (None,):
            table = copy.deepcopy(source.table)
            del table["sweep"]
            for path, index in chosen.items():
                _put(table, path, axes[path][index])
            if seed is not None:
                table["seed"] = seed
            job, wrong = check_table(table, source.path.resolve().parent)
            found |= dict.fromkeys((_at(loc, chosen), sentence) for loc, sentence in wrong)
            if job is None or wrong:
                continue
            values = {".".join(path): axes[path][index] for path, index in chosen.items()}
            if seed is not None:
                values["seed"] = seed
            name = _name(values, job, table)
            if name in seen:
                found[(("sweep",), f"gives the same job twice: {seen[name]}")] = None
            seen[name] = ", ".join(f"{key} = {value}" for key, value in values.items())
            trials.append(Trial(name, values, job))
    if found:
        raise JobError(in_order(found, source))
    yield from trials


def _axes(over: Mapping[str, Any]) -> tuple[dict[Keys, list[Any]], list[tuple[KeyPath, str]]]:
    """Flatten [sweep.over] into the values by key path; and what is wrong with it."""
    axes: dict[Keys, list[Any]] = {}
    problems: list[tuple[KeyPath, str]] = []

    def walk(table: Mapping[str, Any], path: Keys) -> None:
        for key, value in table.items():
            loc = ("sweep", "over", *path, key)
            if not path and key in _FIXED:
                problems.append((loc, f"{key} {_FIXED[key]}"))
            elif isinstance(value, dict):
                walk(value, (*path, key))
            elif not isinstance(value, list) or not value:
                problems.append((loc, "expected a list of values in brackets"))
            else:
                axes[(*path, key)] = value

    walk(over, ())
    return axes, problems


def _put(table: dict[str, Any], path: Keys, value: Any) -> None:
    """Set one value; what is no table on the way is left for the schema to complain about."""
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return
    table[path[-1]] = value


def _at(loc: KeyPath, chosen: Mapping[Keys, int]) -> KeyPath:
    """Where a trial's problem stands in the file: at the value that the sweep gave, if it did."""
    for path, index in chosen.items():
        if loc[: len(path)] == path:
            return ("sweep", "over", *path, index, *loc[len(path) :])
    return ("sweep", "seeds") if loc == ("seed",) else loc


def _name(values: Mapping[str, Any], job: Job, table: Mapping[str, Any]) -> str:
    """Name a trial: its values for people, then 8 digits of a hash over all that makes it another
    run. Files are hashed by the names that the job file has for them, which are the same in every
    checkout; keys at their defaults are left out, so that a new key of the schema renames none."""
    whole = job.model_dump(mode="json", exclude_defaults=True)
    for path in NO_MATTER:
        _drop(whole, path)
    for section, key in _FILES:
        if key in whole[section]:
            whole[section][key] = table[section][key]
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
    words = [f"{key.rpartition('.')[2]}-{_slug(value)}" for key, value in values.items()]
    return f"{'_'.join(words)[:80].strip('-_')}_{digest}"


def _drop(table: dict[str, Any], path: KeyPath) -> None:
    """Leave a key out, if it is there."""
    *sections, key = map(str, path)
    for section in sections:
        if section not in table:
            return
        table = table[section]
    table.pop(key, None)


def _slug(value: Any) -> str:
    """Spell a value with letters, digits, dot and dash; of a path its last part."""
    text = json.dumps(value) if isinstance(value, list | dict) else str(value).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.")[:24] or "none"
