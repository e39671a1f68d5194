"""Scores a finished model on another data set, with intervals, into a folder of its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from runner.data.dataset import Dataset, without_rows
from runner.data.splits import Split
from runner.data.windows import Windows, build_windows
from runner.distributed.failures import explaining_inference_oom
from runner.errors import BadRowsError, DataError, UsageError
from runner.eval.caveats import caveats
from runner.eval.evaluation import Evaluation, TunedThreshold, evaluate, in_use
from runner.eval.inference import batch_count, predict_windows
from runner.eval.predictions import LISTED, as_lines, prediction_records
from runner.eval.results import result_scores, score_line, threshold_lines
from runner.job.inference import InferenceSettings
from runner.job.schema import Language, OnBadRow
from runner.job.sources import parse_data, public_name
from runner.metrics.normalise import rules
from runner.model.load.weights import hash_weights
from runner.predict.predictor import ALONE, Predictor
from runner.report.render import write_report
from runner.run import provenance
from runner.run.folder import RunDir
from runner.run.ownership import check_evaluation
from runner.utils.console import progress
from runner.utils.files import (
    below_here,
    read_json,
    storage_errors,
    write_atomic,
    write_json,
)

ALWAYS_ANSWERED = float("inf")  # a null threshold that nothing exceeds


def evaluate_model(
    load: Callable[[], Predictor],
    dataset: Dataset,
    *,
    on_bad_row: OnBadRow = "fail",
    v2: bool,
    language: Language | None = None,
    seed: int,
    output: Path | None,
) -> tuple[dict[str, Any], Path | None]:
    """Score a model on a data set.

    Args:
        load: opens the model.
        dataset: questions with right answers.
        on_bad_row: what to do with questions that the model's windows do not take.
        v2: by SQuAD v2.0; so is a model that may answer nothing.
        language: whose words are compared; None: as the model was scored.
        seed: of the bootstrap.
        output: folder for what is found; None takes one in the run folder, where it is one.

    Returns:
        What result.json holds, and the folder; None where nothing was written.

    Raises:
        UsageError: if `output` holds a run, whose own files it would replace.
        DataError: if it holds what is not ours; if the model's null threshold was tuned on these
            questions; for questions that its windows do not take.
        RunnerError, UsageError: as `load` and `write_evaluation`.
    """
    if output is not None and RunDir(output).job.is_file():
        raise UsageError(f"--output {output}: holds a run; give a folder of its own")
    if output is not None:
        check_evaluation(RunDir(output))
    predictor = load()
    predictor.answering = predictor.answering.with_score(language=language)
    refuse_tuned(predictor.answering, dataset)
    v2 = v2 or predictor.answering.unanswerable
    with explaining_inference_oom():
        while True:
            try:
                scores, windows = assess(predictor, dataset, v2=v2, seed=seed)
                break
            except BadRowsError as error:
                dataset = without_rows(dataset, error.rows, on_bad_row)
                refuse_tuned(predictor.answering, dataset)
    result = result_of(predictor, dataset, windows, scores, seed)
    run = RunDir(predictor.name)
    if output is None and run.job.is_file():
        output = own_folder(run.evaluations, folder_name(dataset.source), result)
    if output is not None:
        write_evaluation(output, predictor, dataset, windows, scores, result)
    return result, output


def refuse_tuned(answering: InferenceSettings, dataset: Dataset) -> None:
    """Hold the questions that are scored apart from those the null threshold was tuned on.

    Only the very same questions are found: a model keeps their hash, not their texts.

    Raises:
        DataError: if they are the same.
    """
    tuned = answering.tuned
    if answering.unanswerable and tuned is not None and tuned.sha256 == dataset.sha256:
        raise DataError(
            f"{dataset.source}: the model's null threshold was tuned on these"
            f" {tuned.questions:,} questions, so that scores on them would report too much: take"
            " others, or give a --null-threshold"
        )


def evaluation_lines(source: str, result: Mapping[str, Any]) -> list[str]:
    """What an evaluation found, for a terminal."""
    language = result["answering"]["score"]["language"]
    official = rules(language, v2="best_f1" in result["metrics"])
    dropped = result["data"]["dropped"]
    left = f", {dropped} bad rows left out" if dropped else ""
    repaired = result["data"]["repaired"]
    left += f", {repaired} mended (repairs.jsonl)" if repaired else ""
    lines = [f"{below_here(source)}: {result['questions']:,} questions, {official}{left}"]
    lines += [score_line(result, ""), *threshold_lines(result)]
    for key, name in (
        ("has_answer_f1", "with an answer: F1"),
        ("no_answer_exact_match", "without an answer: left unanswered"),
    ):
        if key in result["metrics"]:
            low, high = result["intervals"][key]
            lines.append(f"{name} {result['metrics'][key]:.1f} % [{low:.1f} to {high:.1f}]")
    lines += result["caveats"]
    resamples = result["bootstrap"]["resamples"]
    lines.append(f"In brackets: 95 % bootstrap intervals over questions ({resamples:,} resamples)")
    return lines


def assess(
    predictor: Predictor, dataset: Dataset, *, v2: bool, seed: int
) -> tuple[Evaluation, Windows]:
    """Answer a data set's questions and hold the answers against the right ones.

    A model that always answers is scored as it is, by SQuAD v2.0 too: what has no answer it then
    gets wrong. A tuned threshold is shown beside the default one.

    Args:
        predictor: the model.
        dataset: questions with right answers.
        v2: score by SQuAD v2.0, else by v1.1.
        seed: of the bootstrap.
    """
    answering = predictor.answering
    windows = build_windows(
        dataset.examples, predictor.tokenizer, answering.max_length, answering.stride
    )
    score, tuned = answering.score, None
    if not answering.unanswerable:
        score = in_use(score, ALWAYS_ANSWERED)
    elif answering.tuned is not None:
        tuned = TunedThreshold(score.null_threshold, answering.tuned)
        score = in_use(score, answering.tuned.default)
    with progress("answering", batch_count(windows, score.batch_size)) as step:
        predictions = predict_windows(
            predictor.model,
            windows,
            dataset.examples,
            score,
            ALONE,
            unanswerable=v2,
            n_listed=LISTED,
            step=step,
        )
    if predictions is None:
        raise AssertionError("a process alone is its rank 0")
    scores = evaluate(predictions, dataset.examples, score, unanswerable=v2, seed=seed, tuned=tuned)
    if not answering.unanswerable:
        scores = replace(scores, null_threshold=None)
    return scores, windows


def result_of(
    predictor: Predictor, dataset: Dataset, windows: Windows, scores: Evaluation, seed: int
) -> dict[str, Any]:
    """result.json of an evaluation: as a run's, with the data set and the model."""
    parts = {"data": Split(dataset, windows, cached=False)}
    return {
        **result_scores(scores, predictor.default_threshold, seed),
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "dropped": len(dataset.dropped),
            "repaired": len(dataset.repairs),
        },
        "model": {
            "name": public_name(predictor.name.rstrip("/")),
            "weights_sha256": hash_weights(Path(predictor.location)),
        },
        "caveats": caveats(parts, predictor.answering.score, option=_option),
        "answering": predictor.answering.model_dump(mode="json"),
        "seconds": {"total": round(scores.predictions.seconds, 3)},
    }


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def folder_name(source: str) -> str:
    """A file name for an evaluation on a data source; slices stay apart."""
    name = source.rpartition("/")[2] if parse_data(source).kind == "file" else source
    name = name.replace("[:", "[0:").replace(":]", ":end]").replace("%", "p")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def own_folder(above: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Where an evaluation is written: the folder of its data's name, unless another one is there,
    of a file of the same name or of a model that was asked otherwise."""
    folder, mine = above / name, _identity(result)
    try:
        there = _identity(read_json(RunDir(folder).result, dict[str, Any]))
    except FileNotFoundError:
        return folder
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        there = None
    if there == mine:
        return folder
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    return above / f"{name}-{digest[:8]}"


def _identity(result: Mapping[str, Any]) -> list[Any]:
    # What sets an evaluation apart: the questions, how they are asked, by which official evaluation
    # they are scored. How many windows are read together changes no score.
    answering = dict(result["answering"])
    score = {key: value for key, value in answering["score"].items() if key != "batch_size"}
    return [result["data"]["sha256"], answering | {"score": score}, "best_f1" in result["metrics"]]


def write_evaluation(
    folder: Path,
    predictor: Predictor,
    dataset: Dataset,
    windows: Windows,
    scores: Evaluation,
    result: Mapping[str, Any],
) -> None:
    """Write provenance.json, by which the folder is known for ours, predictions.jsonl, the report
    and, last, result.json.

    Raises:
        DataError: if the folder holds what is not ours.
        StorageError: if it cannot be written.
    """
    run = RunDir(folder)
    check_evaluation(run)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Until the new one is there, the old one would speak for files that are not its own.
        run.result.unlink(missing_ok=True)
    device = predictor.model.loader.device
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.processor_name()
    )
    seed = result["bootstrap"]["seed"]
    write_json(run.provenance, provenance.collect(seed, 1, torch.get_num_threads(), [name]))
    records = prediction_records(
        scores.predictions.answers,
        dataset.examples,
        windows,
        scores.exact_N,
        scores.f1_N,
        unanswerable=scores.null_threshold is not None,
    )
    write_atomic(run.predictions, as_lines(records))
    if dataset.repairs:
        write_atomic(run.repairs, as_lines(map(asdict, dataset.repairs)))
    write_report(folder, result)
    write_json(run.result, result)
