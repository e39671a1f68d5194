"""The official SQuAD scores as `evaluate.Metric` objects, in the format of the hub's metrics.

`evaluate.load("squad")` needs the hub, a cache folder and file locks; these need none: they keep
their data in memory and touch no file. Importing this takes seconds, for `evaluate` imports torch
and transformers; nothing of the runner does: `metrics.squad` has the same scores without it.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from runner.job.schema import Language
from runner.metrics.squad import Scores, ScoresV2, squad_scores, squad_v2_scores

_HOMEPAGE = "https://rajpurkar.github.io/SQuAD-explorer/"
_CITATION = """\
@inproceedings{rajpurkar2016squad,
  title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle = {EMNLP},
  year = {2016}
}
"""
_INPUTS = """
Args:
    predictions: list of {"id": str, "prediction_text": str}; for SquadV2 also
        "no_answer_probability": float.
    references: list of {"id": str, "answers": {"text": list[str], "answer_start": list[int]}}.
    no_answer_threshold: SquadV2 only: above this probability "" is the prediction (default 1.0).
"""


class _InMemory(evaluate.Metric):
    """An `evaluate.Metric` of one process that never makes a cache file, a lock or a folder.

    `scores` holds what the last `compute` found for each question, in the references' order.

    Args:
        language: whose words are compared, as `score.language` of a job.
    """

    def __init__(self, language: Language = "en") -> None:
        super().__init__(keep_in_memory=True)
        self.language: Language = language

    def _build_data_dir(self) -> str:
        # The base makes this folder under HF_HOME although it keeps everything in memory.
        return ""

    def _describe(self, version: str, prediction: dict[str, Any]) -> evaluate.MetricInfo:
        answers = {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
        features = {
            "predictions": {
                "id": datasets.Value("string"),
                "prediction_text": datasets.Value("string"),
                **prediction,
            },
            "references": {"id": datasets.Value("string"), "answers": datasets.Sequence(answers)},
        }
        return evaluate.MetricInfo(
            description=f"Exact match and F1 as in the official evaluation of SQuAD {version}.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            homepage=_HOMEPAGE,
            reference_urls=[_HOMEPAGE],
        )


class Squad(_InMemory):
    """SQuAD v1.1: exact_match and f1, in percent.

    Squad().compute(predictions=[...], references=[...]) in the format of `inputs_description`.
    """

    scores: Scores

    def _info(self) -> evaluate.MetricInfo:
        return self._describe("v1.1", {})

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]
    ) -> dict[str, float]:
        text = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        # By position, since the hub's metric counts a question as often as it is listed.
        found = {str(n): text[r["id"]] for n, r in enumerate(references) if r["id"] in text}
        wanted = {str(n): reference["answers"]["text"] for n, reference in enumerate(references)}
        self.scores = squad_scores(found, wanted, self.language)
        return self.scores.official()


class SquadV2(_InMemory):
    """SQuAD v2.0: exact, f1, total, the same for HasAns_ and NoAns_, and the best thresholds."""

    scores: ScoresV2

    def _info(self) -> evaluate.MetricInfo:
        return self._describe("v2.0", {"no_answer_probability": datasets.Value("float32")})

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        predictions: list[dict[str, Any]],
        references: list[dict[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, float]:
        self.scores = squad_v2_scores(
            {prediction["id"]: prediction["prediction_text"] for prediction in predictions},
            {reference["id"]: reference["answers"]["text"] for reference in references},
            {prediction["id"]: prediction["no_answer_probability"] for prediction in predictions},
            no_answer_threshold,
            self.language,
        )
        return self.scores.official()
