"""The end of a run on rank 0: export verified, predictions and report written, result.json last."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch

from runner.checkpoint.keeping import Kept
from runner.data.splits import Questions
from runner.export.save import verify_export
from runner.job.schema import Job
from runner.report.report import write_report
from runner.run import provenance
from runner.run.folder import RunDir, write_json
from runner.train.run_log import closing_lines, probe_changes, result_scores, write_predictions
from runner.utils.console import Reporter
from runner.utils.tables import Value, terminal
from runner.utils.timing import Clock


def verified_result(
    job: Job,
    run: RunDir,
    kept: Kept,
    validation: Questions,
    clock: Clock,
    peaks: Sequence[dict[str, int]],
) -> dict[str, Any]:
    """result.json: scores, the weights' hash, seconds and memory, after a fresh process has agreed.

    Raises:
        RunnerError: if the exported model is not the one that was scored.
    """
    with clock("verification"):
        difference = verify_export(
            run.model,
            validation.dataset.examples,
            validation.windows,
            kept.logits,
            job.data.max_length,
            job.data.stride,
        )
    return {
        **result_scores(kept.scores, job.score.null_threshold, job.seed),
        "epoch": kept.epoch,
        "step": kept.step,
        "weights_sha256": provenance.file_sha256(run.model / "model.safetensors"),
        "export_difference": difference,
        "seconds": clock.seconds(),
        "peak_memory_bytes": list(peaks),
    }


def finish(
    job: Job,
    run: RunDir,
    reporter: Reporter,
    kept: Kept,
    validation: Questions,
    probe_rows: Sequence[dict[str, Value]],
    result: dict[str, Any],
) -> None:
    """Write predictions, report and, last of all, result.json; show the outcome."""
    shown = probe_changes(probe_rows)
    write_predictions(run, kept.scores, validation, unanswerable=job.data.unanswerable)
    write_report(run.path, result)
    write_json(run.result, result)
    if shown:
        reporter.show(terminal("What the model answers", shown))
    for line in closing_lines(job, run, result):
        reporter.say(line)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory of this rank so far, in bytes: of the process, and of the GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak
