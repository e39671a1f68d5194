"""What the measurements share: interleaved rounds, medians, and tables that name their machine."""

from __future__ import annotations

import datetime
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "kernels")]

import psutil  # noqa: E402

from runner.run import provenance  # noqa: E402
from runner.utils.tables import CellValue, markdown  # noqa: E402


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run every case once in each round, in turn forwards and backwards, so that a machine that
    slows down or warms up favours none; seconds of each run, in the rounds' order."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases) if number % 2 == 0 else list(cases)[::-1]:
            gc.collect()
            began = clock()
            cases[name]()
            times[name].append(clock() - began)
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the rounds' ratios: company that slows a round down slows both of its runs."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def machine() -> str:
    """One line: processor, cores, memory, GPU."""
    cores = len(os.sched_getaffinity(0))
    memory = round(psutil.virtual_memory().total / 2**30)
    line = f"{provenance.processor_name()}, {cores} cores, {memory} GiB"
    torch = next((sys.modules[name] for name in ("torch",) if name in sys.modules), None)
    if torch is not None and torch.cuda.is_available():
        line += f", {torch.cuda.get_device_name()}"
    return line


def report(title: str, rows: Sequence[Mapping[str, CellValue]], notes: Sequence[str] = ()) -> str:
    """A Markdown section: title, when and where, the table, notes."""
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    versions = ", ".join(f"{name} {value}" for name, value in provenance.versions().items())
    lines = [f"### {title}", "", f"{today}, {machine()}; {versions}.", "", markdown(rows).rstrip()]
    for note in notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def show(text: str, table: Path | None) -> None:
    """Print a section, and append it to a file where one is named."""
    print(text, flush=True)
    if table is not None:
        with table.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
