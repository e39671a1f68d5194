"""The model card: what the exported model is, from which data and recipe, how it scored, and its
limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from huggingface_hub import EvalResult, ModelCardData

from runner.job.inference import KEY, InferenceSettings
from runner.job.schema import Data, Job, QuestionSet
from runner.job.sources import parse_data, parse_share, public_name
from runner.utils.templates import template_environment


def model_card(
    job: Job,
    scores: Mapping[str, float],
    data: Mapping[str, str],
    job_text: str,
    *,
    intervals: Mapping[str, tuple[float, float]],
    settings: InferenceSettings,
    further: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> str:
    """Write the card in the hub's format: YAML front matter, then Markdown. Folders of this machine
    are left out: a card is made to be published.

    Args:
        job: the job as it ran.
        scores: metric name to percent (loss in nats).
        data: "training", "validation", "tuning" (of several sets "training NAME") to the sha256 of
            those questions' content.
        job_text: the resolved job file.
        intervals: metric name to its 95 % interval, for those that have one.
        further: scores on each further validation set, by its name.
        settings: of inference, which the card names for those who use the model.
    """
    for path in (*job.data.names, job.model.name):
        job_text = job_text.replace(_toml_string(path), _toml_string(public_name(path)))
    environment = template_environment(__file__, autoescape=False)
    environment.filters["public_name"] = public_name
    return environment.get_template("model_card.md.j2").render(
        front_matter=_front_matter(job, scores),
        job=job,
        scores=scores,
        further=further,
        intervals=intervals,
        data=data,
        slices=_slices(job.data),
        settings=settings,
        config_key=KEY,
        job_text=job_text.strip(),
    )


def _slices(data: Data) -> dict[str, str]:
    """Data names in Markdown, by what the questions are for: of several sets, those of each too."""

    def shown(*sets: QuestionSet) -> str:
        return data.described(sets, lambda name: f"`{public_name(name)}`")

    slices = {"training": shown(*data.trained), "validation": shown(data.scored[0])}
    slices |= {f"training {one.name}": shown(one) for one in data.trained}
    slices |= {f"validation {one.name}": shown(one) for one in data.scored}
    return slices | {"tuning": f"`{public_name(data.tuning or '')}`"}


def _front_matter(job: Job, scores: Mapping[str, float]) -> str:
    """What the hub reads: where the model comes from, as far as the hub knows it by name, what the
    job declares, and the scores."""
    first = job.data.scored[0]
    held_out = parse_share(first.source) is not None
    scored = parse_data(public_name(job.data.names[0] if held_out else first.source))
    training = [parse_data(one.source) for one in job.data.trained]
    is_hub_model = not job.model.name.startswith(("/", "package:"))
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="question-answering",
        tags=["extractive-question-answering", "spantune"],
        license=job.card.license,
        language=job.card.language,
        base_model=job.model.name if is_hub_model else None,
        datasets=[source.location for source in training if source.kind == "hub"] or None,
        metrics=["exact_match", "f1"],
        model_name=job.name,
        eval_results=[
            EvalResult(
                task_type="question-answering",
                dataset_name=job.data.described([first], public_name),
                dataset_type=scored.location,
                dataset_config=scored.config,
                dataset_split=scored.split,
                dataset_revision=scored.revision,
                metric_type=metric,
                metric_name=label,
                metric_value=round(float(scores[metric]), 2),  # YAML of a NumPy number is Python's
            )
            for metric, label in (("exact_match", "Exact match (%)"), ("f1", "F1 (%)"))
            if metric in scores
        ],
    ).to_yaml()


def _toml_string(text: str) -> str:
    """A string as the resolved job file spells it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
