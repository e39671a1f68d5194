"""What a value of [slurm] may be made of: allow-lists, so that no value can become another command
of the batch script or another option of sbatch. (What `container`, `venv` and `modules` name
is run: that is what they are for.)"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class ValueKind:
    """A kind of value: the pattern that all of it must match, and the sentence for what does not.

    Calling it checks a text, returns it, and raises ValueError with the sentence. In the schema,
    `Annotated[str, KIND]` is such a text; editors learn the pattern.
    """

    what: str
    pattern: str

    def __call__(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text, re.ASCII):
            shown = json.dumps(text if len(text) <= 60 else text[:57] + "...")
            raise ValueError(f"{shown} is not allowed here; write {self.what}")
        return text

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^(?:{self.pattern})$"}


SLURM_NAME = ValueKind(
    "a name made of letters, digits and . _ + / - (several: with commas)",
    r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*(,[A-Za-z0-9_][A-Za-z0-9_.+/-]*)*",
)
MEMORY = ValueKind('an amount such as "64G" (K, M, G or T; 0 is all of a node)', r"\d{1,12}[KMGT]?")
TIME = ValueKind(
    'a time such as "4:00:00", "2-12" (days-hours), or "90" (minutes)',
    r"\d{1,6}|\d{1,6}:\d{1,2}|\d{1,4}:\d{1,2}:\d{1,2}|\d{1,4}-\d{1,2}(:\d{1,2}){0,2}",
)
FEATURES = ValueKind(
    'node features such as "a100" or "a100|h100"',
    r"[A-Za-z0-9_(\[][A-Za-z0-9_.:,&|*()\[\]-]*",
)
HOSTS = ValueKind(
    'names of nodes such as "gpu[01-04],gpu07"',
    r"[A-Za-z0-9][A-Za-z0-9_.,-]*(\[[0-9,-]+\][\w.,-]*)*",
)
MAIL = ValueKind(
    "a mail address or a user's name", r"[A-Za-z0-9][A-Za-z0-9._+-]*(@[A-Za-z0-9.-]+)?"
)
MODULE = ValueKind('a module such as "cuda/12.4"', r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*")
FOLDER = ValueKind(
    'a folder such as "~/envs/spantune" or "$WORK/envs/spantune"',
    r"(~|/|\$[A-Za-z_][A-Za-z0-9_]*/|\$\{[A-Za-z_][A-Za-z0-9_]*\}/)[A-Za-z0-9_./+,=@$-]*",
)
WORD = ValueKind(
    "one word of a command, made of letters, digits and . _ / : , = @ % + - ~ $NAME",
    r"(~/)?([A-Za-z0-9_./:,=@%+-]|\$[A-Za-z_][A-Za-z0-9_]*|\$\{[A-Za-z_][A-Za-z0-9_]*\})*",
)
OPTION = ValueKind(
    "a value of letters, digits and . _ : , = + @ / & | * ( ) [ ] % -",
    r"[A-Za-z0-9_.:,=+@/&|*()\[\]%-]+",
)
ENVIRONMENT_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

# Options of sbatch that a job may add under [slurm.sbatch]. What is not here either has a key of
# its own in [slurm], is what submit itself decides (output, signal, array, ...), or runs something
# else than this job (wrap, export, uid, chdir, ...).
EXTRA_OPTIONS = (
    *("begin", "comment", "contiguous", "deadline", "dependency", "distribution", "exclusive"),
    *("gpu-bind", "gpu-freq", "gres", "gres-flags", "hint", "licenses", "mem-per-cpu"),
    *("mem-per-gpu", "network", "nice", "nodelist", "oversubscribe", "prefer", "priority"),
    *("reservation", "switches", "threads-per-core", "tmp", "wckey"),
)
# Of each of these groups SLURM takes one option at most.
_ONE_OF = (
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("gpus_per_node", "gres"),
    ("hint", "threads-per-core"),
)
_GPU = re.compile(r"(gres[:/])?gpu\b.*")  # what [slurm] itself asks for; other gres stand beside it
# Variables that say who a rank is and where ranks meet; they come from SLURM and the batch script.
_RESERVED = re.compile(
    r"SLURM_\w*|SBATCH_\w*|RANK|WORLD_SIZE|LOCAL_(RANK|SIZE|WORLD_SIZE)|MASTER_(ADDR|PORT)"
)
# Variables by which bash, the dynamic loader, the C library or Python run or load something else
# than what they are told to. Not LD_LIBRARY_PATH, which many clusters need.
_RUNS_SOMETHING = re.compile(
    r"PATH|BASH\w*|SHELLOPTS|ENV|IFS|PS4|POSIXLY_CORRECT|LD_(?!LIBRARY_PATH$)\w*|GCONV_PATH"
    r"|GLIBC_TUNABLES|PYTHON(PATH|HOME|STARTUP|USERBASE|PLATLIBDIR|PYCACHEPREFIX|EXECUTABLE"
    r"|INSPECT|BREAKPOINT)"
)


def check_variables(names: Iterable[str]) -> None:
    """Check names of environment variables; ValueError names the first wrong one."""
    for name in names:
        if not ENVIRONMENT_VARIABLE.fullmatch(name):
            raise ValueError(f"{json.dumps(name)} is no name of an environment variable")
        if _RESERVED.fullmatch(name):
            raise ValueError(f"{name} is set by SLURM or by the ranks themselves")
        if _RUNS_SOMETHING.fullmatch(name):
            raise ValueError(
                f"{name} makes bash, the loader or Python run or load something else, which no job"
                " file may; load a module that sets it (slurm.modules), use slurm.venv, or export"
                " it in the shell that submits: sbatch passes that on"
            )


def check_options(table: Mapping[str, Any]) -> None:
    """Check the options of [slurm.sbatch]; ValueError names the first that is not allowed."""
    for name, value in table.items():
        if name not in EXTRA_OPTIONS:
            raise ValueError(
                f"{json.dumps(name)} is not allowed here; allowed are {', '.join(EXTRA_OPTIONS)}"
            )
        if isinstance(value, bool):
            if not value:
                raise ValueError(f"{name}: an option without a value is true, or left out")
        elif isinstance(value, str):
            try:
                OPTION(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        elif not isinstance(value, int):
            raise ValueError(f"{name}: expected a string, a whole number or true")


def check_exclusive(section: Mapping[str, Any]) -> None:
    """Check that [slurm] asks for one at most of options that exclude each other; ValueError names
    two."""
    for group in _ONE_OF:
        asked = [f"sbatch.{n}" if n in EXTRA_OPTIONS else n for n in group if _asks(section, n)]
        if len(asked) > 1:
            raise ValueError(
                f"{asked[0]} and {asked[1]} exclude each other in SLURM; leave one out"
            )


def without_rivals(defaults: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """A cluster's [slurm] without what excludes an option that a job's asks for."""
    rivals = {name for group in _ONE_OF for name in group if any(_asks(job, n) for n in group)}
    rivals -= {name for name in rivals if _asks(job, name)}
    if job.get("gpus_per_node") == 0:  # a job on CPUs, where the defaults are for GPUs
        rivals.add("gres")
    if "gpus_per_node" in rivals or "gres" in rivals:
        rivals.add("gpu_type")
    kept = {key: value for key, value in defaults.items() if key not in rivals}
    if "sbatch" in kept:
        table = {
            key: value for key, value in kept["sbatch"].items() if key not in rivals - {"gres"}
        }
        if "gres" in rivals & table.keys():
            items = str(table.pop("gres")).split(",")
            others = ",".join(item for item in items if not _GPU.fullmatch(item))
            table |= {"gres": others} if others else {}
        kept["sbatch"] = table
    return kept


def _asks(section: Mapping[str, Any], name: str) -> bool:
    """Whether a [slurm] has an option; of gres only GPUs count."""
    if name not in EXTRA_OPTIONS:
        return bool(section.get(name))
    options = section.get("sbatch") or {}
    if name == "gres":
        return any(map(_GPU.fullmatch, str(options.get(name)).split(",")))
    return name in options


def time_limit_seconds(time: str) -> int:
    """Read a time limit of SLURM's: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, minutes, secs = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def expand_hosts(text: str) -> str:
    """Put the values of `~` and `$NAME` into a word, as they are where the job is submitted.

    Raises:
        ValueError: if a variable is not set, or its value would not be allowed in the job file.
    """
    whole = os.path.expandvars(os.path.expanduser(text))
    if "$" in whole:
        name = re.sub(r".*?\$\{?(\w+).*", r"\1", whole)
        raise ValueError(f"{text}: the environment variable {name} is not set")
    return WORD(whole)
