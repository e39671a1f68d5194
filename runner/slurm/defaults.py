"""The cluster's own defaults for [slurm], kept outside of job files so that these stay portable."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from runner.errors import JobError
from runner.job.load import format_problems, read_source
from runner.job.messages import schema_problems
from runner.job.schema import Slurm
from runner.job.slurm_values import without_rivals
from runner.job.toml_lines import Path as KeyPath

DEFAULTS_VARIABLE = "SPANTUNE_SLURM"


def defaults_file() -> Path | None:
    """The file of defaults: what SPANTUNE_SLURM names (nothing, if it is empty), or
    `spantune/slurm.toml` in the user's configuration folder if that is there."""
    named = os.environ.get(DEFAULTS_VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = Path(home) / "spantune" / "slurm.toml"
    return path if path.is_file() else None


def load_defaults(path: Path) -> Slurm:
    """Read a file that holds one section, [slurm], with the keys that it has in a job.

    Raises:
        JobError: with one line a problem.
    """
    source = read_source(path)
    problems: list[tuple[KeyPath, str]] = [
        ((key,), f"only [slurm] may stand in {path.name}; {key} belongs to a job")
        for key in source.table
        if key != "slurm"
    ]
    section = None
    if "slurm" not in source.table:
        problems.append(((), "has no section [slurm]"))
    else:
        try:
            section = Slurm.model_validate(source.table["slurm"])
        except ValidationError as error:
            problems += schema_problems(error, within=("slurm",))
    if section is None or problems:
        raise JobError(format_problems(problems, source))
    return section


def resolve(section: Slurm | None, path: Path | None) -> Slurm:
    """Lay a job's [slurm] over the defaults in `path`: the job wins, key by key, also within
    `environment` and `sbatch`; and what the job asks for takes the place of what excludes it.

    Raises:
        JobError: if the defaults are wrong, or the two do not fit together.
    """
    job = {} if section is None else section.model_dump(exclude_unset=True)
    if path is None:
        return Slurm.model_validate(job)
    merged = without_rivals(load_defaults(path).model_dump(exclude_unset=True), job)
    for key, value in job.items():
        both = isinstance(value, dict) and key in merged
        merged[key] = {**merged[key], **value} if both else value
    try:
        return Slurm.model_validate(merged)
    except ValidationError as error:
        # Each is right by itself, so what is wrong is how they fit together.
        sentences = [sentence for _, sentence in schema_problems(error, within=("slurm",))]
        raise JobError(
            [f"[slurm] of the job, with the defaults of {path}: {s}" for s in sentences]
        ) from None
