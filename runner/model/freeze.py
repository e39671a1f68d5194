"""Freezes parts of a model by patterns, and says what is trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from runner.errors import JobError

# --- freezing ----------------------------------------------------------------------------------


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Stop training every parameter that a pattern names.

    A pattern is a module or parameter name without the model's own prefix ("embeddings",
    "encoder.layer.3"), may hold a range of numbers ("encoder.layer.0-5"), or is a glob over
    parameter names ("*.LayerNorm.*").

    Raises:
        JobError: if a pattern matches nothing (listing what there is) or nothing is left to train.
    """
    prefix = f"{model.base_model_prefix}."
    names = {name: name.removeprefix(prefix) for name, _ in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        wanted = [
            name
            for name, short in names.items()
            if any(_matches(p, short) or _matches(p, name) for p in _spell_out(pattern))
        ]
        if not wanted:
            raise JobError(
                [
                    f"model.freeze: {pattern!r} matches no parameter; there are"
                    f" {', '.join(module_outline(names.values()))}"
                ]
            )
        for name in wanted:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise JobError(
            [f"model.freeze: {list(patterns)} freezes every parameter; nothing is left to train"]
        )


def module_outline(names: Iterable[str]) -> list[str]:
    """Name what can be frozen in a few words: top modules, numbered layers as a range."""
    outline: dict[str, list[int]] = {}
    for name in names:
        found = re.match(r"(.+?)\.(\d+)\.", name)
        if found:
            outline.setdefault(found[1], []).append(int(found[2]))
        else:
            outline.setdefault(name.split(".")[0], [])
    return [
        f"{key}.{min(n)}-{max(n)}" if n and max(n) > 0 else f"{key}.0" if n else key
        for key, n in outline.items()
    ]


def parameter_table(model: PreTrainedModel) -> list[dict[str, str | int | float | None]]:
    """One row for each top module and for all: parameters, how many of them are trained."""
    prefix = f"{model.base_model_prefix}."
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        short = name.removeprefix(prefix)
        found = re.match(r"(.+?\.\d+)\.", short)
        row = counts.setdefault(found[1] if found else short.split(".")[0], [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    rows: list[dict[str, str | int | float | None]] = [
        {"part": part, "parameters": total, "trained": trained}
        for part, (total, trained) in _merge(counts).items()
    ]
    totals = [sum(pair[n] for pair in counts.values()) for n in (0, 1)]
    rows.append({"part": "all", "parameters": totals[0], "trained": totals[1]})
    return rows


def _merge(counts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Join neighbouring numbered layers that are alike: encoder.layer.0-5."""
    merged: dict[str, list[int]] = {}
    run: tuple[str, int, int, list[int]] | None = None
    for name, pair in [*counts.items(), ("", [0, 0])]:
        stem, _, number = name.rpartition(".")
        if run and number.isdigit() and stem == run[0] and pair == run[3]:
            run = (run[0], run[1], int(number), pair)
            continue
        if run:
            stem_before, first, last, each = run
            label = f"{stem_before}.{first}-{last}" if last > first else f"{stem_before}.{first}"
            merged[label] = [value * (last - first + 1) for value in each]
            run = None
        if number.isdigit():
            run = (stem, int(number), int(number), pair)
        elif name:
            merged[name] = pair
    return merged


def _spell_out(pattern: str) -> list[str]:
    found = re.search(r"(?<=\.)(\d+)-(\d+)(?=\.|$)", pattern)
    if not found:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [f"{pattern[: found.start()]}{n}{pattern[found.end() :]}" for n in numbers]


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def optimiser_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of trained parameters: matrices decay, biases and norm weights (one dimension)
    never do."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
