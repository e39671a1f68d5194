"""What a run is, and its end on rank 0: export proved, predictions and report, result.json last."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from runner.checkpoint.best import BestEvaluation
from runner.checkpoint.prune import find_superfluous, remove_superfluous
from runner.data.dataset import Dataset
from runner.data.window_cache import windows_sha256
from runner.data.windows import LABELS
from runner.errors import DataError, StorageError
from runner.eval.evaluation import Evaluation
from runner.eval.results import reported, result_scores
from runner.export.model_card import model_card
from runner.export.verify import FreshProcess, verify_export
from runner.job.inference import InferenceSettings
from runner.job.load import dump_job
from runner.job.schema import Job, Track
from runner.report.render import write_report
from runner.run import provenance
from runner.train.run_log import RunLog
from runner.train.setup import Session
from runner.train.state import TrainState
from runner.train.summary import closing_lines, data_hashes, probe_changes, write_predictions
from runner.utils.files import Fence, file_sha256, storage_errors, write_json


def verified_result(
    session: Session,
    best: BestEvaluation,
    exported: Path,
    fresh_process: FreshProcess,
    state: TrainState,
    peaks: Sequence[dict[str, int]],
) -> dict[str, Any]:
    """result.json: scores, the hash of the weights that `exported` has, seconds and memory, after a
    fresh process has agreed.

    Raises:
        RunnerError: if the exported model is not the one that was scored.
    """
    job, model, validation = session.job, session.run.model, session.splits.validation
    with state.timer("verification"):
        difference = verify_export(
            fresh_process,
            model,
            validation.dataset.examples,
            validation.windows,
            best.logits,
            job.data.max_length,
            job.data.stride,
        )
    further = {
        name: further_result(scores, session.splits.sets.validation[name].dataset, job)
        for name, scores in best.further.items()
    }
    return {
        **result_scores(best.scores, job.score.null_threshold, job.seed),
        **({"sets": further} if further else {}),
        "epoch": best.epoch,
        "step": best.step,
        "caveats": list(session.caveats),
        "weights_sha256": file_sha256(exported / session.run.weights.name),
        "export_difference": difference,
        "seconds": state.timer.seconds(),
        "peak_memory_bytes": list(peaks),
    }


def further_result(scores: Evaluation, dataset: Dataset, job: Job) -> dict[str, Any]:
    """The scores of a further validation set, as those of an evaluation stand in its folder."""
    source = {"source": dataset.source, "sha256": dataset.sha256, "dropped": len(dataset.dropped)}
    return {**result_scores(scores, job.score.null_threshold, job.seed), "data": source}


def finish(
    session: Session,
    log: RunLog,
    best: BestEvaluation,
    state: TrainState,
    result: dict[str, Any],
    fence: Fence,
) -> None:
    """Write predictions, report and, last of all, result.json; show the outcome.

    Raises:
        RunDirError: by `fence`, if the folder is no longer ours.
        StorageError: if a file cannot be written, or `model/` is no longer what was proved.
    """
    job, run = session.job, session.run
    changes = probe_changes(state.probe_rows)
    unanswerable = job.data.unanswerable
    for name, split in session.splits.sets.validation.items():
        further = name in best.further
        path = run.predictions_of(name) if further else run.predictions
        scores = best.further[name] if further else best.scores
        write_predictions(path, scores, split, fence, unanswerable=unanswerable)
    write_report(run.path, result, fence=fence)
    with storage_errors(run.model):
        published = file_sha256(run.weights)
    if published != result["weights_sha256"]:
        raise StorageError(
            f"{run.model}: holds other weights than were proved: somebody else writes there; start"
            " the same command again"
        )
    write_json(run.result, result, fence)
    remove_checkpoints(session, log, fence)
    log.scores()
    if changes:
        log.table("What the model answers", changes)
    for line in closing_lines(job, run, result):
        log.line(line, indent="")
    log.finish(best)


def remove_checkpoints(session: Session, log: RunLog, fence: Fence) -> None:
    """Remove what train.keep_checkpoints does not keep of a run that has its result."""
    run, keep = session.run, session.job.train.keep_checkpoints
    try:
        found = find_superfluous(run, keep)
        if found.names:
            remove_superfluous(run, found, fence)
            log.line(f'Removed {found} (train.keep_checkpoints = "{keep}")', indent="")
    except (DataError, StorageError) as error:  # the run is finished, with or without them
        log.line(f"checkpoints stay: {error}", indent="")


def card_text(session: Session, best: BestEvaluation, settings: InferenceSettings) -> str:
    """The model card of an evaluation's weights."""
    # A card is made to be published: whose cluster and trackers it ran on is not for it.
    public = session.job.model_copy(update={"slurm": None, "track": Track()})
    return model_card(
        session.job,
        reported(best.scores),
        data_hashes(session.splits.sets),
        dump_job(public),
        intervals=best.scores.intervals,
        settings=settings,
        further={name: reported(scores) for name, scores in best.further.items()},
    )


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory of this rank so far, in bytes: of the process, and of the GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def provenance_record(session: Session) -> dict[str, Any]:
    """provenance.json: all that could make a second run differ."""
    job, rank, device = session.job, session.rank, session.device
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else provenance.processor_name()
    return {
        **provenance.collect(
            job.seed, rank.world, torch.get_num_threads(), [name] * rank.local_world
        ),
        "data": {
            name: {
                "source": split.dataset.source,
                "revision": split.dataset.revision,
                "sha256": split.dataset.sha256,
            }
            for name, split in session.splits.sets.named().items()
        },
        "model": {
            "name": job.model.name,
            "location": str(session.files.folder),
            "revision": session.files.commit,
            "sha256": session.files.weights_sha256,
            "converted_from": dict(session.files.weights.converted_from),
        },
        "zero_stage": job.zero.stage,
        "precision": session.precision,
        "span_loss": {"path": session.span_loss.path, "reason": session.span_loss.reason},
        "computing": session.plan.record(),
    }


def resume_identity(session: Session) -> dict[str, Any]:
    """What a checkpoint must share with this start to be its own; the keys stand in every one."""
    splits, sets = session.splits, session.splits.sets
    weights = [one.weight for one in session.job.data.trained]
    trained = [(s.dataset.sha256, w) for s, w in zip(sets.training.values(), weights, strict=True)]
    scored = [(split.dataset.sha256, name) for name, split in sets.validation.items()]
    return {
        "world": session.rank.world,
        "zero_stage": session.job.zero.stage,
        "layout": session.sampler.layout.micro_batches,
        "precision": session.precision,
        "computing": session.plan.choice(),
        "train": trained[0][0] if weights == [1] else _digest(trained),
        "validation": scored[0][0] if len(scored) == 1 else _digest(scored),
        "tuning": None if sets.tuning is None else sets.tuning.dataset.sha256,
        "labels": LABELS,
        "windows": windows_sha256(
            splits.training.windows, *(split.windows for split in sets.validation.values())
        ),
        # Frozen layers may be read before the checkpoint is (model.cache_frozen).
        "model": session.files.weights_sha256,
        "job": session.job.model_dump(mode="json"),
    }


def _digest(sets: Sequence[tuple[str, object]]) -> str:
    """One hash for several sets, of their contents and of what else belongs to them."""
    return hashlib.sha256(json.dumps(sets).encode()).hexdigest()
