"""Time the peer recipe and spantune as whole commands, interleaved in one session.

A pair is one run of the peer and one of ours with the same seed; the order alternates from pair to
pair, so that a machine that slows down or warms up favours neither. Commands are templates:

    {seed} and {out}   the run's seed, and a path of its own that does not exist yet
    $NAME              an environment variable, filled in when the run starts; the table keeps the
                       name, so that a published table shows no path of one machine

They run without a shell, in the current folder; write `env NAME=VALUE command` to set a variable.
Linux only. Uses nothing but the standard library, so that any environment can start it.
"""

import argparse
import contextlib
import datetime
import glob
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
SAMPLE_SECONDS = 1.0  # between two looks at the memory of a run's processes
GRACE_SECONDS = 10.0  # for processes to end by themselves
NONE = "-"  # in a table's cell
LOG_LINES = 30  # of a failed run's log
BUSY_PERCENT = 3.0  # of all cores used by others; above it a run is marked as disturbed


@dataclass(frozen=True)
class Side:
    """One of the two programs compared."""

    name: str
    command: str
    result: str


@dataclass(frozen=True)
class Run:
    """One finished command: what it cost and what it scored."""

    side: str
    label: str
    seed: int
    wall_s: float
    cpu_s: float
    others_percent: float
    largest_process_mib: float
    all_processes_mib: float
    exact_match: float
    f1: float
    seconds: dict[str, float]
    versions: dict[str, str]


class RunFailedError(Exception):
    """A command ended badly, or well but without the result it promised."""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", required=True, metavar="COMMAND")
    parser.add_argument(
        "--ours-result",
        default="{out}/result.json",
        metavar="PATH",
        help="JSON with exact_match and f1, at the top or under 'metrics'; "
        "a * matches any name, and exactly one file must match (default: %(default)s)",
    )
    parser.add_argument("--peer", metavar="COMMAND", help="required unless --only-ours")
    parser.add_argument("--peer-result", default="{out}/result.json", metavar="PATH")
    parser.add_argument("--pairs", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--first-seed", type=int, default=1, help="seed of the first pair; each next pair adds 1"
    )
    parser.add_argument(
        "--extra-ours-seeds",
        type=int,
        nargs="+",
        default=[],
        metavar="SEED",
        help="seeds that only ours runs, after the pairs, for the spread of its scores",
    )
    parser.add_argument("--only-ours", action="store_true", help="leave the peer's runs out")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument(
        "--work", type=Path, help="folder for run folders and logs (default: a new temporary one)"
    )
    args = parser.parse_args()
    if not args.only_ours and not args.peer:
        parser.error("--peer is required unless --only-ours is given")
    if args.pairs < 0 or (args.pairs == 0 and not args.extra_ours_seeds):
        parser.error("nothing to run: give --pairs or --extra-ours-seeds")
    return args


# ------------------------------------------------------------------------------------ measuring


def fill_template(template: str, seed: int, out: Path) -> str:
    # Not str.format: a command may well hold other braces, such as JSON.
    text = template.replace("{seed}", str(seed)).replace("{out}", str(out))
    for match in re.finditer(r"\$(\w+|\{\w+\})", text):
        name = match.group(1).strip("{}")
        if name not in os.environ:
            raise RunFailedError(f"environment variable {name} is not set, needed by: {template}")
    return os.path.expandvars(text)


def find_descendants(root: int) -> dict[int, int]:
    """Return the process `root` and its descendants, each with its start in ticks since boot.

    Number and start together name a process for good; the number alone is used again.
    """
    children: dict[int, list[int]] = {}
    started: dict[int, int] = {}
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # proc(5); the name in parentheses may hold spaces, so count from behind it.
            fields = Path(stat).read_text().rpartition(")")[2].split()
            process = int(stat.split("/")[2])
            children.setdefault(int(fields[1]), []).append(process)
            started[process] = int(fields[19])
    found = [root] if root in started else []
    for process in found:
        found.extend(children.get(process, []))
    return {process: started[process] for process in found}


def read_memory_mib(process: int) -> float:
    """Return a process's proportional set size: pages shared by k processes count 1/k in each.

    Plain resident sizes added over ranks would count torch's libraries once per rank.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


class MemorySampler(threading.Thread):
    """Notes the peak of the memory that a process and its descendants hold together."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.peak_mib = 0.0
        self.seen: dict[int, int] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            pause = SAMPLE_SECONDS
            processes = find_descendants(self.root)
            self.seen.update(processes)
            self.peak_mib = max(self.peak_mib, sum(map(read_memory_mib, processes)))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def read_machine_cpu_seconds() -> float:
    """Return the CPU seconds all processes used since boot, and those a hypervisor took away."""
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def find_alive(processes: dict[int, int]) -> list[int]:
    """Return those of the processes that still run; one that only waits to be reaped does not."""
    alive = []
    for process, started in processes.items():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            if int(fields[19]) == started and fields[0] not in "ZX":
                alive.append(process)
    return alive


