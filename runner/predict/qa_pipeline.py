"""A drop-in for the question-answering pipeline that transformers 5 removed: its calls and results.

    from runner.predict import pipeline  # instead of: from transformers import pipeline

    ask = pipeline("question-answering", model="runs/bert-squad/20261125-101500")
    ask(question="Who wrote it?", context="It was written by Ada.")
    # {'score': 0.98, 'start': 18, 'end': 21, 'answer': 'Ada'}

It gives the old pipeline's numbers: a score is the product of a start and an end probability within
one window, and answers of equal text are added up. (Only a word that a window cuts in two is given
whole.) `predict` compares logits over all windows and knows the null threshold that was stored with
the model: new code should use that.

Legend: N windows, B windows of a batch, K candidates, C context tokens, 2 (start, end).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runner.data.dataset import Example
from runner.data.sampler import score_batches
from runner.data.tokenize import bare_backend
from runner.data.windows import Windows, build_windows
from runner.eval.answers import BestSpans, join, search
from runner.job.inference import default_settings
from runner.job.schema import Model
from runner.model.forward import SpanLogits
from runner.model.load import ModelFiles, load_tokenizer
from runner.predict.predictor import Predictor, locate_model
from runner.predict.questions import GROUP

Result = dict[str, Any]

# What the old pipeline takes and this one has no use for: windows are never padded to a length, it
# never cut a question with a fast tokenizer, and here there is one framework.
_IGNORED = (
    *("padding", "max_question_len", "batch_size", "num_workers", "truncation"),
    *("framework", "use_fast"),
)


def pipeline(
    task: str = "question-answering",
    model: str | PreTrainedModel | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    device: int | str | torch.device | None = None,
    revision: str | None = None,
    **options: Any,
) -> QuestionAnsweringPipeline:
    """Open a model for questions, as `transformers.pipeline` did.

    Args:
        task: "question-answering".
        model: a run folder, a model folder, a hub id, package:NAME/SUBFOLDER, or a loaded model.
        tokenizer: of a loaded model, or instead of the named model's own; loaded, or named as a
            model is.
        device: "cpu", "cuda:0", or a GPU's number, -1 for the CPU; None takes a GPU where there is
            one.
        revision: of a hub id.
        options: keywords of a call that shall hold for all calls.

    Raises:
        ValueError: another task, or a loaded model without its tokenizer.
        TypeError: an unknown keyword, such as the old ones of how a model is loaded.
        AssetError, DataError: as `Predictor.load`.
    """
    if task != "question-answering":
        raise ValueError(f"this is the pipeline for 'question-answering', not for {task!r}")
    if isinstance(device, int):
        device = f"cuda:{device}" if device >= 0 else "cpu"
    read_options(options)  # a wrong one must not wait for the model
    if isinstance(tokenizer, str):
        section = Model(name=locate_model(tokenizer), revision=revision)
        tokenizer = load_tokenizer(ModelFiles.locate(section))
    if isinstance(model, str):
        place = None if device is None else str(device)
        found = Predictor.load(model, revision=revision, device=place)
        found = found if tokenizer is None else found.with_tokenizer(tokenizer)
    elif model is None or tokenizer is None:
        raise ValueError("give the model's name, or a loaded model and its tokenizer")
    else:
        found = Predictor(
            model,
            tokenizer,
            default_settings(tokenizer.model_max_length),
            name=type(model).__name__,
            location="",
            device=torch.device(device) if device is not None else model.device,
        )
    return QuestionAnsweringPipeline(found, **options)


class QuestionAnsweringPipeline:
    """Answers questions in the call forms and with the results of the removed pipeline."""

    task = "question-answering"

    def __init__(self, predictor: Predictor, **options: Any) -> None:
        self.predictor, self._given = predictor, options
        read_options(options)  # a wrong one is an error now

    def __call__(self, *args: Any, **kwargs: Any) -> Result | list[Any] | Iterator[Any]:
        """Answer one question or several.

        Args:
            question: text, or a list of texts.
            context: text for all questions, or a list with one for each.
            args: instead of both: a dictionary with question and context, a list of such, two
                texts, or a generator of such dictionaries. (Also as `data` or `X`.)
            top_k: answers wanted (1).
            handle_impossible_answer: whether "" may be an answer (False).
            max_answer_len: tokens of an answer at most (15).
            max_seq_len: tokens of a window (384, or what the model takes).
            doc_stride: tokens shared by neighbouring windows (128, or half a window).
            align_to_words: whether an answer begins and ends with whole words (True).

        Returns:
            A dictionary with score, start, end and answer; for top_k > 1 a list of them, best
            first; for several questions a list of either; for a generator an iterator.

        Raises:
            ValueError: a question or context that is empty or None, or lists of unequal length.
            KeyError: a dictionary without question or context.
            TypeError: an unknown keyword.
        """
        inputs, kwargs = read_inputs(args, dict(kwargs))
        options = read_options(self._given | kwargs)
        if isinstance(inputs, Iterator):
            return (self._answer([read_pair(item)], options)[0] for item in inputs)
        pairs = [read_pair(item) for item in inputs]
        # In groups: words are found for each text of a group once, and windows come in blocks that
        # know nothing of each other's texts.
        groups = (pairs[first : first + GROUP] for first in range(0, len(pairs), GROUP))
        found = [answer for group in groups for answer in self._answer(group, options)]
        return found[0] if len(found) == 1 else found

    @torch.no_grad()
    def _answer(self, pairs: Sequence[tuple[str, str]], options: Options) -> list[Any]:
        tokenizer = self.predictor.tokenizer
        longest = options.max_seq_len or min(tokenizer.model_max_length, 384)
        stride = options.doc_stride if options.doc_stride is not None else min(longest // 2, 128)
        if stride > longest:
            raise ValueError(f"doc_stride {stride} is larger than max_seq_len {longest}")
        examples = [Example(str(n), q, c, (), ()) for n, (q, c) in enumerate(pairs)]
        windows = build_windows(examples, tokenizer, longest, stride)
        wanted = 2 * options.top_k + 10 if options.align_to_words else options.top_k
        spans, log_sum_N, null_N = self._search(windows, wanted, options.max_answer_len)
        words_C2 = _words(windows, examples, tokenizer) if options.align_to_words else None
        places_C2 = windows.chars_C2 if words_C2 is None else words_C2
        found: list[Any] = []
        for place, example in enumerate(examples):
            rows = np.flatnonzero(windows.questions_N == place)
            answers = _merged(
                example.context,
                _candidates(windows, spans, log_sum_N, places_C2, rows),
                float(null_N[rows].min()) if options.handle_impossible_answer else None,
            )[: options.top_k]
            found.append(answers[0] if len(answers) == 1 else answers)
        return found

    def _search(
        self, windows: Windows, n_best: int, max_answer_len: int
    ) -> tuple[BestSpans, np.ndarray, np.ndarray]:
        """Best spans; the log of what turns their scores into probabilities; that of no answer."""
        parts: list[BestSpans] = []
        sums: list[torch.Tensor] = []
        model, batch_size = self.predictor.model, self.predictor.answering.score.batch_size
        batches = score_batches(windows.lengths_N, batch_size, 0, 1)
        for rows in batches:
            logits = model(model.batch(windows, rows))
            contexts_B2, cls_B = windows.contexts_N2[rows], windows.cls_N[rows]
            spans = search(
                logits.logits_T2,
                logits.batch.segments_B2,
                torch.from_numpy(contexts_B2),
                n_best=n_best,
                max_answer_length=max_answer_len,
                cls_N=torch.from_numpy(cls_B),
            )
            parts.append(spans.cpu())
            sums.append(_log_sums(logits, contexts_B2, cls_B))
        place_N = torch.from_numpy(np.concatenate(batches)).argsort()
        spans, log_sum_N = join(parts)[place_N], torch.cat(sums)[place_N].numpy()
        return spans, log_sum_N, np.exp(spans.null_score_N.numpy() - log_sum_N)


def _log_sums(logits: SpanLogits, contexts_B2: np.ndarray, cls_B: np.ndarray) -> torch.Tensor:
    """Log of the product of the old pipeline's two softmaxes' sums, float64 [B]."""
    # Of exp(start) and of exp(end), each over the context and [CLS].
    logits_T2, sums = logits.logits_T2.detach().double().cpu(), []
    rows = zip(logits.batch.segments_B2.tolist(), contexts_B2.tolist(), cls_B.tolist(), strict=True)
    for (offset, _), (low, high), cls in rows:
        seen = torch.cat([logits_T2[offset + low : offset + high], logits_T2[offset + cls][None]])
        sums.append(seen.logsumexp(0).sum())
    return torch.stack(sums)


def _words(
    windows: Windows, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> np.ndarray | None:
    """Characters [start, end) of each context token's word; None where a tokenizer knows none."""
    backend, _ = bare_backend(tokenizer)
    words_C2, first = windows.chars_C2.copy(), 0
    for context in dict.fromkeys(example.context for example in examples):
        found = backend.encode(context, add_special_tokens=False).word_ids
        if None in found:
            return None
        word_C = np.array(found, dtype=int)
        chars_C2 = words_C2[first : first + len(word_C)]  # of this context's tokens
        low_W, high_W = np.full(len(word_C), len(context)), np.zeros(len(word_C), dtype=int)
        np.minimum.at(low_W, word_C, chars_C2[:, 0])
        np.maximum.at(high_W, word_C, chars_C2[:, 1])
        chars_C2[:, 0], chars_C2[:, 1] = low_W[word_C], high_W[word_C]
        first += len(word_C)
    return words_C2


