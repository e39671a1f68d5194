"""The trials of a job with [sweep]: which values each has, its job, and its name."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import JobError
from runner.job.load import (
    MAY_DIFFER,
    Source,
    check_table,
    format_problems,
    load_job,
    read_source,
)
from runner.job.schema import Job, Sweep
from runner.job.toml_lines import Path as KeyPath

Keys = tuple[str, ...]

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


def _trials(sweep: Sweep, source: Source) -> Iterator[Trial]:
    axes, problems = _axes(sweep.over)
    lengths = {len(values) for values in axes.values()}
    if sweep.mode == "zip" and len(lengths) > 1:
        problems.append(
            (("sweep", "over"), f"zip takes lists of one length, these have {sorted(lengths)}")
        )
    if problems:
        raise JobError(format_problems(problems, source))
    # Counted before it is made: a few axes can stand for billions of trials.
    sizes = [len(values) for values in axes.values()]
    count = math.prod(sizes) if sweep.mode == "grid" else min(sizes, default=1)
    count *= max(1, len(sweep.seeds))
    if count > MAX_TRIALS:
        raise JobError(
            format_problems([(("sweep",), f"{count} trials are more than {MAX_TRIALS}")], source)
        )
    combine = itertools.product if sweep.mode == "grid" else zip
    places = combine(*map(range, sizes)) if axes else [()]
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
        raise JobError(format_problems(found, source))
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
    for path in MAY_DIFFER:
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
