"""Which column of a table is what: by its name, and by what stands in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runner.data.formats.rows import is_blank, number, paired_answers
from runner.data.formats.written import written_as_text
from runner.job.schema import Columns

_LOOKED_AT = 100  # rows
# Words that names of columns are made of, in several languages.
_WORDS = {
    "question": "question query ask asked frage pregunta domanda pergunta vraag q",
    "context": "context passage paragraph text document article review body content abstract story"
    " kontext absatz contexte contexto contesto",
    "answer": "answer answers ans span spans gold antwort reponse respuesta risposta resposta a",
    "answer_start": "start starts begin offset offsets index indices position pos at",
    "id": "id ids qid uid uuid guid nr",
}
_WORDS_OF = {role: frozenset(words.split()) for role, words in _WORDS.items()}
_ASKS = ("?", "\uff1f", "\u061f", '?"', "?'")  # also Chinese and Arabic
_SHARE = 0.5  # of the rows that what a column holds must bear out


def guess_columns(
    rows: Sequence[Any], names: Sequence[str], columns: Columns | None = None
) -> dict[str, str]:
    """Names of columns by the keys of [data.columns], as far as the first rows tell.

    Args:
        rows: of the table; those that are no tables are passed over.
        names: of its columns.
        columns: those that are named already, and are there, are kept.
    """
    some = [row for row in rows[:_LOOKED_AT] if isinstance(row, Mapping)]
    found = {k: v for k, v in (columns or Columns()) if v in names}
    free = [name for name in names if name not in found.values()]

    def take(key: str, score: Callable[[str], float], least: float) -> None:
        best = max(free, key=score, default=None)
        if key not in found and best is not None and score(best) >= least:
            found[key] = best
            free.remove(best)

    answers, contexts = ([found[k]] if k in found else free for k in ("answer", "context"))
    held = {(a, c): _held(some, a, c) for a in answers for c in contexts if a != c}
    named = {pair: _named(pair[0], "answer") + _named(pair[1], "context") for pair in held}
    best = max(held, key=lambda pair: held[pair] + named[pair], default=None)
    if best is not None and held[best] >= _SHARE:
        found |= dict(zip(("answer", "context"), best, strict=True))
        free = [name for name in free if name not in best]
    take("question", lambda name: _asking(some, name) + _named(name, "question"), _SHARE)
    take("context", lambda name: _named(name, "context") * _share(some, name, _is_text), _SHARE)
    take("answer", lambda name: _named(name, "answer"), 1)
    if "answer" in found and "context" in found:
        texts = found["answer"], found["context"]
        take("answer_start", lambda name: _starting(some, name, *texts), _SHARE)
    take("id", lambda name: _named(name, "id") * _distinct(some, name), 1)
    texts = [name for name in free if _share(some, name, _is_text) >= _SHARE]
    if len(texts) == 1:  # what else should it be
        found.setdefault("question", texts[0])
    return found


def to_declare(found: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Those of a table's columns that a job must name, for they are not called as is usual."""
    usual = {"question": "question", "context": "context", "answer_start": "answer_start"}
    usual |= {"id": "id", "answer": "answers" if "answers" in names else "answer"}
    keys = [key for key in Columns.model_fields if key in found and found[key] != usual[key]]
    return {key: found[key] for key in keys}


def _named(name: str, role: str) -> float:
    """How well a name says the role: 1 if it says nothing else, 0.5 if among other words; a text of
    a question or an answer is no context."""
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).casefold())
    known = [word in _WORDS_OF[role] for word in words]
    others = {"id": (), "context": ("id", "question", "answer")}.get(role, ("id",))
    if any(_WORDS_OF[other] & set(words) for other in others):
        return 0.0
    return 1.0 if known and all(known) else 0.5 * any(known)


def _share(rows: Sequence[Any], name: str, holds: Callable[[Any], bool]) -> float:
    """The share of those rows that have something in a column where it holds such a thing."""
    values = [row[name] for row in rows if name in row and not is_blank(row[name])]
    return sum(map(holds, values)) / len(values) if values else 0.0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not written_as_text(value) and len(value) > 1


def _asking(rows: Sequence[Any], name: str) -> float:
    return _share(rows, name, lambda v: _is_text(v) and v.rstrip().endswith(_ASKS))


def _answer_texts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, str) and not written_as_text(value):
        return [(value, None)]
    pairs = paired_answers(value)
    return [(t, at) for t, at in pairs if not is_blank(t)] if isinstance(pairs, list) else []


def _held(rows: Sequence[Any], answer: str, context: str) -> float:
    """The share of answers, of rows that have one, that stand in a longer text beside them."""
    held = [
        isinstance(text, str) and len(text) < len(row[context]) and text in row[context]
        for row in rows
        if isinstance(row.get(context), str)
        for text, _ in _answer_texts(row.get(answer))[:1]
        if not is_blank(text) and not isinstance(number(text), int)
    ]
    return sum(held) / len(held) if held else 0.0


def _starting(rows: Sequence[Any], name: str, answer: str, context: str) -> float:
    """The share of rows where a column says the place of the answer in the text."""
    right = [
        row[context].startswith(text, at)
        for row in rows
        for text, _ in _answer_texts(row.get(answer))[:1]
        for at in [number(row.get(name))]
        if isinstance(text, str) and isinstance(row.get(context), str) and isinstance(at, int)
    ]
    return sum(right) / len(right) if right else 0.0


def _distinct(rows: Sequence[Any], name: str) -> bool:
    values = [str(row.get(name)) for row in rows]
    return len(set(values)) == len(values)