def _candidates(
    windows: Windows,
    spans: BestSpans,
    log_sum_N: np.ndarray,
    places_C2: np.ndarray,
    rows: np.ndarray,
) -> Iterator[tuple[float, int, int]]:
    """(probability, start, end) of a question's spans, window after window."""
    for row in rows.tolist():
        first = int(windows.chars_firsts_N[row])
        columns = (x_NK[row].tolist() for x_NK in (spans.score_NK, spans.start_NK, spans.end_NK))
        for score, start, end in zip(*columns, strict=True):
            if start >= 0:
                low, high = int(places_C2[first + start, 0]), int(places_C2[first + end, 1])
                if low < high:
                    yield float(np.exp(score - log_sum_N[row])), low, high


def _merged(
    context: str, candidates: Iterable[tuple[float, int, int]], null: float | None
) -> list[Result]:
    """Best first; the scores of answers of the same text, but for case, are added up."""
    found: dict[str, Result] = {}
    for score, start, end in candidates:
        text = context[start:end]
        new = {"score": 0.0, "start": start, "end": end, "answer": text}
        found.setdefault(text.lower(), new)["score"] += score
    answers = list(found.values())
    if null is not None or not answers:
        answers.append({"score": null or 0.0, "start": 0, "end": 0, "answer": ""})
    return sorted(answers, key=lambda answer: -answer["score"])


