"""The training loop without a run around it: for measurements, and for tests on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from runner.data.sampler import TrainSampler
from runner.job.schema import Train, batch_layout
from runner.model.dropout import DropoutMasks
from runner.model.forward import SpanModel
from runner.model.loss import SpanLoss
from runner.train.trainer import Trainer
from runner.utils.ranks import Rank
from runner.utils.timing import PhaseTimer

ALONE = Rank(0, 1, 0, 1)


class Rows:
    """Stands in for a run's log: keeps the steps of the rows of train.csv."""

    def __init__(self, follow: Callable[..., None]) -> None:
        self.steps_written: list[int] = []
        self._follow = follow

    def line(self, text: str, indent: str = "  ", *, detail: bool = False) -> None:
        """Nothing is told."""

    @contextmanager
    def steps(self, _: Any) -> Iterator[Callable[..., None]]:
        yield self._follow

    def step(self, state: Any, totals: Any, engine: Any) -> None:
        self.steps_written.append(state.step)


def train_batches(
    model: SpanModel,
    span_loss: SpanLoss,
    dropout: DropoutMasks,
    windows: Any,
    section: Train,
    batches: Sequence[np.ndarray],
    follow: Callable[..., None] = lambda done, note="": None,
) -> list[int]:
    """Train one epoch of these batches, an optimiser step each, in the loop of a run; returns the
    steps after which a row of train.csv would have been written.

    Args:
        model: around DeepSpeed's engine.
        span_loss, dropout: as for a run.
        windows: of the training questions, one each.
        section: the job's [train].
        batches: rows of the windows.
        follow: told of each step.
    """
    dealt = TrainSampler(windows.lengths_N, section, batch_layout(section, 1), seed=1, rank=0)
    log = Rows(follow)
    session: Any = SimpleNamespace(
        job=SimpleNamespace(train=section, stop=None),
        run=None,
        rank=ALONE,
        device=model.loader.device,
        splits=SimpleNamespace(
            training=SimpleNamespace(
                windows=windows,
                dataset=SimpleNamespace(
                    examples=[SimpleNamespace(id=str(n)) for n in range(len(windows))]
                ),
            )
        ),
        sampler=SimpleNamespace(
            steps=len(batches),
            lengths_N=windows.lengths_N,
            epoch=lambda epoch: list(batches),
            passes=dealt.passes,
            weight=dealt.weight,
        ),
        plan=SimpleNamespace(dropout=dropout),
        span_loss=span_loss,
        engine=model.engine,
        model=model,
        precision="bf16",
    )
    watchdog: Any = SimpleNamespace(progress_at=lambda place, bounded=True: None)
    nothing: Any = None
    trainer = Trainer(session, log, nothing, watchdog, PhaseTimer(), None)  # type: ignore[arg-type]
    trainer.train_epoch()
    return log.steps_written
