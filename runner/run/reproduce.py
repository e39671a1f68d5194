"""Runs a finished run again from its own record, in a new folder, and tells whether the same came
out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import DataError, ExpectationError, MachineError, RunDirError
from runner.job.load import recorded_job
from runner.job.schema import Job
from runner.run.folder import RunDir, new_stamp
from runner.run.launch import launch
from runner.run.provenance import differing_fields, differing_results, read_record

SCORE_TOLERANCE = 0.5  # percent, or nats for the loss, where the job's [expect] names no other
REPRODUCED_SCORES = ("exact_match", "f1", "span_accuracy", "loss")


@dataclass(frozen=True)
class Reproduction:
    """A run, the same run again, and how they compare.

    Attributes:
        run, again: the folders.
        environment: fields of provenance in which they differ.
        results: where they came out differently, bit for bit.
        outside: scores that lie further apart than the tolerance.
        exact: whether equal bits are promised at all: on a CPU, or by train.deterministic.
    """

    run: RunDir
    again: RunDir
    environment: list[str]
    results: list[str]
    outside: list[str]
    exact: bool = True

    @property
    def holds(self) -> bool:
        """Whether it came out as promised: to the bit in the same environment, if its bits are
        promised, else within the tolerance."""
        return not (self.results if self.to_the_bit else self.outside)

    @property
    def to_the_bit(self) -> bool:
        """Whether bits are compared, and not only scores."""
        return self.exact and not self.environment

    def lines(self) -> Iterator[str]:
        """The comparison, for people."""
        if self.environment:
            yield "the environment is another than the run's, so bits may differ:"
            yield from (f"  {line}" for line in self.environment)
        else:
            yield "the environment is the run's"
            if not self.exact:
                yield "on a GPU, and without train.deterministic, so bits may differ"
        if not self.results:
            yield "result, weights, answers and tables are the same, bit for bit"
            return
        yield f"{len(self.results)} differences:"
        yield from (f"  {line}" for line in self.results)
        if not self.outside:
            yield "all scores lie within the tolerance"
        yield from (f"  {line}" for line in self.outside)


def reproduce(
    path: Path,
    *,
    into: Path | None,
    ranks: int | None,
    start: Callable[[list[str], int], int] = launch,
) -> Reproduction:
    """Run a finished run again, with as many ranks and threads, and compare.

    Args:
        path: the run's folder.
        into: folder of the new run; None: beside it.
        ranks: another number of ranks than the run had; None: the same.
        start: starts the ranks.

    Raises:
        RunDirError: if there is no run at `path`, or it has not finished; if `into` holds a
            finished one, which would be compared without anything being run.
        MachineError: if the new run did not finish.
    """
    run = RunDir.open(path)
    if not run.finished():
        raise RunDirError(f"{path}: has not finished, so there is nothing to compare with")
    job, origin = recorded_job(run.job), read_record(run.provenance)
    again = RunDir(into or run.path.with_name(f"{new_stamp()}-again"))
    if again.path == run.path:
        raise RunDirError(f"{path}: the new run needs another folder than the run itself")
    if again.finished():
        raise RunDirError(f"{again.path}: holds a run that is finished already; give a new folder")
    world, threads = (_number(run, origin, key) for key in ("ranks", "threads_per_rank"))
    arguments = ["rank", str(run.job), "--run-dir", str(again.path), "--threads", str(threads)]
    code = start(arguments, ranks or world)
    if not again.finished():
        raise MachineError(f"{again.path}: the new run has not finished (exit code {code})")
    return compare_runs(run, again, job)


def compare_runs(run: RunDir, again: RunDir, job: Job) -> Reproduction:
    """Compare two finished runs of a job."""
    origin = read_record(run.provenance)
    environment = differing_fields(origin, read_record(again.provenance))
    scores = [read_record(folder.result)["metrics"] for folder in (run, again)]
    tolerance = job.expect.tolerance if job.expect else SCORE_TOLERANCE
    outside = [
        f"{name} is {scores[0][name]:.2f}, now {scores[1][name]:.2f} (tolerance {tolerance:g})"
        for name in REPRODUCED_SCORES
        if not abs(scores[0][name] - scores[1][name]) <= tolerance
    ]
    exact = job.train.deterministic or _on_cpu(origin)
    return Reproduction(run, again, environment, differing_results(run, again), outside, exact)


def check_reproduction(found: Reproduction) -> None:
    """Make sure that a run came out again as promised.

    Raises:
        ExpectationError: if it did not.
    """
    if not found.holds:
        what = "to the bit" if found.to_the_bit else "within the tolerance"
        raise ExpectationError(f"{found.run.path}: does not come out again {what}")


def _on_cpu(origin: Mapping[str, Any]) -> bool:
    """Whether a run's ranks computed on the processor itself."""
    machine = origin.get("machine", {})
    return all(device == machine.get("processor") for device in machine.get("devices", ()))


def _number(run: RunDir, origin: dict[str, Any], key: str) -> int:
    if not isinstance(origin.get(key), int):
        raise DataError(f"{run.provenance}: does not say {key}")
    return origin[key]
