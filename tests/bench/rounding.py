"""How far logits in half precision lie apart if computed otherwise: what the export's check allows.

    python tests/bench/rounding.py --model FOLDER --data FILE [--dtype bfloat16]

Plain transformers on windows of real questions, by groups of as many as the check looks at. "fresh"
is what the check's own process computes (scaled dot product attention, whole products). "apart" is
the largest difference to it as a share of the largest logit; "times its rounding" the root mean
square of the distance to the same weights' logits in float32, as a multiple of fresh's own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import measuring
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from runner.export.verify import CHECKED_WINDOWS
from runner.job.schema import Model
from runner.model.load import ModelFiles


class Halves(nn.Module):
    """A linear layer whose sum is cut in two: both halves rounded (`coarse`), or only the sum."""

    def __init__(self, layer: nn.Linear, coarse: bool) -> None:
        super().__init__()
        wide = layer.weight.dtype if coarse else torch.float32
        self.weight_OI, self.bias_O = layer.weight.detach().to(wide), layer.bias.detach().to(wide)

    def forward(self, x: Tensor) -> Tensor:
        half, wide = self.weight_OI.shape[1] // 2, x.to(self.weight_OI.dtype)
        second = wide[..., half:] @ self.weight_OI[:, half:].T
        first = wide[..., :half] @ self.weight_OI[:, :half].T
        return (second + first + self.bias_O).to(x.dtype)


def cut(model: Any, coarse: bool) -> Any:
    """The model, its products cut in two."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Halves(child, coarse))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="SQuAD-format JSON file")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    folder, dtype = ModelFiles.locate(Model(name=args.model)).folder, getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    articles = json.loads(args.data.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    pairs = [(qa["question"], p["context"]) for p in paragraphs for qa in p["qas"]][: args.windows]

    def opened(attention: str = "sdpa", wanted: torch.dtype = dtype) -> Any:
        torch.manual_seed(0)  # a head that is not in the file
        model = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=dtype).eval()
        model.set_attn_implementation(attention)
        return model.to(wanted)

    def logits(model: Any) -> list[np.ndarray]:
        found = []
        for question, context in pairs:
            size = {"truncation": "only_second", "max_length": args.max_length}
            inputs = tokenizer(question, context, **size, return_tensors="pt")
            inputs.pop("attention_mask")
            with torch.no_grad():
                out = model(**inputs)
            found.append(torch.stack([out.start_logits[0], out.end_logits[0]]).float().numpy())
        return found

    ways: dict[str, Callable[[], Any]] = {
        "eager attention": lambda: opened("eager"),
        "sums in another order": lambda: cut(opened(), coarse=False),
        "both": lambda: cut(opened("eager"), coarse=False),
        "sums of two rounded halves": lambda: cut(opened(), coarse=True),
    }
    exact, fresh = logits(opened(wanted=torch.float32)), logits(opened())
    groups = [slice(n, n + CHECKED_WINDOWS) for n in range(0, len(pairs), CHECKED_WINDOWS)]
    rows = []
    for name, way in ways.items():
        found = logits(way())
        apart, times = [], []
        for group in groups:
            e, f, x = (np.concatenate([w.ravel() for w in n[group]]) for n in (exact, fresh, found))
            apart.append(100 * float(np.abs(x - f).max() / np.abs(e).max()))
            times.append(float(np.sqrt(np.mean((x - e) ** 2) / np.mean((f - e) ** 2))))
        rows.append(
            {
                "computed with": name,
                "apart, %: median": float(np.median(apart)),
                "largest": max(apart),
                "times its rounding: least": min(times),
                "median": float(np.median(times)),
                "most": max(times),
            }
        )
    note = f"{args.model}, {args.dtype}, {len(groups)} groups of {CHECKED_WINDOWS} windows."
    measuring.show(measuring.report("Rounding of logits", rows, [note]), args.table)


if __name__ == "__main__":
    main()
