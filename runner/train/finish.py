"""The end of a run on rank 0: export verified, predictions and report written, result.json last."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch

from runner.checkpoint.best import BestEvaluation
from runner.data.splits import Split
from runner.data.windows import windows_sha256
from runner.eval.results import result_scores
from runner.export.verify import verify_export
from runner.job.schema import Job
from runner.report.render import write_report
from runner.run import provenance
from runner.run.folder import RunDir
from runner.train.run_log import closing_lines, probe_changes, write_predictions
from runner.train.setup import Session
from runner.utils.console import Reporter
from runner.utils.files import file_sha256, write_json
from runner.utils.ranks import Rank
from runner.utils.tables import CellValue, rich_table
from runner.utils.timing import PhaseTimer


def verified_result(
    job: Job,
    run: RunDir,
    kept: BestEvaluation,
    validation: Split,
    clock: PhaseTimer,
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
        "weights_sha256": file_sha256(run.model / "model.safetensors"),
        "export_difference": difference,
        "seconds": clock.seconds(),
        "peak_memory_bytes": list(peaks),
    }


def finish(
    job: Job,
    run: RunDir,
    reporter: Reporter,
    kept: BestEvaluation,
    validation: Split,
    probe_rows: Sequence[dict[str, CellValue]],
    result: dict[str, Any],
) -> None:
    """Write predictions, report and, last of all, result.json; show the outcome."""
    shown = probe_changes(probe_rows)
    write_predictions(run, kept.scores, validation, unanswerable=job.data.unanswerable)
    write_report(run.path, result)
    write_json(run.result, result)
    if shown:
        reporter.table(rich_table("What the model answers", shown))
    for line in closing_lines(job, run, result):
        reporter.line(line)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory of this rank so far, in bytes: of the process, and of the GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def record(job: Job, rank: Rank, device: torch.device, have: Session) -> dict[str, Any]:
    """provenance.json: all that could make a second run differ."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.processor_name()
    )
    parts = (("train", have.training), ("validation", have.validation), ("tuning", have.tuning))
    return {
        **provenance.collect(
            job.seed, rank.world, torch.get_num_threads(), [name] * rank.local_world
        ),
        "data": {
            part: {
                "source": questions.dataset.source,
                "revision": questions.dataset.revision,
                "sha256": questions.dataset.sha256,
            }
            for part, questions in parts
            if questions is not None
        },
        "model": {
            "name": job.model.name,
            "location": str(have.files.folder),
            "revision": have.files.commit,
            "sha256": have.files.weights_sha256,
        },
        "zero_stage": job.zero.stage,
        "precision": have.precision,
        "span_loss": {"path": have.span_loss.path, "reason": have.span_loss.reason},
        "computing": have.computing.recorded(),
    }


def identity(job: Job, rank: Rank, have: Session) -> dict[str, Any]:
    """What a checkpoint must share with this start to be its own."""
    tuning = have.tuning
    return {
        "world": rank.world,
        "zero_stage": job.zero.stage,
        "layout": have.layout.micro_batches,
        "precision": have.precision,
        "computing": have.computing.choice(),
        "train": have.training.dataset.sha256,
        "validation": have.validation.dataset.sha256,
        "tuning": None if tuning is None else tuning.dataset.sha256,
        "windows": windows_sha256(have.training.windows, have.validation.windows),
        # Their frozen layers may be read before the checkpoint is (model.cache_frozen).
        "model": have.files.weights_sha256,
    }