def wait_for_end(processes: dict[int, int]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while find_alive(processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def stop_processes(processes: dict[int, int]) -> None:
    """Ask the processes to stop, then make those stop that have not."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        for process in find_alive(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, wanted)
        wait_for_end(processes)


def read_result(pattern: str) -> dict[str, Any]:
    # A launcher may exit with 0 though its ranks failed, so only the file proves a success.
    paths = glob.glob(pattern)
    if len(paths) != 1:
        raise RunFailedError(f"{len(paths)} files match {pattern}, expected one")
    result = json.loads(Path(paths[0]).read_text(encoding="utf-8"))
    scores = result if "f1" in result else result.get("metrics", {})
    for name in ("exact_match", "f1"):
        if not isinstance(scores.get(name), int | float):
            raise RunFailedError(f"{paths[0]} has no number named {name}, at the top or in metrics")
    beside = Path(paths[0]).with_name("provenance.json")  # where a spantune run names its versions
    if "versions" not in result and beside.is_file():
        result["versions"] = json.loads(beside.read_text(encoding="utf-8")).get("versions")
    return {**result, "exact_match": scores["exact_match"], "f1": scores["f1"]}


def read_entries(result: dict[str, Any], name: str, kind: type) -> dict[str, Any]:
    """Return a result's entries of the wanted type; they only explain, so all others are left."""
    entries = result.get(name)
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if isinstance(value, kind)}


def run_command(side: Side, label: str, seed: int, work: Path) -> Run:
    """Run one command to its end and return what it cost, by this process's own clock."""
    out = work / f"{label}-{side.name}"
    log = out.with_suffix(".log")
    if out.exists():
        raise RunFailedError(f"{out} exists already; give another --work")
    command = shlex.split(fill_template(side.command, seed, out))
    cores = len(os.sched_getaffinity(0))

    with log.open("wb") as log_file:
        machine_before = read_machine_cpu_seconds()
        started = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise RunFailedError(f"cannot start {command[0]}: {error.strerror}") from error
        sampler = MemorySampler(process.pid)
        sampler.start()
        try:
            # wait4 gives this run's own usage; getrusage(RUSAGE_CHILDREN) would give the peak
            # of all runs so far.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            sampler.stop()
            stop_processes(sampler.seen | find_descendants(process.pid))
            raise
        wall_s = time.perf_counter() - started
        machine_s = read_machine_cpu_seconds() - machine_before
        process.returncode = os.waitstatus_to_exitcode(status)
        sampler.stop()

    # Ranks can outlive their launcher, and would slow the next run.
    wait_for_end(sampler.seen)
    if left := find_alive(sampler.seen):
        print(f"warning: {label}, {side.name}: stopped {len(left)} processes that outlived it")
        stop_processes(sampler.seen)
    cpu_s = usage.ru_utime + usage.ru_stime
    try:
        if process.returncode != 0:
            raise RunFailedError(f"exit code {process.returncode}")
        result = read_result(fill_template(side.result, seed, out))
    except RunFailedError as error:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise RunFailedError(f"{label}, {side.name}: {error}\n{tail}\n(whole log: {log})") from None
    return Run(
        side=side.name,
        label=label,
        seed=seed,
        wall_s=wall_s,
        cpu_s=cpu_s,
        others_percent=max(0.0, 100 * (machine_s - cpu_s) / (wall_s * cores)),
        largest_process_mib=usage.ru_maxrss * 1024 / MIB,  # Linux counts it in KiB
        all_processes_mib=sampler.peak_mib,
        exact_match=result["exact_match"],
        f1=result["f1"],
        seconds=read_entries(result, "seconds", float),
        versions=read_entries(result, "versions", str),
    )


# -------------------------------------------------------------------------------------- the table


def describe_machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB / 1024
    cpu = models[0] if models else platform.machine()
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB memory"


def describe_checkout() -> str:
    def git(*arguments: str) -> str:
        folder = str(Path(__file__).parent)
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def spread(values: list[float], digits: int) -> str:
    """Return the median, with the range where there is one."""
    text = f"{statistics.median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def make_summary(runs: list[Run]) -> list[str]:
    peers = {run.label: run for run in runs if run.side == "peer"}
    ours = {run.label: run for run in runs if run.side == "ours"}
    rows = []
    ratios = []
    for label in dict.fromkeys(run.label for run in runs):
        peer, own = peers.get(label), ours.get(label)
        ratio = NONE
        if peer and own:
            ratios.append(peer.wall_s / own.wall_s)
            ratio = f"{ratios[-1]:.2f}"
        rows.append(
            [
                label,
                str(next(run.seed for run in runs if run.label == label)),
                f"{peer.wall_s:.1f}" if peer else NONE,
                f"{own.wall_s:.1f}" if own else NONE,
                ratio,
                f"{peer.exact_match:.2f} / {peer.f1:.2f}" if peer else NONE,
                f"{own.exact_match:.2f} / {own.f1:.2f}" if own else NONE,
            ]
        )

    def medians(side: dict[str, Run], fields: list[str], digits: int) -> str:
        if not side:
            return NONE
        columns = [[getattr(run, field) for run in side.values()] for field in fields]
        return " / ".join(spread(column, digits) for column in columns)

    rows.append(
        [
            "**median**",
            "",
            medians(peers, ["wall_s"], 1),
            medians(ours, ["wall_s"], 1),
            spread(ratios, 2) if ratios else NONE,
            medians(peers, ["exact_match", "f1"], 2),
            medians(ours, ["exact_match", "f1"], 2),
        ]
    )
    header = ["run", "seed", "peer, s", "ours, s", "peer / ours", "peer EM / F1", "ours EM / F1"]
    return markdown_table(header, rows)


def make_costs(runs: list[Run]) -> list[str]:
    rows = [
        [
            run.label,
            run.side,
            f"{run.wall_s:.1f}",
            f"{run.cpu_s:.1f}",
            f"{run.others_percent:.1f}" + (" (!)" if run.others_percent > BUSY_PERCENT else ""),
            f"{run.largest_process_mib:.0f}",
            f"{run.all_processes_mib:.0f}",
            ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in run.seconds.items()) or NONE,
        ]
        for run in runs
    ]
    header = ["run", "side", "wall, s", "CPU, s", "others' CPU, %", "largest process, MiB"]
    header += ["all processes, MiB", "phases as reported, s"]
    return markdown_table(header, rows)


