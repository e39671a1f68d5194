"""Says what is wrong with a key of a job: one sentence for each error that the schema finds."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from runner.job import Job, one_of
from runner.toml_lines import Path as KeyPath


def schema_problems(error: ValidationError) -> list[tuple[KeyPath, str]]:
    """Each mistake once, as the path of its key and a sentence: where an unknown key is taken for
    another, that one is not reported as missing too."""
    errors = error.errors()
    unknown = [e["loc"] for e in errors if e["type"] == "extra_forbidden"]
    meant = {path for loc in unknown for path in _taken_for(loc)}
    return [
        (e["loc"], _problem(e)) for e in errors if e["type"] != "missing" or e["loc"] not in meant
    ]


def spell(loc: KeyPath) -> str:
    """Spell the path of a key; elements of lists count from 1."""
    return ".".join(str(part + 1) if isinstance(part, int) else part for part in loc)


def show(value: Any) -> str:
    """Spell a value as it stands in the file, in a few words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(short(value), ensure_ascii=True)
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return short(str(value))


def short(text: str) -> str:
    """Cut a long text."""
    return text if len(text) <= 60 else text[:57] + "..."


def accepts_text(path: KeyPath) -> bool:
    """Whether the schema takes any string for this key."""
    annotation: Any = Job
    for part in path:
        section = _section_in(annotation)
        if section is None or part not in section.model_fields:
            return False
        annotation = section.model_fields[str(part)].annotation
    return str in _flat(annotation)


def _problem(error: ErrorDetails) -> str:
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_hint(error['loc'])}"
    if kind == "missing":
        return f"is missing{_description(error['loc'])}"
    if kind == "literal_error":
        allowed = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"{show(found)} is not one of {allowed}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        if not found.strip():
            return f"expected some text, found {show(found)}"
        described = _description(error["loc"])
        return f"{show(found)} does not match {context['pattern']}{described}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]}, found {show(found)}"
    if kind == "tuple_type" and _section_at(error["loc"]) and isinstance(found, Mapping):
        return f"is a list of tables; write [[{error['loc'][-1]}]] for each"
    if kind == "too_long":
        return f"takes {context['max_length']} values, found {context['actual_length']}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {show(found)}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, found {show(found)}"


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string in quotes",
    "string_too_short": "some text",
    "tuple_type": "a list in brackets",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def _hint(loc: KeyPath) -> str:
    """Say which key was meant, where it belongs, or what is allowed."""
    taken = _taken_for(loc)
    section = _section_at(loc[:-1])
    if not taken:
        return f"allowed here: {one_of(tuple(section.model_fields))}" if section else "remove it"
    if taken[0][:-1] == loc[:-1]:
        return f"did you mean {taken[0][-1]}?"
    if len(taken[0]) == 1 and _section_at(taken[0]):
        return f"it is a section of its own, {_header(taken[0])}"
    return f"it belongs to {one_of(tuple(_header(path[:-1]) for path in taken))}"


def _taken_for(loc: KeyPath) -> list[KeyPath]:
    """The keys that an unknown key could be: of this name in other sections, or else the nearest
    name in its own."""
    key, section = str(loc[-1]), _section_at(loc[:-1])
    elsewhere = [(*path, key) for path, other in _sections() if key in other.model_fields]
    if elsewhere or section is None:
        return elsewhere
    # One edit changes half of a name such as f1 or id.
    cutoff = 0.6 if len(key) > 3 else 0.5
    close = difflib.get_close_matches(key.lower(), list(section.model_fields), 1, cutoff)
    return [(*loc[:-1], close[0])] if close else []


def _header(path: KeyPath) -> str:
    """Spell what stands above the keys of a section."""
    if not path:
        return "the top of the file, before the first [section]"
    is_list = tuple in _flat(Job.model_fields[str(path[0])].annotation)
    return f"[[{spell(path)}]]" if is_list else f"[{spell(path)}]"


def _description(loc: KeyPath) -> str:
    """What the schema says about a key, in brackets."""
    if _section_at(loc):
        return f"; a job needs a section {_header(loc)}"
    section = _section_at(loc[:-1])
    return f" ({section.model_fields[str(loc[-1])].description})" if section else ""


def _sections(
    section: type[BaseModel] = Job, path: KeyPath = ()
) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    """Walk through all sections of the schema, the top of the file first."""
    yield path, section
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None:
            yield from _sections(inner, (*path, name))


def _flat(annotation: Any) -> list[Any]:
    """Unfold `X | None` and `Annotated[X, ...]` into the types that it admits."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _flat(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for arg in typing.get_args(annotation) for inner in _flat(arg)]
    if origin is tuple:
        return [tuple, *(typing.get_args(annotation)[:1])]
    return [annotation]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    for kind in _flat(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _section_at(path: Iterable[str | int]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Job
    for part in path:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        section = _section_in(section.model_fields[part].annotation)
    return section
