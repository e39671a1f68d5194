"""Small random models of every family that can be packed, and random windows, made in memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from runner.data.windows import Windows

VOCABULARY = 60


def config_of(family: str, layers: int = 2, **extra: object):
    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": 50, "pad_token_id": 0}
    if family == "distilbert":
        shape |= {"dim": 32, "n_layers": layers, "n_heads": 2, "hidden_dim": 64}
        return AutoConfig.for_model(family, **shape, **extra)
    shape |= {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, **extra}
    if family in ("electra", "albert"):
        shape["embedding_size"] = 16
    if family == "ernie":
        shape["use_task_id"] = True
    if family == "modernbert":  # global and local layers in turn; a token sees 4 to either side
        shape |= {"global_attn_every_n_layers": 2, "local_attention": 8}
        shape |= dict.fromkeys(("bos_token_id", "cls_token_id"), 1)
        shape |= dict.fromkeys(("eos_token_id", "sep_token_id"), 2)
    if family in ("roberta", "xlm-roberta", "camembert"):
        shape |= {"type_vocab_size": 1, "pad_token_id": 1}
    return AutoConfig.for_model(family, **shape)


def model_of(family: str, layers: int = 2, seed: int = 0, **extra: object):
    """A random model of two heads, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForQuestionAnswering.from_config(config_of(family, layers, **extra)).eval()
    for parameter in model.parameters():  # fresh weights make all logits alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def windows_of(lengths, seed=0) -> Windows:
    """Random windows of the given lengths, one a question; labels anywhere inside."""
    draw = np.random.default_rng(seed)
    lengths_N = np.asarray(lengths)
    total, count = int(lengths_N.sum()), len(lengths_N)
    starts_N = draw.integers(0, lengths_N)
    return Windows(
        tokens_T=draw.integers(5, VOCABULARY, total).astype(np.int32),
        types_T=draw.integers(0, 2, total).astype(np.uint8),
        firsts_N1=np.concatenate([[0], np.cumsum(lengths_N)]),
        questions_N=np.arange(count, dtype=np.int32),
        contexts_N2=np.zeros((count, 2), np.int32),
        starts_N=starts_N.astype(np.int32),
        ends_N=draw.integers(starts_N, lengths_N).astype(np.int32),
        cls_N=np.zeros(count, np.int32),
        chars_C2=np.zeros((0, 2), np.int32),
        chars_firsts_N=np.zeros(count, np.int64),
    )


def takes_types(family: str) -> bool:
    return family in ("bert", "electra", "albert", "ernie")


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Each parameter's gradient by its name; a parameter that has none is left out."""
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_gradients(
    mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], rtol: float = 1e-4
) -> None:
    """Two ways to compute one model's gradients agree, up to the rounding of their sums.

    A gradient is a sum over tokens, and what is rounded has the size of its terms, not of the sum.
    Some sums are zero in theory: of a key's bias, which softmax does not see, and of what moves
    all logits alike, the head's bias and that of the last norm. A weight of the same module sums
    the same terms, each times an input of size one, so the largest gradient of the module tells
    the size of the terms.
    """
    assert mine.keys() == theirs.keys()
    terms: dict[str, float] = {}
    for name, gradient in theirs.items():
        module = name.rpartition(".")[0]
        terms[module] = max(terms.get(module, 0.0), float(gradient.abs().max()))
    for name, gradient in theirs.items():
        apart = float((mine[name] - gradient).abs().max())
        allowed = rtol * terms[name.rpartition(".")[0]]
        assert apart <= allowed, f"{name}: {apart:.3g} apart, {allowed:.3g} is allowed"
