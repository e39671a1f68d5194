"""The model card: what the exported model is, from which data and recipe, how it scored, and its
limits."""

from __future__ import annotations

import json
from collections.abc import Mapping

from runner.job import Job


def model_card(
    job: Job, scores: Mapping[str, float], data: Mapping[str, str], job_text: str
) -> str:
    """Write the card in the hub's format: YAML front matter, then Markdown.

    Args:
        job: the job as it ran.
        scores: metric name to percent (loss in nats).
        data: slice name to sha256 of its content.
        job_text: the resolved job file.
    """
    metrics = "\n".join(
        f"    - type: {name}\n      name: {label}\n      value: {scores[name]:.2f}"
        for name, label in (("exact_match", "Exact match (%)"), ("f1", "F1 (%)"))
        if name in scores
    )
    base = (
        ""
        if job.model.name.startswith(("/", "package:"))
        else f"base_model: {json.dumps(job.model.name)}\n"
    )
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in scores.items())
    slices = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in data.items())
    precise = (
        "The model may answer nothing."
        if job.data.unanswerable
        else "The model always answers, also where the text holds no answer."
    )
    return f"""---
library_name: transformers
pipeline_tag: question-answering
tags: [extractive-question-answering, spantune]
{base}model-index:
- name: {json.dumps(job.name)}
  results:
  - task:
      type: question-answering
    dataset:
      name: {json.dumps(job.data.validation)}
      type: {json.dumps(job.data.validation.split(":")[0].split("[")[0])}
    metrics:
{metrics}
---
# {job.name}

An extractive question-answering model: given a question and a text, it points at the span of the
text that answers it. Fine-tuned with spantune from `{job.model.name}`.

## Scores

On `{job.data.validation}`:

| metric | value |
|---|---:|
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

Windows of at most {job.data.max_length} tokens with a stride of {job.data.stride}; answers of at
most {job.score.max_answer_length} tokens. {precise}

## Limits

It copies from the text it is given and knows nothing else; its scores hold for texts like those it
was scored on. A high score of a span says that it fits better than other spans, not that it is true.

## Job

```toml
{job_text.strip()}
```
"""
