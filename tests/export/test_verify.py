"""The last check of a run: a process with plain transformers opens the export and gives the same
answers. What rounding explains passes, whoever multiplied; what a broken export changes does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from runner.data.dataset import Example
from runner.data.windows import build_windows
from runner.errors import RunnerError
from runner.export import verify
from tests.conftest import SENTENCES
from tests.workers.fresh_models import processes
from tests.workers.zygote import lives

pytestmark = pytest.mark.xdist_group("verified")  # one process opens all models

ASKED = [
    Example(str(n), question, " ".join(SENTENCES), ("harbour",), (0,))
    for n, question in enumerate(("Who wrote the guide?", "How long does the battery last?"))
]


class Halves(nn.Module):
    """A linear layer whose sum is cut in two parts, each of them rounded: as a GPU's kernels may
    that run over the batch's packed tokens, and not over one window."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight_OI, half = self.layer.weight, self.layer.weight.shape[1] // 2
        first = x[..., :half] @ weight_OI[:, :half].T
        return x[..., half:] @ weight_OI[:, half:].T + first + self.layer.bias


class Export:
    """An exported model and the logits of the run that made it."""

    def __init__(self, folder: Path, source: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = AutoModelForQuestionAnswering.from_pretrained(source, dtype=dtype).eval()
        torch.manual_seed(0)
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name:
                nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.windows = build_windows(ASKED, self.tokenizer, 48, 16)

    def logits(self, cut: bool = False) -> list[np.ndarray]:
        """As the run computed them; `cut`: by matrix products that add in another order."""
        self.model.set_attn_implementation("eager" if cut else "sdpa")
        if cut:
            for parent in list(self.model.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, Halves(child))
        found = []
        firsts_N1, tokens_T = self.windows.firsts_N1, self.windows.tokens_T
        for row in range(min(verify.CHECKED_WINDOWS, len(self.windows))):
            inside = slice(firsts_N1[row], firsts_N1[row + 1])
            inputs = {"input_ids": torch.from_numpy(tokens_T[inside].astype(np.int64))[None]}
            types_T = self.windows.types_T[inside].astype(np.int64)
            with torch.no_grad():
                out = self.model(**inputs, token_type_ids=torch.from_numpy(types_T)[None])
            pair = torch.stack([out.start_logits[0], out.end_logits[0]], dim=-1)
            found.append(pair.float().numpy())
        return found

    def change(self, alter: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
        """Write one of the exported JSON files, or the weights, anew."""
        path = self.folder / name
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            alter(content)
            path.write_text(json.dumps(content))
            return
        weights = load_file(path)
        path.unlink()  # the file that is mapped stays as it is
        alter(weights)
        save_file(weights, path, {"format": "pt"})


@pytest.fixture
def check(zygote, monkeypatch):
    """verify_export, by a process that has opened models before."""
    monkeypatch.setattr(verify, "subprocess", processes(zygote.verifier()))

    def checked(export: Export, logits: list[np.ndarray]) -> float:
        fresh = verify.FreshProcess()
        return verify.verify_export(fresh, export.folder, ASKED, export.windows, logits, 48, 16)

    return checked


@pytest.fixture
def export(tmp_path, tiny, request):
    return Export(tmp_path / "model", tiny("bert"), getattr(request, "param", torch.bfloat16))


LAYER = "bert.encoder.layer.0."
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("export", [*HALF, torch.float32], indirect=True, ids=str)
def test_the_same_kernels_give_the_same_numbers(export, check):
    assert check(export, export.logits()) < 1e-5


@pytest.mark.parametrize("export", [*HALF, torch.float32], indirect=True, ids=str)
def test_other_kernels_are_no_other_model(export, check):
    """In bfloat16 they lie further apart than any share of the largest logit that would still find
    another model."""
    share = check(export, export.logits(cut=True))
    assert share > 0
    assert (share > 0.03) == (export.dtype == torch.bfloat16)


def _add(name: str, amount: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights[name].add_(amount)


def _add_to_one(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "output.dense.bias"][0] += 2.0


def _swap_columns(weights: dict[str, Tensor]) -> None:
    for name in ("qa_outputs.weight", "qa_outputs.bias"):
        weights[name] = weights[name].flip(0).contiguous()


def _swap_words(tokenizer: dict[str, Any]) -> None:
    words = tokenizer["model"]["vocab"]
    words["b"], words["h"] = words["h"], words["b"]


BROKEN = {
    "a shifted bias": ("model.safetensors", _add("qa_outputs.bias", 1.0)),
    "one number of a layer": ("model.safetensors", _add_to_one),
    "columns": ("model.safetensors", _swap_columns),
    "NaN": ("model.safetensors", _add("qa_outputs.weight", float("nan"))),
    "lacks weights": (
        "model.safetensors",
        lambda weights: weights.pop(LAYER + "output.LayerNorm.bias"),
    ),
    "activation": ("config.json", lambda config: config.update(hidden_act="relu")),
    "heads": ("config.json", lambda config: config.update(num_attention_heads=1)),
    "words": ("tokenizer.json", _swap_words),
}


@pytest.mark.parametrize(
    "export",
    [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)],
    indirect=True,
    ids=str,
)
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_export_is_refused(export, check, what):
    """However the run's kernels rounded."""
    file, alter = BROKEN[what]
    logits = export.logits(cut=True)
    check(export, logits)
    export.change(alter, file)
    message = what if what == "lacks weights" else "not the model that was scored"
    with pytest.raises(RunnerError, match=message):
        check(export, logits)


@pytest.mark.slow  # it imports transformers
def test_the_fresh_process_waits_for_a_model_that_is_not_there_yet(tmp_path, tiny):
    fresh = verify.FreshProcess()
    export = Export(tmp_path / "model", tiny("bert"), torch.float32)
    asked = export.folder, ASKED, export.windows, export.logits(), 48, 16
    assert verify.verify_export(fresh, *asked) < verify.FLOAT32_TOLERANCE


STARTS_AND_DIES = """
import os
from runner.export.verify import FreshProcess
print(FreshProcess()._process.pid, flush=True)
os._exit(9)
"""


@pytest.mark.slow
def test_a_fresh_process_that_nobody_will_ask_ends():
    """Its rank was killed, stopped or failed meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS_AND_DIES], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 9
    deadline = time.monotonic() + 100
    while lives(int(done.stdout)):
        assert time.monotonic() < deadline, "it is left over"
        time.sleep(0.05)


def test_logits_that_rule_a_token_out_set_no_scale():
    """BigBird's are a million lower for the question's tokens: beside them nothing would differ."""
    windows = SimpleNamespace(questions_N=np.array([0]))
    exact = np.array([[1.0, 2.0], [-1e6, -1e6 + 1], [0.5, -3.0]])
    answer = {"missing": [], "logits": [exact.tolist()], "exact": [exact.tolist()]}
    fresh: Any = SimpleNamespace(ask=lambda _: answer)
    rounded = exact + np.array([[0.0, 0.0], [0.05, 0.05], [0.0, 1e-6]])

    def verified(logits: np.ndarray) -> float:
        return verify.verify_export(fresh, Path("x"), ASKED, windows, [logits], 48, 16)  # type: ignore[arg-type]

    assert verified(rounded) < 1e-6
    with pytest.raises(RunnerError, match="is not the model that was scored"):
        verified(exact + np.array([[0.0, 0.5], [0.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(RunnerError, match="is not the model that was scored"):
        verified(np.where(exact < -10, 0.0, exact))  # which rules nothing out
