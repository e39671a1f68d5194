"""The model card: what the exported model is, from which data and recipe, how it scored, and its
limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from runner.answering import KEY, Answering
from runner.job import Job
from runner.sources import parse_data


def model_card(
    job: Job,
    scores: Mapping[str, float],
    data: Mapping[str, str],
    job_text: str,
    *,
    intervals: Mapping[str, tuple[float, float]],
    answering: Answering,
) -> str:
    """Write the card in the hub's format: YAML front matter, then Markdown. Folders of this machine
    are left out: a card is made to be published.

    Args:
        job: the job as it ran.
        scores: metric name to percent (loss in nats).
        data: slice name to sha256 of its content.
        job_text: the resolved job file.
        intervals: metric name to its 95 % interval, for those that have one.
        answering: how the model is to be asked.
    """
    train, validation, name = map(
        public_name, (job.data.train, job.data.validation, job.model.name)
    )
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
    base = "" if job.model.name.startswith(("/", "package:")) else f"base_model: {_quoted(name)}\n"
    rows = "\n".join(
        f"| {metric} | {value:.2f} | {_interval(intervals, metric)} |"
        for metric, value in scores.items()
    )
    slices = "\n".join(f"| `{public_name(part)}` | `{digest}` |" for part, digest in data.items())
    return f"""---
library_name: transformers
pipeline_tag: question-answering
tags: [extractive-question-answering, spantune]
{base}model-index:
- name: {_quoted(job.name)}
  results:
  - task:
      type: question-answering
    dataset:
      name: {_quoted(validation)}
      type: {_quoted(parse_data(validation).location)}
    metrics:
{metrics}
---
# {job.name}

An extractive question-answering model: given a question and a text, it points at the span of the
text that answers it. Fine-tuned with spantune from `{name}`
on `{train}`.

## Scores

On `{validation}`:

| metric | value | 95 % interval |
|---|---:|---:|
{rows}

## Data

| slice | sha256 of its content |
|---|---|
{slices}

## Use

```python
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/model")
model = AutoModelForQuestionAnswering.from_pretrained("path/to/model")
```

Windows of at most {answering.max_length} tokens with a stride of {answering.stride}; answers of at
most {answering.score.max_answer_length} tokens. {_nothing(answering)} These settings stand in
`config.json` under `{KEY}`, where `spantune predict path/to/model` finds them.

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


def _nothing(answering: Answering) -> str:
    if not answering.unanswerable:
        return "The model always answers, also where the text holds no answer."
    tuned = answering.tuned
    source = f", tuned on {tuned.questions} questions of `{tuned.source}`" if tuned else ""
    return (
        "The model answers nothing where the null score exceeds the best span's by more than"
        f" {answering.score.null_threshold:.4g}{source}."
    )


def public_name(name: str) -> str:
    """A name as others may see it: of a file or folder, its last part."""
    return name.rpartition("/")[2] if name.startswith("/") else name


def _quoted(text: str) -> str:
    """A string as YAML and TOML both read it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
