"""Answers to new questions.

- `predictor`: a model that answers
- `locate`: where a model's files are
- `stream`: `predict`, line by line
- `questions`: rows that are asked
- `evaluate`: `evaluate`: scores of a model on other data
- `qa_pipeline`: the question-answering pipeline that transformers 5 removed
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.predict.predictor import Predictor
    from runner.predict.qa_pipeline import pipeline

__all__ = ["Predictor", "pipeline"]

_HOMES = {"Predictor": "runner.predict.predictor", "pipeline": "runner.predict.qa_pipeline"}


def __getattr__(name: str) -> Any:
    """What is public, imported when it is first wanted: it brings torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