@dataclass(frozen=True)
class Options:
    """The old pipeline's keywords and their defaults."""

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True


def read_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Find the questions in a call.

    Returns:
        The questions, a list or an iterator, and the keywords that are left.

    Raises:
        ValueError: if there are none, or not as many as contexts.
    """
    named = [kwargs.pop(name, None) for name in ("X", "data")]
    question, context = kwargs.pop("question", None), kwargs.pop("context", None)
    given = args[0] if len(args) == 1 else None
    if len(args) == 2 and all(isinstance(arg, str) for arg in args):
        given = {"question": args[0], "context": args[1]}
    elif len(args) > 1:
        given = list(args)
    for other in named:
        given = other if given is None else given
    if given is None:
        given = _paired(question, context)
    if isinstance(given, Mapping) or hasattr(given, "question_text"):
        return [given], kwargs
    if isinstance(given, Iterator):
        return given, kwargs
    if isinstance(given, Iterable) and not isinstance(given, str):
        return list(given), kwargs
    raise ValueError("give question=... and context=..., or dictionaries that have both")


def _paired(question: Any, context: Any) -> list[dict[str, Any]]:
    if isinstance(question, str) and isinstance(context, str):
        return [{"question": question, "context": context}]
    if isinstance(question, list) and isinstance(context, str):
        return [{"question": text, "context": context} for text in question]
    if isinstance(question, list) and isinstance(context, list):
        if len(question) != len(context):
            raise ValueError("there are not as many questions as contexts")
        return [{"question": q, "context": c} for q, c in zip(question, context, strict=True)]
    raise ValueError("question and context are texts, a list and a text, or two lists")


def read_pair(item: Any) -> tuple[str, str]:
    """Question and context of a dictionary, or of a SquadExample of transformers 4.

    Raises:
        ValueError: if it is neither, or one of the texts is empty or None.
        KeyError: if one is absent.
    """
    if hasattr(item, "question_text"):
        item = {"question": item.question_text, "context": item.context_text}
    if not isinstance(item, Mapping):
        raise ValueError(f"{item!r} is no dictionary with question and context")
    for name in ("question", "context"):
        if name not in item:
            raise KeyError(f"a dictionary needs question and context; this one has no {name}")
        if not isinstance(item[name], str) or not item[name].strip():
            raise ValueError(f"`{name}` cannot be empty or None")
    return item["question"], item["context"]


def read_options(given: Mapping[str, Any]) -> Options:
    """Keywords of a call, those left out that say nothing here.

    Raises:
        ValueError: if a number is too small.
        TypeError: naming unknown keywords.
    """
    chosen = {k: v for k, v in given.items() if v is not None and k not in (*_IGNORED, "topk")}
    if given.get("topk") is not None and "top_k" not in chosen:
        chosen["top_k"] = given["topk"]  # its name before transformers 4.10
    unknown = set(chosen) - {field.name for field in fields(Options)}
    if unknown:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: no such keyword here; for a model that is to be loaded"
            " in another way, load it and give model=... and tokenizer=..."
        )
    options = Options(**chosen)
    for name in ("top_k", "max_answer_len"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(options, name)}")
    return options
