"""The schema: described, exported, and true of every job that is shipped."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from runner.job.load import job_schema, load_job
from runner.job.schema import METRICS, Job, Stop, Train
from runner.utils.text import divisors, one_of

JOBS = Path(__file__).parents[2] / "jobs"
SCHEMA = json.loads(job_schema())
MODELS = {"Job": SCHEMA, **SCHEMA["definitions"]}
SMALLEST = {
    "name": "n",
    "data": {"train": "o/n", "validation": "o/n"},
    "model": {"name": "o/n"},
    "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-4},
}


def changed(**sections):
    """The smallest job with some keys of its sections changed."""
    return {**SMALLEST, **{name: {**SMALLEST[name], **keys} for name, keys in sections.items()}}


FIELDS = [
    (name, key, field)
    for name, model in MODELS.items()
    for key, field in model["properties"].items()
]


def test_the_committed_schema_is_the_exported_one():
    assert (JOBS / "job.schema.json").read_text(encoding="utf-8") == job_schema(), (
        "run `python -m runner schema > jobs/job.schema.json`"
    )


@pytest.mark.parametrize(("model", "key", "field"), FIELDS, ids=[f"{m}.{k}" for m, k, _ in FIELDS])
def test_every_field_is_described(model, key, field):
    described = field
    if "description" not in field:
        references = [part["$ref"] for part in [field, *field.get("anyOf", [])] if "$ref" in part]
        described = MODELS[references[0].removeprefix("#/definitions/")]
    assert len(described["description"]) > 10


def test_sections_refuse_unknown_keys_and_are_described():
    for model in MODELS.values():
        assert model["additionalProperties"] is False
        assert model["description"].endswith(".")


def test_every_reference_of_the_schema_leads_somewhere():
    def references(part):
        if isinstance(part, dict):
            for key, value in part.items():
                yield from [value] if key == "$ref" else references(value)
        elif isinstance(part, list):
            for value in part:
                yield from references(value)

    found = set(references(SCHEMA))
    assert found == {f"#/definitions/{name}" for name in SCHEMA["definitions"]}
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"


SHIPPED = sorted(JOBS.glob("**/*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_job_names_the_schema(path):
    first = path.read_text(encoding="utf-8").split("\n")[0]
    assert first.startswith("#:schema ")
    assert (path.parent / first.removeprefix("#:schema ")).resolve() == JOBS / "job.schema.json"


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_job_fits_the_schema(path, monkeypatch):
    # The weights of a job may live in a package that is not installed where the tests run.
    monkeypatch.setattr("runner.job.load.package_folder", lambda name: Path("/somewhere"))
    assert load_job(path).name == path.stem


def test_the_smallest_job_is_frozen_and_complete():
    job = Job.model_validate(SMALLEST)
    assert (job.seed, job.data.max_length, job.zero.stage) == (42, 384, 2)
    assert (job.stop, job.expect, job.probe) == (None, None, ())
    with pytest.raises(ValidationError, match="frozen"):
        job.train.epochs = 2


def test_no_default_is_shared_between_jobs():
    one, two = Job.model_validate(SMALLEST), Job.model_validate(SMALLEST)
    one.zero.deepspeed["a"] = 1
    assert two.zero.deepspeed == {}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (changed(data={"stride": 384}), "stride 384 must be smaller than max_length 384"),
        (
            changed(data={"max_length": 64}),
            r"stride 128 \(which is unset\) must be smaller than max_length 64",
        ),
        (changed(data={"train": "squad"}), "neither a file"),
        (changed(train={"micro_batch_size": 3}), "micro_batch_size may be 1, 2, 4 or 8"),
        (changed(train={"micro_batch_size": 16}), "is not a multiple of micro_batch_size 16"),
        (changed(train={"batch_size": True}), "valid integer"),
        (changed(train={"batch_size": 8.0}), "valid integer"),
        (changed(train={"batch_size": "8"}), "valid integer"),
        (changed(train={"learning_rate": math.inf}), "finite"),
        (changed(train={"learning_rate": True}), "valid number"),
        (changed(train={"adam_betas": [0.9, 1]}), "less than 1"),
        ({**SMALLEST, "zero": {"stage": True}}, "valid integer"),
        ({**SMALLEST, "zero": {"stage": 2.0}}, "valid integer"),
        ({**SMALLEST, "zero": {"deepspeed": {"a": [math.nan]}}}, "DeepSpeed reads JSON"),
        ({**SMALLEST, "expect": {}}, "expects nothing"),
        ({**SMALLEST, "expect": {"tolerance": 0.1}}, "expects nothing"),
        ({**SMALLEST, "name": "../n"}, "pattern"),
        ({**SMALLEST, "name": "n\n"}, "pattern"),
        ({**SMALLEST, "seed": 2**32}, "less than 4294967296"),
    ],
)
def test_what_the_schema_refuses(table, words):
    with pytest.raises(ValidationError, match=words):
        Job.model_validate(table)


def test_what_looks_alike_is_accepted():
    job = Job.model_validate(
        {
            **changed(train={"learning_rate": 1, "micro_batch_size": 8, "adam_betas": [0, 0.5]}),
            "zero": {"stage": 0, "deepspeed": {"a": {"b": [1, 0.5, True, "c"]}}},
            "expect": {"loss": 0},
        }
    )
    assert job.train.learning_rate == 1
    assert job.train.adam_betas == (0, 0.5)


def test_metrics_that_can_stop_a_run():
    for metric in METRICS:
        assert Stop(metric=metric).metric == metric
    with pytest.raises(ValidationError):
        Stop(metric="accuracy")


@given(st.integers(1, 3000))
def test_divisors(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_divisors_of_the_largest_batch_come_at_once():
    assert len(divisors(735_134_400)) == 1344  # the most that a number up to 10**9 has
    with pytest.raises(ValidationError):
        Train(epochs=1, batch_size=10**9 + 1, learning_rate=1e-4)


@pytest.mark.parametrize(
    ("values", "expected"), [([1], "1"), ([1, 2], "1 or 2"), (("a", "b", "c"), "a, b or c")]
)
def test_one_of(values, expected):
    assert one_of(values) == expected


def test_every_section_is_closed_frozen_and_strict():
    def kinds(annotation):
        yield annotation
        for part in typing.get_args(annotation):
            yield from kinds(part)

    def sections(model):
        yield model
        for field in model.model_fields.values():
            for kind in kinds(field.annotation):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield from sections(kind)

    found = dict.fromkeys(sections(Job))
    assert len(found) == len(MODELS)
    for section in found:
        config = section.model_config
        assert (config["extra"], config["frozen"], config["strict"]) == ("forbid", True, True)
