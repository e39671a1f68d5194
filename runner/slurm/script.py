"""The batch script of a run, or of a sweep as an array job: a pure function of what it is for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from runner.errors import JobError, printable
from runner.job.schema import Slurm
from runner.utils.templates import template_environment

# In the path of a run: what neither a shell nor sbatch's own patterns (%j) can take for something.
_SAFE_PATH = re.compile(r"[\w ./+,=@:~-]+")


def sbatch_script(
    section: Slurm,
    *,
    name: str,
    folder: Path,
    command: Sequence[str],
    written_by: str,
    trials: Sequence[str] = (),
    indices: Sequence[int] = (),
    max_parallel: int | None = None,
) -> str:
    """Write the script that `sbatch` takes.

    Args:
        section: the resolved [slurm], its variables expanded.
        name: the job's name.
        folder: the run folder, absolute; with trials, the folder that holds theirs.
        command: what starts spantune on a node, e.g. a python and its script.
        written_by: the command line, for the header.
        trials: names of the trials' run folders, by array index; none makes a plain job.
        indices: which of the trials are to run.
        max_parallel: how many of them at the same time.

    Raises:
        JobError: if a path holds characters that could mean something to a shell or to sbatch.
    """
    for path in (str(folder), *command):
        if not _SAFE_PATH.fullmatch(path):
            raise JobError(
                [
                    f"{path}: a path in a batch script may hold letters, digits, spaces and"
                    " . _ / + , = @ : ~ -; choose another folder with --runs"
                ]
            )
    environment = template_environment(
        __file__,
        autoescape=False,
        # Bash writes the length of a variable as ${#x}.
        comment_start_string="{##",
        comment_end_string="##}",
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template("submit.sh.j2").render(
        name=name,
        written_by=printable(written_by),
        folder=str(folder),
        options=_options(section, name, folder, indices, max_parallel),
        trials=trials,
        command=command,
        slurm=section,
    )


def script_options(text: str) -> set[str]:
    """Names of the options that a batch script sets."""
    return set(re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE))


def _options(
    section: Slurm, name: str, folder: Path, indices: Sequence[int], max_parallel: int | None
) -> Mapping[str, str | int | bool]:
    """Options of sbatch by name, in the order in which a reader looks for them."""
    gpus = section.gpus_per_node or None
    if gpus is not None and section.gpu_type is not None:
        gpus = f"{section.gpu_type}:{gpus}"
    at_once = f"%{max_parallel}" if max_parallel else ""
    options = {
        "job-name": name,
        "array": f"{_ranges(indices)}{at_once}" if indices else None,
        "partition": section.partition,
        "account": section.account,
        "qos": section.qos,
        "nodes": section.nodes,
        "ntasks-per-node": section.tasks_per_node,
        "gpus-per-node": gpus,
        "cpus-per-task": section.cpus_per_task,
        "mem": section.mem,
        "time": section.time,
        "constraint": section.constraint,
        "exclude": section.exclude,
        "mail-user": section.mail_user,
        "mail-type": ",".join(section.mail_type) if section.mail_user else None,
        **section.sbatch,
        "signal": f"B:USR2@{section.signal_seconds}",
        "requeue" if section.requeue else "no-requeue": True,
        "open-mode": "append",
        "output": f"{folder}/slurm-{'%A_%a' if indices else '%j'}.out",
    }
    return {key: value for key, value in options.items() if value is not None}


def _ranges(indices: Sequence[int]) -> str:
    """Spell ascending indices as SLURM does: 0-3,7."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
