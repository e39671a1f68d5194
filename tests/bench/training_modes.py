"""What training.py measures: ways to take the same steps, on random weights and windows.

Legend: N windows of the data set, T tokens end to end, B windows of a batch, L its padded length.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measuring  # noqa: F401  (puts the checkout on the path)
import numpy as np
import torch
from torch import Tensor, nn
from training_loop import train_batches

from runner.data.collate import collate
from runner.data.loader import DeviceBatch, WindowLoader, pad, tokens_on_device
from runner.data.sampler import epoch_batches
from runner.data.windows import Windows
from runner.distributed.engine import deepspeed_config, start_engine
from runner.job.schema import Model, Train, Zero, batch_layout
from runner.model.dropout import CpuDropout, DropoutMasks
from runner.model.forward import SpanModel
from runner.model.freeze import freeze, optimiser_groups
from runner.model.loss import choose_span_loss
from runner.train.plan import choose_plan
from runner.train.setup import cache_frozen_layers
from runner.utils.ranks import Rank

SHAPES = {  # width, layers, heads, inner width
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "minilm": (384, 6, 12, 1536),
    "tiny": (32, 2, 2, 64),
}
# Tokens of windows at each twentieth of SQuADShifts' New Wikipedia questions, BERT's uncased
# vocabulary, 384 tokens a window and a stride of 128: for machines without the file.
QUANTILES = (
    *(35, 93, 108, 117, 124, 131, 137, 143, 148, 154, 160),
    *(167, 174, 183, 192, 204, 217, 234, 259, 303, 384),
)
RANK = Rank(0, 1, 0, 1)
Batches = Sequence[np.ndarray]
Steps = Callable[[Batches], None]  # an optimiser step a batch


def windows_of(lengths_N: np.ndarray, vocabulary: int) -> Windows:
    """Windows of random tokens; a third of the answers is not in the window, as with SQuAD v2."""
    draw = np.random.default_rng(0)
    total, count = int(lengths_N.sum()), len(lengths_N)
    starts_N = np.where(draw.random(count) < 1 / 3, 0, draw.integers(1, lengths_N))
    ends_N = np.minimum(starts_N + draw.integers(0, 4, count) * (starts_N > 0), lengths_N - 1)
    return Windows(
        tokens_T=draw.integers(5, vocabulary, total).astype(np.int32),
        types_T=draw.integers(0, 2, total).astype(np.uint8),
        firsts_N1=np.concatenate([[0], np.cumsum(lengths_N)]),
        questions_N=np.arange(count, dtype=np.int32),
        contexts_N2=np.stack([np.ones(count), lengths_N], axis=1).astype(np.int32),
        starts_N=starts_N.astype(np.int32),
        ends_N=ends_N.astype(np.int32),
        cls_N=np.zeros(count, np.int32),
        chars_C2=np.zeros((0, 2), np.int32),
        chars_firsts_N=np.zeros(count, np.int64),
    )


def lengths_from(args: argparse.Namespace) -> np.ndarray:
    """Lengths of the windows to train on, int64."""
    if args.data is None:
        places = np.random.default_rng(1).random(args.windows) * (len(QUANTILES) - 1)
        lengths = np.interp(places, np.arange(len(QUANTILES)), QUANTILES).astype(np.int64)
        return np.minimum(lengths, args.max_length)
    from runner.data.dataset import load_dataset
    from runner.data.windows import build_windows
    from runner.job.schema import Columns
    from runner.model.load import ModelFiles, load_tokenizer

    data = load_dataset(str(args.data), columns=Columns(), unanswerable=True, on_bad_row="drop")
    tokenizer = load_tokenizer(ModelFiles.locate(Model(name=args.tokenizer)))
    found = build_windows(data.examples, tokenizer, args.max_length, args.max_length // 3)
    return found.lengths_N[: args.windows]


def new_model(shape: str, seed: int = 0, **extra: Any) -> Any:
    """A BERT for question answering with random weights."""
    from transformers import BertConfig, BertForQuestionAnswering

    width, layers, heads, inner = SHAPES[shape]
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=30522 if shape != "tiny" else 1000,
        **extra,
    )
    return BertForQuestionAnswering(config)


class Modes:
    """Windows, batches and settings that all modes share."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.on_gpu = device.type == "cuda"
        self.precision = "bf16" if self.on_gpu else "fp32"
        vocabulary = 30522 if args.shape != "tiny" else 1000
        self.windows = windows_of(lengths_from(args), vocabulary)
        lengths_N = self.windows.lengths_N
        self.mixed, self.alike = (
            [
                rows
                # The second epoch's: the first one begins with its largest batches.
                for rows in epoch_batches(lengths_N, args.batch_size, 1, 1, buckets=buckets)
                if len(rows) == args.batch_size
            ]
            for buckets in (False, True)
        )
        self.section = Train(
            epochs=1,
            batch_size=args.batch_size,
            learning_rate=3e-5,
            weight_decay=0.01,
            log_every=max(args.steps, args.warmup),  # rows are written at the end of a round
        )

    def _new_model(self) -> Any:
        with self.device:  # drawn where it stays: BERT-large takes a CPU five seconds
            return new_model(self.args.shape).train()

    def recipe(self, *, loader: bool) -> Steps:
        """What Hugging Face's Trainer does in a step, as a loop."""
        import datasets
        from transformers import default_data_collator

        model = self._new_model()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.01, fused=True)
        rows = [self._padded(np.array([n])) for n in range(len(self.windows))] if loader else []
        table = datasets.Dataset.from_list(
            [{name: values[0].tolist() for name, values in row.items()} for row in rows]
        )
        ready: dict[bytes, dict[str, Tensor]] = {}

        def step(batch: np.ndarray) -> None:
            if loader:
                inputs = default_data_collator([table[int(n)] for n in batch])
                inputs = {
                    name: values.pin_memory() if self.on_gpu else values
                    for name, values in inputs.items()
                }
                inputs = {k: v.to(self.device, non_blocking=True) for k, v in inputs.items()}
            else:
                key = batch.tobytes()
                if key not in ready:
                    ready[key] = {k: v.to(self.device) for k, v in self._padded(batch).items()}
                inputs = ready[key]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
                loss = model(**inputs).loss
            loss.backward()
            bool(torch.isnan(loss))  # Trainer's logging_nan_inf_filter
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

        def steps(batches: Batches) -> None:
            for batch in batches:
                step(batch)

        return steps

    def _padded(self, rows: np.ndarray) -> dict[str, Tensor]:
        batch = collate(self.windows, rows)
        padded = pad(batch, 0, self.args.max_length)
        mask = padded.mask_RL
        return {
            "input_ids": padded.ids_RL,
            "token_type_ids": padded.types_RL,
            "attention_mask": torch.ones_like(padded.types_RL) if mask is None else mask,
            "start_positions": batch.starts_B,
            "end_positions": batch.ends_B,
        }

    def ours(
        self, zero: Zero, *, compiled: str = "off", torch_dropout: bool = False, **section: Any
    ) -> Steps:
        """spantune's own loop."""
        fed, span_loss, dropout = self._engine(zero, compile=compiled, **section)
        if torch_dropout:
            for parent in fed.engine.module.modules():
                for name, child in parent.named_children():
                    if isinstance(child, CpuDropout):
                        parent.register_module(name, nn.Dropout(child.p))

        def steps(batches: Batches) -> None:
            train_batches(fed, span_loss, dropout, self.windows, self.section, batches)

        return steps

    def _engine(self, zero: Zero, **section: Any) -> tuple[SpanModel, Any, DropoutMasks]:
        job = Model(name="none", precision=self.precision, **section)
        model, dropout = self._new_model(), DropoutMasks(1, 0)
        freeze(model, job.freeze)
        computing = choose_plan(
            job,
            zero,
            model,
            self.device,
            self.precision,
            longest=self.args.max_length,
            tokens=len(self.windows.tokens_T),
            dropout=dropout,
        )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        layout = batch_layout(self.section, 1)
        config = deepspeed_config(zero, self.section, layout, self.precision, trained)
        span_loss = choose_span_loss("auto", model, self.device, zero.stage)
        groups = optimiser_groups(model, 0.01)
        engine = start_engine(
            model, self.device, groups, self.section, config, 10**6, computing.optimiser
        )
        fed = self._fed(engine, computing.packing)
        with tempfile.TemporaryDirectory() as folder:
            size = self.args.batch_size
            sets = (self.windows,)
            fed, lines = cache_frozen_layers(fed, computing.frozen, sets, size, Path(folder), RANK)
        for line in lines:
            print(f"  {line}", file=sys.stderr)
        engine.train()
        return fed, span_loss, dropout

    def _fed(self, model: Any, packing: Any) -> SpanModel:
        there = tokens_on_device((self.windows,), self.device)
        loader = WindowLoader(self.device, 0, packing, 8 if self.on_gpu else 1, there)
        return SpanModel(model, loader, True)

    def defaults(self) -> Steps:
        """DeepSpeed's ZeRO-2 with nothing configured but what it must be told."""
        import deepspeed

        model, dropout = self._new_model(), DropoutMasks(1, 0)
        fed, span_loss = self._packed(model, dropout)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.args.batch_size,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "steps_per_print": 2**31 - 1,
        }
        if self.on_gpu:
            config["bf16"] = {"enabled": True}
        optimiser = torch.optim.AdamW(optimiser_groups(model, 0.01), lr=3e-5, fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=config)
        fed = dataclasses.replace(fed, engine=engine)

        def step(batch: DeviceBatch) -> None:
            engine.backward(span_loss(fed(batch)))
            engine.step()

        return self._ahead(fed, step)

    def _ahead(self, fed: SpanModel, step: Callable[[DeviceBatch], None]) -> Steps:
        """Feed a step as spantune's loop is fed: what differs is the step alone."""

        def steps(batches: Batches) -> None:
            for batch in fed.prefetch(self.windows, batches):
                step(batch)

        return steps

    def plain(self) -> Steps:
        """PyTorch alone: the same packed model and loss, bf16 weights, fused AdamW."""
        model, dropout = self._new_model(), DropoutMasks(1, 0)
        model = model.to(self.device, torch.bfloat16 if self.on_gpu else torch.float32)
        fed, span_loss = self._packed(model, dropout)
        optimiser = torch.optim.AdamW(optimiser_groups(model, 0.01), lr=3e-5, fused=True)

        def step(batch: DeviceBatch) -> None:
            span_loss(fed(batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

        return self._ahead(fed, step)

    def _packed(self, model: Any, dropout: DropoutMasks) -> tuple[SpanModel, Any]:
        computing = choose_plan(
            Model(name="none", precision=self.precision, compile="off"),
            Zero(),
            model,
            self.device,
            self.precision,
            longest=self.args.max_length,
            tokens=1,
            dropout=dropout,
        )
        span_loss = choose_span_loss("auto", model, self.device, 2)
        return self._fed(model, computing.packing), span_loss
