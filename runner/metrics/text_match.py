"""How right a predicted text is, by the official evaluations of SQuAD v1.1 and v2.0.

Sources: evaluate-v1.1.py and evaluate-v2.0.py, https://rajpurkar.github.io/SQuAD-explorer/.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only, as in the scripts


def normalise(text: str) -> str:
    """Lower the text, drop ASCII punctuation and the articles a, an, the, leave single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> bool:
    """Whether the prediction equals one of the right answers (at least one) once normalised."""
    prediction = normalise(prediction)
    return any(prediction == normalise(gold) for gold in golds)


def f1(prediction: str, golds: Sequence[str]) -> float:
    """The best word overlap F1, 0 to 1, with one of the right answers (at least one), as in v1.1.

    Where neither has a word left after normalising it is 0; version 2.0 says 1.
    """
    words = normalise(prediction).split()
    return max(_overlap(words, normalise(gold).split()) for gold in golds)


def match_v2(prediction: str, golds: Sequence[str]) -> tuple[int, float]:
    """Exact match and F1, 0 to 1, as in v2.0: without right answers, only "" is right.

    Right answers of which normalising leaves nothing do not count. Whole numbers are int, as in the
    script: from Python 3.12 on sum() adds int and float differently.
    """
    prediction = normalise(prediction)
    gold_texts = [text for gold in golds if (text := normalise(gold))] or [""]
    exact = int(prediction in gold_texts)
    if not prediction:
        return exact, exact
    words = prediction.split()
    return exact, max(_overlap(words, text.split()) for text in gold_texts)


def _overlap(words: list[str], gold_words: list[str]) -> float:
    common = sum((Counter(words) & Counter(gold_words)).values())
    if common == 0:
        return 0
    precision, recall = common / len(words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)
