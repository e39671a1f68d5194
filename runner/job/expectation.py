"""Whether a finished run is what its job expects."""

from __future__ import annotations

from collections.abc import Mapping

from runner.job.schema import Expect


def missed_expectation(expect: Expect | None, metrics: Mapping[str, float]) -> str | None:
    """Say by how much a run missed its [expect]; None where it is met or nothing is expected.

    Args:
        expect: the job's section.
        metrics: the run's scores, as in `result.json`.
    """
    if expect is None:
        return None
    missed = []
    for name in ("exact_match", "f1", "span_accuracy", "loss"):
        wanted = getattr(expect, name)
        if wanted is None:
            continue
        found = metrics[name]
        if not abs(found - wanted) <= expect.tolerance:
            missed.append(
                f"{name} is {found:.2f}, {abs(found - wanted):.2f} from the expected {wanted:.2f} "
                f"(tolerance {expect.tolerance:g})"
            )
    return "; ".join(missed) or None
