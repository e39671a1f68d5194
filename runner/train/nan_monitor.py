"""Notices that loss, gradients or weights are no longer numbers, and finds the first step and the
questions where it began."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runner.distributed.collectives import all_gather
from runner.errors import DivergedError
from runner.utils.ranks import Rank

NAMED = 5  # questions that are named


@dataclass(frozen=True)
class Pass:
    """A forward pass of this rank: its step, its windows, its loss (still on the device)."""

    step: int
    rows: np.ndarray
    loss: Tensor


class NanMonitor:
    """Keeps what the passes since the last look gave. Nothing is read from the device before there
    is a reason to wait for it anyway.

    Args:
        rank: this one.
        questions_N: the question of each training window.
        ids: of all questions.
        scaled: whether the loss is scaled (fp16): infinite gradients then only lead to another
            scale.
    """

    def __init__(
        self, rank: Rank, questions_N: np.ndarray, ids: Sequence[str], *, scaled: bool
    ) -> None:
        self._rank, self._questions_N, self._ids, self._scaled = rank, questions_N, ids, scaled
        self._now: np.ndarray | None = None
        self._passes: list[Pass] = []
        self._norms: list[tuple[int, np.ndarray, Any]] = []

    def begin_pass(self, rows: np.ndarray) -> None:
        """Note the windows of the pass that is next."""
        self._now = rows

    @contextmanager
    def naming_questions(self) -> Iterator[None]:
        """Note on any exception which questions were at hand."""
        try:
            yield
        except Exception as error:
            if self._now is not None and len(self._now):
                error.add_note(f"over {self._questions(self._now)}")
            raise

    def record(self, step: int, rows: np.ndarray, loss: Tensor) -> None:
        """Note a forward pass with its loss."""
        self._passes.append(Pass(step, rows, loss.detach()))

    def record_step(self, step: int, rows: np.ndarray, norm: Any) -> None:
        """Note an optimiser step over the windows of all ranks, with the norm of its gradients."""
        self._now = None
        if norm is not None and not self._scaled:
            self._norms.append((step, rows, norm))

    def check_loss(self, loss: float) -> None:
        """Look at everything noted since the last time, where a row is written anyway. Every rank
        must call this.

        Args:
            loss: sum over all ranks.

        Raises:
            DivergedError: on every rank, naming the first bad step.
        """
        # Sum and norms are alike on all ranks: so is what follows from them.
        if not (math.isfinite(loss) and all(map(math.isfinite, self._norm_values()))):
            self._explain()
        self._passes.clear()
        self._norms.clear()

    def check_weights(self, model: nn.Module) -> None:
        """The same before a checkpoint, where no sum is at hand; the weights are looked at too."""
        losses = [noted.loss for noted in self._passes]
        good = not losses or bool(torch.isfinite(torch.stack(losses)).all())
        good = good and all(map(math.isfinite, self._norm_values())) and _finite(model.parameters())
        if not all(all_gather(good)):
            self._explain()

    def _explain(self) -> None:
        found = [place for place in all_gather(self._first()) if place is not None]
        # Of the same step, the loss comes before the gradients that it leads to.
        text = min(found)[2] if found else "the weights are no longer numbers"
        raise DivergedError(
            f"{text}; checkpoints from before it are untouched; lower train.learning_rate, raise"
            ' train.warmup, or set model.precision = "fp32"'
        )

    def _norm_values(self) -> list[float]:
        norms = [norm for _, _, norm in self._norms]
        if norms and all(isinstance(norm, Tensor) for norm in norms):
            return torch.stack([norm.reshape(()) for norm in norms]).tolist()
        return [float(norm) for norm in norms]

    def _first(self) -> tuple[int, int, str] | None:
        """The first bad step of this rank: step, 0 for a loss and 1 for gradients, a sentence."""
        found = []
        for noted in self._passes:
            if not math.isfinite(loss := float(noted.loss)):
                where = f"on rank {self._rank.index}, over {self._questions(noted.rows)}"
                found.append((noted.step, 0, f"the loss is {loss} at step {noted.step} {where}"))
                break
        for (step, rows, _), norm in zip(self._norms, self._norm_values(), strict=True):
            if not math.isfinite(norm):
                # A norm is one number for all ranks: which of them spoilt it, it does not tell.
                where = f"step {step}, all ranks together, over {self._questions(rows)}"
                found.append((step, 1, f"the gradients' norm is {norm} at {where}"))
                break
        return min(found, default=None)

    def _questions(self, rows: np.ndarray) -> str:
        ids = list(dict.fromkeys(self._ids[int(question)] for question in self._questions_N[rows]))
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        return f"the questions {', '.join(ids[:NAMED])}{more}"


def _finite(parameters: Iterable[nn.Parameter]) -> bool:
    # ZeRO-3 keeps its share of a parameter beside it.
    shares = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in parameters]
    return all(bool(torch.isfinite(share).all()) for share in shares)
