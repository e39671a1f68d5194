"""The settings of inference: windows, answer length, null threshold; stored with the model, so that
`predict` answers as the run did.

It stands in the model's `config.json` under "spantune": transformers keeps keys it does not know,
through `from_pretrained`, `save_pretrained` and an upload to the hub; a file of our own beside it
would be left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from runner.errors import DataError
from runner.job.schema import Data, Score, Section, Stride, WindowTokens
from runner.utils.text import first_problem

KEY = "spantune"


@dataclass(frozen=True, config=ConfigDict(strict=True))
class TunedOn:
    """The questions on which a null threshold was tuned, the percent it reached there, and the
    job's own threshold, in whose place it stands."""

    source: str
    sha256: str
    questions: int
    metric: Literal["f1", "exact_match"]
    percent: float
    default: float = 0.0


class InferenceSettings(Section):
    """All that decides an answer beside the weights.

    `score.null_threshold` is the one in use: the tuned one where `tuned` says on what.
    """

    max_length: WindowTokens
    stride: Stride
    unanswerable: bool
    score: Score
    tuned: TunedOn | None

    @field_validator("tuned", mode="before")
    @classmethod
    def _from_table(cls, value: Any) -> Any:
        try:
            return TunedOn(**value) if isinstance(value, Mapping) else value
        except TypeError as error:
            raise ValueError(str(error)) from None

    @property
    def default_threshold(self) -> float:
        """The null threshold before tuning."""
        return self.score.null_threshold if self.tuned is None else self.tuned.default

    def with_score(self, **changes: Any) -> InferenceSettings:
        """The same with some keys of `score` changed; None changes nothing.

        Raises:
            ValueError: naming the key and what is allowed.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        try:
            score = Score.model_validate(self.score.model_dump() | given)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from None
        return self.model_copy(update={"score": score})


def settings_of_job(data: Data, score: Score) -> InferenceSettings:
    """A job's settings before anything is tuned."""
    return InferenceSettings(
        max_length=data.max_length,
        stride=data.stride,
        unanswerable=data.unanswerable,
        score=score,
        tuned=None,
    )


def default_settings(longest: int) -> InferenceSettings:
    """The schema's defaults, for a model that carries no settings; it takes `longest` tokens."""
    fields = Data.model_fields
    max_length = min(fields["max_length"].default, longest)
    return InferenceSettings(
        max_length=max_length,
        stride=min(fields["stride"].default, max_length // 3),
        unanswerable=fields["unanswerable"].default,
        score=Score(),
        tuned=None,
    )


def read_settings(config: Mapping[str, Any], longest: int, name: str) -> InferenceSettings:
    """Read the settings out of a model's configuration, or take the usual ones.

    Args:
        config: the configuration as a table.
        longest: tokens that the model takes at most.
        name: of the model, for messages.

    Raises:
        DataError: if what stands there is not what spantune writes.
    """
    if KEY not in config:
        return default_settings(longest)
    try:
        settings = InferenceSettings.model_validate(config[KEY])
    except ValidationError as error:
        raise DataError(
            f"{name}: config.json, {KEY}: {first_problem(error)}; not written by this version of"
            " spantune"
        ) from None
    if settings.stride >= settings.max_length or settings.max_length > longest:
        raise DataError(
            f"{name}: config.json, {KEY}: windows of {settings.max_length} tokens with a stride of"
            f" {settings.stride} do not suit a model that takes {longest} tokens"
        )
    return settings