def make_report(runs: list[Run], sides: list[Side], planned: int, date: str) -> str:
    lines = [f"# Training compared, {date}", ""]
    if len(runs) < planned:
        lines += [f"**Unfinished: {len(runs)} of {planned} runs.**", ""]
    lines += [
        "Wall seconds of whole commands by the driver's clock, in the order the second table has.",
        "",
        *make_summary(runs),
        "",
        *make_costs(runs),
        "",
        "CPU seconds are the command's own, with everything it started and waited for. Others' CPU",
        "is what remains of the machine's busy time, in percent of all cores; (!) marks a run that",
        f"was not alone (above {BUSY_PERCENT:.0f} %). The largest process is by peak resident size;"
        " all processes is",
        f"the peak of their summed proportional set sizes, looked at every {SAMPLE_SECONDS:.0f} s.",
        "",
        f"- Machine: {describe_machine()}",
        f"- System: {platform.system()} {platform.release()}, Python {platform.python_version()}",
        f"- Checkout: {describe_checkout()}",
    ]
    for side in sides:
        versions = next((run.versions for run in runs if run.side == side.name), {})
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"- Versions, {side.name}: {shown or 'not stated in its result'}")
    lines += ["", "The command:", "", "```"]
    lines += [shlex.join(["python", "tests/bench/compare_training.py", *sys.argv[1:]])]
    return "\n".join([*lines, "```", ""])


# ------------------------------------------------------------------------------------------ main


def plan_runs(args: argparse.Namespace) -> list[tuple[Side, str, int]]:
    ours = Side("ours", args.ours, args.ours_result)
    peer = Side("peer", args.peer, args.peer_result) if not args.only_ours else None
    plan = []
    for i in range(args.pairs):
        pair = [ours] if peer is None else [peer, ours] if i % 2 == 0 else [ours, peer]
        plan += [(side, f"pair{i + 1}", args.first_seed + i) for side in pair]
    plan += [(ours, f"extra{i + 1}", seed) for i, seed in enumerate(args.extra_ours_seeds)]
    return plan


def main() -> int:
    args = read_arguments()
    # A stopped benchmark must not leave its runs behind to disturb the next one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = (args.work or Path(tempfile.mkdtemp(prefix="compare-training-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    plan = plan_runs(args)
    sides = list(dict.fromkeys(side for side, _, _ in plan))
    runs: list[Run] = []
    for side, label, seed in plan:
        load = os.getloadavg()[0]
        print(f"{label}, {side.name}, seed {seed}: started (load {load:.2f}) ...", flush=True)
        try:
            run = run_command(side, label, seed, work)
        except RunFailedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        runs.append(run)
        print(
            f"{label}, {side.name}, seed {seed}: {run.wall_s:.1f} s, EM {run.exact_match:.2f}, "
            f"F1 {run.f1:.2f}, others' CPU {run.others_percent:.1f} %",
            flush=True,
        )
        # After every run: hours of measuring should survive an interruption.
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(make_report(runs, sides, len(plan), date), encoding="utf-8")
    print("\n" + args.table.read_text(encoding="utf-8"))
    print(f"run folders and logs: {work}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
