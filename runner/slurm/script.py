"""The batch script of a run, or of a sweep as an array job: a pure function of what it is for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from runner.errors import JobError, printable
from runner.job.schema import Slurm

# In the path of a run: what neither a shell nor sbatch's own patterns (%j) can take for something.
_SAFE_PATH = re.compile(r"[\w ./+,=@:~-]+")
SCRIPT = "submit.sh"


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
    options = _options(section, name, folder, indices, max_parallel)
    cpus = f" --cpus-per-task={section.cpus_per_task}" if section.cpus_per_task else ""
    head = [
        _HEADER.format(name=name, written_by=printable(written_by), folder=folder),
        *(f"#SBATCH {_option(key, value)}" for key, value in options.items()),
        "",
        _trial(folder, trials) if trials else _RUN.format(run=shlex.quote(str(folder))),
        f"spantune=({shlex.join(command)})",
        _START,
    ]
    parts = [
        "\n".join(part.strip("\n") for part in head),
        _SIGNALS.format(seconds=section.signal_seconds),
        _environment(section),
        _MEETING_ON_ONE_NODE if section.nodes == 1 else _MEETING,
        _BUDGET if section.requeue else "",
        _STEP.format(cpus=cpus),
        _REQUEUE if section.requeue else _NO_REQUEUE,
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + '\nexit "$code"\n'


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


def _option(key: str, value: str | int | bool) -> str:
    return f"--{key}" if value is True else f"--{key}={shlex.quote(str(value))}"


def _ranges(indices: Sequence[int]) -> str:
    """Spell ascending indices as SLURM does: 0-3,7."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _trial(folder: Path, trials: Sequence[str]) -> str:
    names = "\n".join(f"  {shlex.quote(name)}" for name in trials)
    return _TRIAL.format(folder=shlex.quote(str(folder)), names=names)


def _environment(section: Slurm) -> str:
    lines = ["# --- environment"]
    if section.modules:
        names = shlex.join(section.modules)
        lines += [
            "# `module` is a shell function of login shells; a batch shell may lack it.",
            "command -v module >/dev/null || . /etc/profile",
            f"if ! module load {names}; then",
            '  echo "slurm.modules: not to be had on $SLURMD_NODENAME" >&2',
            "  exit 64",
            "fi",
        ]
    if section.venv is not None:
        lines.append(f"export PATH={shlex.quote(f'{section.venv}/bin')}:$PATH")
    lines += [
        "# A rank has as many threads as cores; who it is, it reads from SLURM's own variables.",
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE",
    ]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in section.environment.items()]
    return "\n".join(lines)


_HEADER = """\
#!/bin/bash
# {name} on SLURM, written by: {written_by}
#
#   spantune status RUN                  how far it is; RUN is {folder}
#   spantune logs RUN -f                 what it says
#   spantune cancel RUN                  saves and ends it
#   spantune submit JOB --run-dir RUN    goes on where it was saved
#
# The job ends with the run's exit code: 0 done, 64 job file, 65 data or model refused, 69 asset
# missing, 71 a rank died, 73 run folder in use, 74 reading or writing failed, 75 interrupted and
# saved, 76 loss no longer a number, 78 an [expect] gate missed, 70 a mistake in spantune. The run
# has succeeded if and only if its folder holds result.json. More in jobs/SLURM.md.
"""

_RUN = """
run={run}
job=$SLURM_JOB_ID
"""

_TRIAL = """
trials=(
{names}
)
run={folder}/${{trials[SLURM_ARRAY_TASK_ID]}}
# By this name it is one trial; SLURM_JOB_ID of the last one would mean the whole array.
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
"""

_START = """
cd "$run" || exit 74
echo "$(date '+%F %T') job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"
"""

_MEETING_ON_ONE_NODE = """
# --- where the ranks meet: at a port by the job's number, or the next that nobody listens at
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_PORT MASTER_ADDR=127.0.0.1
"""

_MEETING = """
# --- where the ranks meet: on the first node, which runs this script and rank 0, at a port by the
# job's number, or the next that nobody listens at
MASTER_ADDR=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
while (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_PORT MASTER_ADDR="${MASTER_ADDR:-$SLURMD_NODENAME}"
"""

_BUDGET = """
# --- not for ever: SLURM itself requeues a job whose node has failed
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then "${spantune[@]}" may-requeue "$run" || exit $?; fi
"""

_SIGNALS = """
# --- signals
# USR2 means: save, to be requeued. It comes to this shell alone (B:), {seconds} s before the end of
# the time, and at a preemption where the cluster has preempt_send_user_signal. srun passes it to
# all ranks, again and again: one that is still loading its libraries does not listen yet.
# TERM means: save and end. It comes from scancel, scontrol requeue, and at the end of the time, to
# this shell and to all ranks. To requeue ourselves then would bring a cancelled job back to life.
step='' warned='' ended=''
warn() {{
  warned=1
  [ -z "$step" ] || (while sleep 2 && kill -USR2 "$step"; do :; done) 2>/dev/null &
}}
trap warn USR1 USR2
trap 'ended=1' TERM
"""

_STEP = """
# --- the run: one task is one rank
# Ranks ignore the signals until they are ready for them (trap ''), so that none dies of one. Those
# that are left a minute after the first has ended are killed (--wait); not at once, because all
# ranks together end with the run's code. They get all variables (--export), whichever of them
# SBATCH_EXPORT has let into this script.
srun --export=ALL --kill-on-bad-exit=0 --wait=60{cpus} \\
  bash -c 'trap "" USR1 USR2 TERM; exec "$@"' rank \\
  "${{spantune[@]}}" rank "$run/job.toml" --run-dir "$run" &
step=$!
[ -z "$warned" ] || warn
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # each trapped signal ends a wait early
wait "$step"
code=$?

if [ "$code" = 0 ] && [ ! -e "$run/result.json" ]; then
  echo "all ranks have ended well, but there is no result.json: this is no success" >&2
  code=70
fi
"""

_REQUEUE = """
if [ "$code" = 75 ] && [ -z "$ended" ] && "${spantune[@]}" may-requeue "$run" &&
  [ -z "$ended" ]; then # no scancel came meanwhile either
  trap - TERM # by which the requeue ends this script
  scontrol requeue "$job" && sleep 600
fi
"""

_NO_REQUEUE = """
if [ "$code" = 75 ] && [ -z "$ended" ]; then
  printf 'saved; to go on: spantune submit %q --run-dir %q\\n' "$run/job.toml" "$run" >&2
fi
"""
