"""Says what is wrong with a key of a job: one sentence for each error that the schema finds, or a
tracker would."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from runner.job.deepspeed_keys import DeepSpeed
from runner.job.schema import FORMS, Job, QuestionSet, Track, TrainSet
from runner.job.toml_lines import Path as KeyPath
from runner.utils.text import one_of, shorten

# Names that other trainers have for our keys, or for what a key of ours does; with a word where
# more than the name is another.
_ELSEWHERE: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("lr", "base_lr", "max_lr"), ("train.learning_rate", "")),
    **dict.fromkeys(
        ("num_train_epochs", "num_epochs", "n_epochs", "max_epochs"), ("train.epochs", "")
    ),
    "max_steps": ("train.epochs", "passes over the data, not steps"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_gpu_train_batch_size", "train_batch_size"),
        ("train.batch_size", "windows per step over all ranks together"),
    ),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), ("score.batch_size", "")),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum"),
        (
            "train.micro_batch_size",
            "windows per forward pass; batch_size / (ranks * micro_batch_size) are accumulated",
        ),
    ),
    "train_micro_batch_size_per_gpu": ("train.micro_batch_size", ""),
    "warmup_ratio": ("train.warmup", ""),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps"), ("train.warmup", "a share of all steps")),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("train.schedule", "")),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "betas"), ("train.adam_betas", "both in a list")),
    **dict.fromkeys(("gradient_clipping", "max_norm", "clip_grad"), ("train.max_grad_norm", "")),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "eval_steps"), ("train.eval_every", "in epochs")
    ),
    **dict.fromkeys(("logging_steps", "log_interval"), ("train.log_every", "in steps")),
    **dict.fromkeys(("save_strategy", "save_steps"), ("train.checkpoint_minutes", "")),
    "save_total_limit": ("train.keep_checkpoints", ""),
    "group_by_length": ("train.length_buckets", ""),
    "full_determinism": ("train.deterministic", ""),
    **dict.fromkeys(
        ("fp16", "bf16", "tf32", "amp"), ("model.precision", '"bf16", "fp16" or "fp32"')
    ),
    "torch_compile": ("model.compile", ""),
    **dict.fromkeys(
        ("model_name_or_path", "model_name", "pretrained_model_name_or_path", "base_model"),
        ("model.name", ""),
    ),
    "model_revision": ("model.revision", ""),
    **dict.fromkeys(("dataset_name", "dataset", "train_file"), ("data.train", "")),
    **dict.fromkeys(("validation_file", "eval_file", "test_file"), ("data.validation", "")),
    **dict.fromkeys(("max_seq_length", "max_len", "max_seq_len"), ("data.max_length", "")),
    "doc_stride": ("data.stride", ""),
    "version_2_with_negative": ("data.unanswerable", ""),
    "max_train_samples": ("data.sample", ""),
    **dict.fromkeys(("max_eval_samples", "max_val_samples"), ("data.validation_sample", "")),
    "null_score_diff_threshold": ("score.null_threshold", ""),
    "metric_for_best_model": ("stop.metric", ""),
    **dict.fromkeys(
        ("load_best_model_at_end", "early_stopping_patience", "early_stopping"),
        ("stop.patience", "with [stop] the best epoch is kept"),
    ),
    **dict.fromkeys(("deepspeed_config", "ds_config"), ("zero.deepspeed", "")),
    "report_to": ("track.tools", ""),
    "run_name": ("name", ""),
    **dict.fromkeys(("data_seed", "random_seed"), ("seed", "")),
    **dict.fromkeys(("num_gpus", "gpus", "gres"), ("slurm.gpus_per_node", "")),
    **dict.fromkeys(("cpus", "num_cpus"), ("slurm.cpus_per_task", "")),
    **dict.fromkeys(("walltime", "time_limit"), ("slurm.time", "")),
    "memory": ("slurm.mem", ""),
}
_ON_COMMAND_LINE = {
    **dict.fromkeys(("output_dir", "run_dir"), "--run-dir DIR"),
    "resume_from_checkpoint": "--resume RUN",
    "overwrite_output_dir": "--restart",
}

WANDB_REFUSES = "/\\#?%:"  # in a project's name: wandb.Settings.validate_project
WANDB_LONGEST = 128  # characters of it


def schema_problems(error: ValidationError, within: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """Each mistake once, as the path of its key and a sentence: where an unknown key is taken for
    another, that one is not reported as missing too.

    Args:
        error: what pydantic found wrong.
        within: the path of the section that was checked; () is a whole job.
    """
    errors: list[ErrorDetails] = [
        {**e, "loc": (*within, *(part for part in e["loc"] if part not in FORMS))}
        for e in error.errors()
    ]
    taken_for = {e["loc"]: _taken_for(e["loc"]) for e in errors if e["type"] == "extra_forbidden"}
    meant = {path for paths in taken_for.values() for path in paths}
    problems = []
    for e in errors:
        if e["type"] == "extra_forbidden":
            problems.append((e["loc"], f"unknown key; {_hint(e['loc'], taken_for[e['loc']])}"))
        elif e["type"] != "missing" or e["loc"] not in meant:
            problems.append((e["loc"], _problem(e)))
    return problems


def key_path(loc: KeyPath) -> str:
    """Spell the path of a key; elements of lists count from 1."""
    return ".".join(str(part + 1) if isinstance(part, int) else part for part in loc)


def shown(value: Any) -> str:
    """Spell a value as it stands in the file, in a few words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(shorten(value), ensure_ascii=True)
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return shorten(str(value))


