"""Reads the calls that the old question-answering pipeline took: questions, contexts, keywords."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

# What the old pipeline takes and this one has no use for: windows are never padded to a length, it
# never cut a question with a fast tokenizer, and here there is one framework.
_IGNORED = (
    *("padding", "max_question_len", "batch_size", "num_workers", "truncation"),
    *("framework", "use_fast"),
)


@dataclass(frozen=True)
class Options:
    """The old pipeline's keywords and their defaults."""

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True


def read_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Find the questions in a call.

    Returns:
        The questions, a list or an iterator, and the keywords that are left.

    Raises:
        ValueError: if there are none, or not as many as contexts.
    """
    named = [kwargs.pop(name, None) for name in ("X", "data")]
    question, context = kwargs.pop("question", None), kwargs.pop("context", None)
    given = args[0] if len(args) == 1 else None
    if len(args) == 2 and all(isinstance(arg, str) for arg in args):
        given = {"question": args[0], "context": args[1]}
    elif len(args) > 1:
        given = list(args)
    for other in named:
        given = other if given is None else given
    if given is None:
        given = _paired(question, context)
    if isinstance(given, Mapping) or hasattr(given, "question_text"):
        return [given], kwargs
    if isinstance(given, Iterator):
        return given, kwargs
    if isinstance(given, Iterable) and not isinstance(given, str):
        return list(given), kwargs
    raise ValueError("give question=... and context=..., or dictionaries that have both")


def _paired(question: Any, context: Any) -> list[dict[str, Any]]:
    if isinstance(question, str) and isinstance(context, str):
        return [{"question": question, "context": context}]
    if isinstance(question, list) and isinstance(context, str):
        return [{"question": text, "context": context} for text in question]
    if isinstance(question, list) and isinstance(context, list):
        if len(question) != len(context):
            raise ValueError("there are not as many questions as contexts")
        return [{"question": q, "context": c} for q, c in zip(question, context, strict=True)]
    raise ValueError("question and context are texts, a list and a text, or two lists")


def read_pair(item: Any) -> tuple[str, str]:
    """Question and context of a dictionary, or of a SquadExample of transformers 4.

    Raises:
        ValueError: if it is neither, or one of the texts is empty or None.
        KeyError: if one is absent.
    """
    if hasattr(item, "question_text"):
        item = {"question": item.question_text, "context": item.context_text}
    if not isinstance(item, Mapping):
        raise ValueError(f"{item!r} is no dictionary with question and context")
    for name in ("question", "context"):
        if name not in item:
            raise KeyError(f"a dictionary needs question and context; this one has no {name}")
        if not isinstance(item[name], str) or not item[name].strip():
            raise ValueError(f"`{name}` cannot be empty or None")
    return item["question"], item["context"]


def read_options(given: Mapping[str, Any]) -> Options:
    """Keywords of a call, those left out that say nothing here.

    Raises:
        ValueError: if a number is too small.
        TypeError: naming unknown keywords.
    """
    chosen = {k: v for k, v in given.items() if v is not None and k not in (*_IGNORED, "topk")}
    if given.get("topk") is not None and "top_k" not in chosen:
        chosen["top_k"] = given["topk"]  # its name before transformers 4.10
    unknown = set(chosen) - {field.name for field in fields(Options)}
    if unknown:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: no such keyword here; for a model that is to be loaded"
            " in another way, load it and give model=... and tokenizer=..."
        )
    options = Options(**chosen)
    for name in ("top_k", "max_answer_len"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(options, name)}")
    return options
