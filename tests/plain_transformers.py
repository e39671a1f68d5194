"""What a model answers by plain transformers alone: no window, batch or search of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from runner.predict.predictor import Question

Place = tuple[int, int]


def by_hand(
    folder: Path, asked: Question, *, max_length: int = 64, stride: int = 16, longest: int = 8
) -> tuple[dict[Place, tuple[float, int]], float, int]:
    """All spans of up to `longest` tokens of all windows, with their logits in float32.

    Returns:
        Best logit and window of each span of characters, the lowest null score, and how many
        windows there are.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = tokenizer(
        asked.question.lstrip(), asked.context, truncation="only_second", max_length=max_length,
        stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    spans, nulls = {}, []
    for window in range(len(encoded["input_ids"])):
        names = [name for name in tokenizer.model_input_names if name in encoded]
        with torch.no_grad():
            out = model(**{name: torch.tensor([encoded[name][window]]) for name in names})
        start_L, end_L = out.start_logits[0].numpy(), out.end_logits[0].numpy()
        nulls.append(float(start_L[0] + end_L[0]))
        inside = [n for n, part in enumerate(encoded.sequence_ids(window)) if part == 1]
        for s in inside:
            for e in [e for e in inside if s <= e < s + longest]:
                first = encoded["offset_mapping"][window][s][0]
                # A space in front of a word counts as the word's first character.
                space = tokenizer.convert_ids_to_tokens(encoded["input_ids"][window][e]) == "▁"
                last = encoded["offset_mapping"][window][e][0 if space else 1]
                text = asked.context[first:last]
                first += len(text) - len(text.lstrip())  # an answer has no outer blanks
                place = first, first + len(text.strip())
                score = float(start_L[s] + end_L[e])
                if place[0] < place[1] and score > spans.get(place, (-np.inf,))[0]:
                    spans[place] = score, window
    return spans, min(nulls), len(encoded["input_ids"])