def accepts_text(path: KeyPath) -> bool:
    """Whether the schema takes any string for this key."""
    section, key = _section_at(path[:-1]), str(path[-1])
    if section is not None and key in section.model_fields:
        return str in _flat(section.model_fields[key].annotation)
    # A key of a table whose keys are free, such as slurm.environment.
    section, table = _section_at(path[:-2]), str(path[-2]) if len(path) > 1 else ""
    if section is None or table not in section.model_fields:
        return False
    annotation = section.model_fields[table].annotation
    is_table = typing.get_origin(annotation) is dict
    return is_table and str in _flat(typing.get_args(annotation)[1])


def _problem(error: ErrorDetails) -> str:
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return f"is missing{_description(error['loc'])}"
    if kind == "literal_error":
        allowed = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"{shown(found)} is not one of {allowed}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        if not found.strip():
            return f"expected some text, found {shown(found)}"
        described = _description(error["loc"])
        return f"{shown(found)} does not match {context['pattern']}{described}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {_bound(context[bound])}, found {shown(found)}"
    if kind == "tuple_type" and _section_at(error["loc"]) and isinstance(found, Mapping):
        return f"is a list of tables; write [[{error['loc'][-1]}]] for each"
    if kind == "too_long":
        return f"takes {context['max_length']} values, found {context['actual_length']}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {shown(found)}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, found {shown(found)}"


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


def _bound(number: int | float) -> str:
    return str(int(number) if number == int(number) else number)


def _hint(loc: KeyPath, taken: list[KeyPath]) -> str:
    """Say which key was meant, where it belongs, or what is allowed."""
    key, section = str(loc[-1]), _section_at(loc[:-1])
    if not taken:
        if key.lower() in _ON_COMMAND_LINE:
            return f"it is an option of the command, {_ON_COMMAND_LINE[key.lower()]}"
        return f"allowed here: {one_of(tuple(section.model_fields))}" if section else "remove it"
    if taken == _meant_elsewhere(key):
        _, word = _ELSEWHERE[key.lower()]
        home = f"{taken[0][-1]} in {_header(taken[0][:-1])}"
        spelled = taken[0][-1] if taken[0][:-1] == loc[:-1] else home
        return f"did you mean {spelled}{f' ({word})' if word else ''}?"
    if taken[0][:-1] == loc[:-1]:
        return f"did you mean {taken[0][-1]}?"
    homes = tuple(_header(path[:-1]) for path in taken if path not in _SECTIONS)
    if not homes:
        return f"it is a section of its own, {_header(taken[0])}"
    return f"it belongs to {one_of(tuple(sorted(homes, key=lambda home: home[0] != '[')))}"


