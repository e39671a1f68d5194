"""Answers questions with a fine-tuned model, from Python or for `spantune predict`.

    from runner.predict import Predictor

    predictor = Predictor.load("runs/bert-squad/20261125-101500")
    predictor.answer("Who wrote it?", "It was written by Ada.").answer  # "Ada"

Windows, answer length and null threshold are those that were stored with the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runner.data.dataset import Example
from runner.data.windows import build_windows
from runner.distributed.failures import explaining_inference_oom
from runner.errors import AssetError, DataError, UsageError
from runner.eval.answers import Answer, Candidate
from runner.eval.inference import predict_windows
from runner.eval.predictions import listed, window_counts
from runner.job.inference import InferenceSettings, read_settings
from runner.job.schema import Model
from runner.model.forward import SpanModel
from runner.model.load import ModelFiles, check_forward, load_finetuned, load_tokenizer
from runner.predict.locate import locate_model
from runner.predict.questions import GROUP
from runner.utils.ranks import Rank

ALONE = Rank(index=0, world=1, local=0, local_world=1)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a context; `id` comes back with the answer."""

    id: str
    question: str
    context: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to a question.

    Attributes:
        id, question: as asked.
        answer: verbatim context[start:end]; "" where the model answers nothing.
        score: probability of the answer among the n-best candidates, 0 to 1. It says that the
            answer fits better than others, not that it is true.
        start, end: characters [start, end) in the context; 0, 0 for no answer.
        window: which of the question's windows the answer was found in, from 0; -1 where there was
            no candidate.
        windows: how many windows the context was cut into.
        no_answer_score: probability that there is no answer; None where the model always answers.
        null_difference: how much better "no answer" scored than the best span, in logits; the
            answer is "" where it exceeds the null threshold. None where the model always answers.
        n_best: candidates, best first, as (text, score, logit, start, end, window).
    """

    id: str
    question: str
    answer: str
    score: float
    start: int
    end: int
    window: int
    windows: int
    no_answer_score: float | None
    null_difference: float | None
    n_best: tuple[Candidate, ...]

    def record(self) -> dict[str, Any]:
        """As `spantune predict` writes it, ready for JSON."""
        record: dict[str, Any] = {
            "id": self.id,
            "question": self.question,
            "answer": self.answer,
            "score": round(self.score, 6),
            "start": self.start,
            "end": self.end,
            "window": self.window,
            "windows": self.windows,
        }
        if self.no_answer_score is not None and self.null_difference is not None:
            record["no_answer_score"] = round(self.no_answer_score, 6)
            record["null_difference"] = round(self.null_difference, 6)
        record["n_best"] = [listed(candidate) for candidate in self.n_best]
        return record


class Predictor:
    """A fine-tuned model that answers questions, in the way that was stored with it.

    Attributes:
        name: as it was asked for.
        location: the folder of its files, or its hub id.
        answering: windows, answer length, null threshold.
        default_threshold: null threshold that is neither tuned nor given here.
        model: the model on its device, and how it is fed.
        tokenizer: the model's.
        listed: candidates that a prediction lists at most; probabilities are over all n-best.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        answering: InferenceSettings,
        *,
        name: str,
        location: str,
        device: torch.device,
        listed: int | None = None,
        default_threshold: float | None = None,
    ) -> None:
        self.name = name
        self.location = location
        self.answering = answering
        self.default_threshold = (
            answering.default_threshold if default_threshold is None else default_threshold
        )
        self.tokenizer = tokenizer
        self.listed = listed
        engine = model.to(device).eval()  # pyright: ignore[reportArgumentType]
        self.model = SpanModel.of(engine, tokenizer, device)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        null_threshold: float | None = None,
        max_answer_length: int | None = None,
        n_best: int | None = None,
        batch_size: int | None = None,
        listed: int | None = None,
    ) -> Predictor:
        """Open a model.

        Args:
            name: a run folder, a model folder, a hub id, or package:NAME/SUBFOLDER.
            revision: of a hub id: branch, tag or commit.
            device: "cpu", "cuda", "cuda:1"; None takes a GPU where there is one.
            null_threshold: instead of the stored one; with it, a model that always answers may
                answer nothing.
            max_answer_length, n_best, batch_size: instead of the stored ones (tokens, candidates,
                windows).
            listed: candidates in each prediction at most; None lists all n-best.

        Raises:
            AssetError: if there is no such model here and none can be fetched.
            DataError: if its files cannot be read, or it was never fine-tuned to answer questions.
            ValueError: if one of the settings is out of its range.
        """
        section = Model(name=locate_model(name), revision=revision)
        try:
            files = ModelFiles.locate(section)
            tokenizer = load_tokenizer(files)
        except (AssetError, DataError) as error:
            raise type(error)(str(error).removeprefix("model.name: ")) from None
        answering = read_settings(files.config.to_dict(), tokenizer.model_max_length, name)
        default_threshold = answering.default_threshold
        answering = answering.with_score(
            null_threshold=null_threshold,
            max_answer_length=max_answer_length,
            n_best=n_best,
            batch_size=batch_size,
        )
        if null_threshold is not None:
            answering = answering.model_copy(update={"unanswerable": True, "tuned": None})
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_finetuned(files, place, name)
        check_forward(model, tokenizer, name)
        return cls(
            model,
            tokenizer,
            answering,
            name=name,
            location=str(files.folder),
            device=place,
            listed=listed,
            default_threshold=default_threshold,
        )

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Predictor:
        """The same model, fed by another tokenizer."""
        return Predictor(
            self.model.engine,
            tokenizer,
            self.answering,
            name=self.name,
            location=self.location,
            device=self.model.loader.device,
        )

    def answer(self, question: str, context: str) -> Prediction:
        """Answer one question."""
        return self.answers([Question("1", question, context)])[0]

    def answers(self, questions: Sequence[Question]) -> list[Prediction]:
        """Answer questions together, windows of similar length in one batch; in their order.

        Raises:
            DataError: naming the question that is empty.
            BadRowsError: for questions that leave no room for their contexts.
        """
        for question in questions:
            for name in ("question", "context"):
                if not getattr(question, name).strip():
                    raise DataError(f"question {question.id}: its {name} is empty")
        examples = [Example(q.id, q.question, q.context, (), ()) for q in questions]
        if not examples:
            return []
        answering = self.answering
        windows = build_windows(examples, self.tokenizer, answering.max_length, answering.stride)
        found = predict_windows(
            self.model,
            windows,
            examples,
            answering.score,
            ALONE,
            unanswerable=answering.unanswerable,
            n_listed=self.listed,
        )
        if found is None:
            raise AssertionError("a process alone is its rank 0")
        count_N, _ = window_counts(windows, len(examples))
        rows = zip(questions, found.answers, count_N.tolist(), strict=True)
        return [self._prediction(*row) for row in rows]

    def stream(self, questions: Iterable[Question], group: int = GROUP) -> Iterator[Prediction]:
        """Answer questions one group after the other, so that any number of them fits in memory."""
        waiting = iter(questions)
        while some := list(islice(waiting, group)):
            yield from self.answers(some)

    def _prediction(self, question: Question, answer: Answer, windows: int) -> Prediction:
        may_be_empty = self.answering.unanswerable
        return Prediction(
            id=question.id,
            question=question.question,
            answer=answer.text,
            score=answer.score,
            start=answer.start,
            end=answer.end,
            window=answer.window,
            windows=windows,
            no_answer_score=answer.null_probability if may_be_empty else None,
            null_difference=answer.null_difference if may_be_empty else None,
            n_best=answer.n_best if self.listed is None else answer.n_best[: self.listed],
        )


def open_model(
    name: str,
    *,
    device: str | None,
    threads: int | None,
    null_threshold: float | None,
    max_answer_length: int | None,
    batch_size: int | None,
    listed: int | None,
) -> Predictor:
    """Open a model as the command line says; None leaves what is stored with it, or usual.

    Args:
        threads: of the CPU; the others are as of `Predictor.load`.

    Raises:
        UsageError: a setting out of its range, or a device that is not here; else as
            `Predictor.load` and `memory_errors`.
    """
    if threads:
        torch.set_num_threads(threads)
    try:
        with explaining_inference_oom():
            if device is not None:
                torch.zeros(1, device=device)
            return Predictor.load(
                name,
                device=device,
                null_threshold=null_threshold,
                max_answer_length=max_answer_length,
                batch_size=batch_size,
                listed=listed,
            )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(str(error).partition("\n")[0]) from None
