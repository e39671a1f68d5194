"""The model card: what the exported model is, from which data and recipe, how it scored, and its
limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from runner.job.inference import KEY, InferenceSettings
from runner.job.schema import Job
from runner.job.sources import describe_sample, parse_data, public_name


def model_card(
    job: Job,
    scores: Mapping[str, float],
    data: Mapping[str, str],
    job_text: str,
    *,
    intervals: Mapping[str, tuple[float, float]],
    asked: InferenceSettings,
) -> str:
    """Write the card in the hub's format: YAML front matter, then Markdown. Folders of this machine
    are left out: a card is made to be published.

    Args:
        job: the job as it ran.
        scores: metric name to percent (loss in nats).
        data: "training", "validation", "tuning" to the sha256 of those questions' content.
        job_text: the resolved job file.
        intervals: metric name to its 95 % interval, for those that have one.
        asked: how the model is to be asked.
    """
    train, validation, name = map(
        public_name, (job.data.train, job.data.validation, job.model.name)
    )
    scored = describe_sample(job.data.validation_sample)
    declared = {
        "training": (job.data.train, job.data.sample),
        "validation": (job.data.validation, job.data.validation_sample),
        "tuning": (job.data.tuning or "", None),
    }
    for path in filter(
        None, (job.data.train, job.data.validation, job.data.tuning, job.model.name)
    ):
        job_text = job_text.replace(_quoted(path), _quoted(public_name(path)))
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", job_text))])
    metrics = "\n".join(
        f"    - type: {metric}\n      name: {label}\n      value: {scores[metric]:.2f}"
        for metric, label in (("exact_match", "Exact match (%)"), ("f1", "F1 (%)"))
        if metric in scores
    )
    rows = "\n".join(
        f"| {metric} | {value:.2f} | {_interval(intervals, metric)} |"
        for metric, value in scores.items()
    )
    slices = "\n".join(
        f"| {part} | `{public_name(declared[part][0])}`{describe_sample(declared[part][1])} | `{digest}` |"
        for part, digest in data.items()
    )
    return f"""---
library_name: transformers
pipeline_tag: question-answering
tags: [extractive-question-answering, spantune]
{_origin(job)}metrics: [exact_match, f1]
model-index:
- name: {_quoted(job.name)}
  results:
  - task:
      type: question-answering
    dataset:
      name: {_quoted(f"{validation}{scored}")}
{_scored_on(validation)}
    metrics:
{metrics}
---
# {job.name}

An extractive question-answering model: given a question and a text, it points at the span of the
text that answers it. Fine-tuned with spantune from `{name}`
on `{train}`{describe_sample(job.data.sample)}.

## Scores

On `{validation}`{scored}:

| metric | value | 95 % interval |
|---|---:|---:|
{rows}

## Data

| questions | slice | sha256 of their content |
|---|---|---|
{slices}

## Recipe

| | |
|---|---|
{_recipe(job)}

## Use

```python
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/model")
model = AutoModelForQuestionAnswering.from_pretrained("path/to/model")
```

Contexts longer than {asked.max_length} tokens were read in windows that share {asked.stride};
answers have at most {asked.score.max_answer_length} tokens. {_nothing(asked)}
These settings stand in `config.json` under `{KEY}`, for `spantune predict path/to/model` to find.

## Limits

It copies from the text it is given and knows nothing else; its scores hold for texts like those it
was scored on. A high score of a span says that it fits better than others, not that it is true.

## Job

{fence}toml
{job_text.strip()}
{fence}
"""


def _interval(intervals: Mapping[str, tuple[float, float]], metric: str) -> str:
    if metric not in intervals:
        return ""
    low, high = intervals[metric]
    return f"{low:.2f} to {high:.2f}"


def _nothing(answering: InferenceSettings) -> str:
    if not answering.unanswerable:
        return "The model always answers, also where the text holds no answer."
    tuned = answering.tuned
    source = f", tuned on {tuned.questions} questions of `{tuned.source}`" if tuned else ""
    return (
        "The model answers nothing where the null score exceeds the best span's by more than"
        f" {answering.score.null_threshold:.4g}{source}."
    )


def _origin(job: Job) -> str:
    """Front matter on where the model comes from: what the hub knows by name, and what the job
    declares."""
    lines = [
        f"{key}: {_quoted(value)}\n"
        for key, value in (("license", job.card.license), ("language", job.card.language))
        if value
    ]
    if not job.model.name.startswith(("/", "package:")):
        lines.append(f"base_model: {_quoted(job.model.name)}\n")
    source = parse_data(job.data.train)
    if source.kind == "hub":
        lines.append(f"datasets: [{_quoted(source.location)}]\n")
    return "".join(lines)


def _scored_on(validation: str) -> str:
    """The data set of the scores as the hub's model index spells it."""
    source = parse_data(validation)
    parts = {
        "type": source.location,
        "config": source.config,
        "split": source.split,
        "revision": source.revision,
    }
    return "\n".join(f"      {key}: {_quoted(value)}" for key, value in parts.items() if value)


def _recipe(job: Job) -> str:
    """The settings that a reader looks for first, as table rows; all of them are in the job."""
    train, frozen = job.train, ", ".join(f"`{part}`" for part in job.model.freeze)
    warmup = f" after a warm-up of {100 * train.warmup:g} % of the steps" if train.warmup else ""
    stop = f"; until {job.stop.metric} stops improving" if job.stop else ""
    rows = {
        "questions": f"`{public_name(job.data.train)}`{describe_sample(job.data.sample)}",
        "windows": f"{job.data.max_length} tokens, stride {job.data.stride}",
        "frozen": frozen or "nothing",
        "epochs": f"at most {train.epochs}{stop}" if stop else f"{train.epochs}",
        "batch": f"{train.batch_size} windows a step",
        "optimiser": (
            f"AdamW, learning rate {train.learning_rate:g} ({train.schedule}{warmup}), weight decay"
            f" {train.weight_decay:g}"
        ),
        "seed": f"{job.seed}",
    }
    return "\n".join(f"| {name} | {text} |" for name, text in rows.items())


def _quoted(text: str) -> str:
    """A string as YAML and TOML both read it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