def _taken_for(loc: KeyPath) -> list[KeyPath]:
    """The keys that an unknown key could be: of this name in other sections, or else the nearest
    name in its own."""
    key, section = str(loc[-1]), _section_at(loc[:-1])
    if loc[:2] != ("zero", "deepspeed") and (meant := _meant_elsewhere(key)):
        return meant
    elsewhere = [(*path, key) for path, other in _SECTIONS.items() if key in other.model_fields]
    if elsewhere or section is None:
        return elsewhere
    # One edit changes half of a name such as f1 or id.
    cutoff = 0.6 if len(key) > 3 else 0.5
    close = difflib.get_close_matches(key.lower(), list(section.model_fields), 1, cutoff)
    return [(*loc[:-1], close[0])] if close else []


def _meant_elsewhere(key: str) -> list[KeyPath]:
    """Our key for a name that other trainers have."""
    name, _ = _ELSEWHERE.get(key.lower(), ("", ""))
    return [tuple(name.split("."))] if name else []


def _header(path: KeyPath) -> str:
    """Spell what stands above the keys of a section."""
    if not path:
        return "the top of the file, before the first [section]"
    is_list = tuple in _flat(Job.model_fields[str(path[0])].annotation)
    return f"[[{key_path(path)}]]" if is_list else f"[{key_path(path)}]"


def _description(loc: KeyPath) -> str:
    """What the schema says about a key, in brackets."""
    if loc in _SECTIONS:
        return f"; a job needs a section {_header(loc)}"
    section = _section_at(loc[:-1])
    return f" ({section.model_fields[str(loc[-1])].description})" if section else ""


def _section_at(path: KeyPath) -> type[BaseModel] | None:
    named = tuple(part for part in path if isinstance(part, str))
    return _SECTIONS.get(named) or _TABLES.get(named)


def _walk(section: type[BaseModel], path: KeyPath) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    yield path, section
    for name, field in section.model_fields.items():
        kinds = _flat(field.annotation)
        for kind in kinds:
            # A table that may stand for a name is no section.
            if str not in kinds and isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _walk(kind, (*path, name))


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


def doubts(job: Job) -> list[str]:
    """What is allowed, but hardly meant."""
    said = []
    for name in ("exact_match", "f1", "span_accuracy"):
        value = None if job.expect is None else getattr(job.expect, name)
        if value is not None and 0 < value <= 1:
            said.append(
                f"expect.{name} = {value:g} means {value:g} percent; for a share of {value:g} write"
                f" {100 * value:g}"
            )
    memory = job.slurm.mem if job.slurm else None
    if memory and memory.isdecimal() and 0 < int(memory) < 4096:
        said.append(f'slurm.mem = "{memory}" means {memory} MB to SLURM; for GB write "{memory}G"')
    return said


def set_problems(job: Job) -> list[tuple[KeyPath, str]]:
    """Validation sets that are named by keys and are not there."""
    names = tuple(str(one.name) for one in job.data.scored)
    problems: list[tuple[KeyPath, str]] = []
    for key in ("stop", "expect"):
        section = getattr(job, key)
        if section is not None and section.on not in (None, *names):
            close = difflib.get_close_matches(section.on, names, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there is {one_of(names)}"
            problems.append(((key, "on"), f"no validation set is called {shown(section.on)}{hint}"))
    return problems


def tracker_problems(section: Track) -> list[tuple[KeyPath, str]]:
    """What a tracker would refuse at the run's start, and an address that holds a secret. No part
    of the schema: a run goes on without the tracker, and its record is to be read as ever."""
    address = section.mlflow_uri or ""
    if not address.startswith(("file:", "/", ".")) and any(sign in address for sign in "@?#"):
        problem = (
            "holds @, ? or #: a secret there would stand in job.toml and reports; user and password"
            " are read from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
        return [(("track", "mlflow_uri"), problem)]
    name = section.project
    found = [sign for sign in WANDB_REFUSES if sign in name]
    if "wandb" not in section.tools or not (found or len(name) > WANDB_LONGEST):
        return []
    why = f"holds {' and '.join(found)}" if found else f"has {len(name)} characters"
    return [
        (
            ("track", "project"),
            f"{shown(name)} {why}; W&B takes up to {WANDB_LONGEST} characters without"
            f" {' '.join(WANDB_REFUSES)}",
        )
    ]


# Tables that may stand for a name, and all sections of the schema, the top of the file first.
_TABLES = dict([*_walk(TrainSet, ("data", "train")), *_walk(QuestionSet, ("data", "validation"))])
_SECTIONS = dict([*_walk(Job, ()), *_walk(DeepSpeed, ("zero", "deepspeed"))])
