"""What a run's numbers come from: provenance.json, and what its checkpoints belong to."""

from __future__ import annotations

from typing import Any

import torch

from runner.checkpoint.manager import windows_sha256
from runner.job.schema import Job
from runner.run import provenance
from runner.train.setup import Material
from runner.utils.ranks import Rank


def record(job: Job, rank: Rank, device: torch.device, have: Material) -> dict[str, Any]:
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
            "location": have.pretrained.location,
            "revision": have.pretrained.revision,
            "sha256": have.pretrained.weights_sha256,
        },
        "zero_stage": job.zero.stage,
        "precision": have.precision,
        "span_loss": {"path": have.span_loss.path, "reason": have.span_loss.reason},
        "computing": have.computing.recorded(),
    }


def identity(job: Job, rank: Rank, have: Material) -> dict[str, Any]:
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
        "model": have.pretrained.weights_sha256,
    }
