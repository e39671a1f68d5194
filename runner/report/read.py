"""Reads what a run, or the evaluation of a model on another data set, has left in its folder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from runner.errors import DataError, RunDirError, StorageError
from runner.run.folder import RunDir
from runner.utils.tables import read_rows

Rows = Sequence[Mapping[str, str]]
# What a page takes from a line of predictions.jsonl; `excerpts` too where the answer is wrong.
_NUMBER = (int, float)
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "id": str,
    "question": str,
    "answer": str,
    "score": _NUMBER,
    "start": int,
    "end": int,
    "answers": list,
    "answer_starts": list,
    "exact_match": bool,
    "f1": _NUMBER,
    "windows": int,
    "context_tokens": int,
    "context_characters": int,
}


@dataclass(frozen=True)
class RunRecord:
    """A run, or an evaluation: what was scored, how well, and each question's answer.

    Attributes:
        name: of the job; of an evaluation, its folder's.
        path: its folder.
        job: the run's job file as a table and as text; None for an evaluation.
        result: result.json; None for a run that has not finished.
        provenance: provenance.json; None where there is none.
        epochs, steps, probes: rows of eval.csv, train.csv, probes.csv.
        predictions: lines of predictions.jsonl.
        elsewhere: evaluations of this run's model on other data.
        sets: of a run with several validation sets, what it found on each but the first.
        first_set: what the first is called.
    """

    name: str
    path: Path
    job: Mapping[str, Any] | None
    job_text: str
    result: Mapping[str, Any] | None
    provenance: Mapping[str, Any] | None
    epochs: Rows
    steps: Rows
    probes: Rows
    predictions: Sequence[Mapping[str, Any]]
    elsewhere: Sequence[RunRecord]
    sets: Sequence[RunRecord] = ()
    first_set: str = ""

    @property
    def source(self) -> str:
        """The data that was scored, as it was declared."""
        if self.job is not None:
            return declared(self.job["data"], "validation")[0][0]
        return str(self.result["data"]["source"]) if self.result else ""


def declared(data: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """Names and samples of the sets at data.train or data.validation, as a table has them that
    nobody has checked.

    Raises:
        TypeError, KeyError: if it is no job's.
    """
    value, samples = data[key], {"train": "sample", "validation": "validation_sample"}
    found = [
        (one["source"], one.get("sample"))
        if isinstance(one, Mapping)
        else (one, data.get(samples[key]))
        for one in (value if isinstance(value, list) else [value])
    ]
    if not found or not all(isinstance(name, str) for name, _ in found):
        raise TypeError("a name is no text")
    return found


def read_run(path: str | Path, result: Mapping[str, Any] | None = None) -> RunRecord:
    """Read the folder of a run or of an evaluation.

    Args:
        path: the folder.
        result: what result.json is about to hold, for a run that is just ending.

    Raises:
        RunDirError: if there is neither at `path`.
        DataError: naming the file that is damaged.
        StorageError: naming the file that cannot be read, or was lost.
    """
    run = RunDir(path)
    if not run.job.is_file() and not run.result.is_file() and result is None:
        raise RunDirError(
            f"{path} is neither a run folder nor an evaluation: it has no job.toml and no"
            " result.json"
        )
    job_text = _text(run.job) if run.job.is_file() else ""
    job = _toml(run.job, job_text) if job_text else None
    if result is None and run.result.is_file():
        result = _json(run.result, _text(run.result))
    if job is None and result is not None and "model" not in result:  # it is no evaluation's
        raise StorageError(f"{run.job}: {os.strerror(errno.ENOENT)}; the run is not whole without")
    elsewhere = sorted(p.parent for p in run.evaluations.glob("*/result.json"))
    results = {} if result is None else result.get("sets", {})
    return RunRecord(
        name=str(job["name"]) if job else run.path.name,
        path=run.path,
        job=job,
        job_text=job_text,
        result=result,
        provenance=_json(run.provenance, _text(run.provenance))
        if run.provenance.is_file()
        else None,
        epochs=read_rows(run.eval_table),
        steps=read_rows(run.train_table),
        probes=read_rows(run.probe_table),
        predictions=_predictions(run.predictions),
        elsewhere=[read_run(folder) for folder in elsewhere],
        sets=[
            RunRecord(
                *(name, run.path, None, "", results.get(name), None),
                epochs=read_rows(run.eval_table_of(name)),
                steps=(),
                probes=(),
                predictions=_predictions(run.predictions_of(name)),
                elsewhere=(),
            )
            for name in run.further_sets
        ],
        first_set=(*run.set_names, "")[0],
    )


def _predictions(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line:
            record = _json(f"{path}:{number}", line)
            wrong = _wrong_keys(record)
            if wrong:
                raise DataError(
                    f"{path}:{number}: not a line of this version of spantune"
                    f" ({', '.join(wrong)}: absent or of another kind); evaluate the run's model"
                    " again"
                )
            records.append(record)
    return records


def _wrong_keys(record: Any) -> list[str]:
    """Keys of a line of predictions.jsonl that are absent or hold another kind of value."""
    if not isinstance(record, dict):
        return ["all keys"]
    wrong = [
        key
        for key, kind in _KINDS.items()
        if key not in record
        or not isinstance(record[key], kind)
        or (isinstance(record[key], bool) and kind is not bool)
    ]
    if not wrong and len(record["answers"]) != len(record["answer_starts"]):
        wrong.append("answer_starts")
    excerpts = [] if record.get("exact_match") is True else record.get("excerpts")
    if not isinstance(excerpts, list) or not all(_is_excerpt(part) for part in excerpts):
        wrong.append("excerpts")
    return wrong


def _is_excerpt(part: Any) -> bool:
    kinds = {"start": int, "text": str}
    return isinstance(part, dict) and all(isinstance(part.get(k), v) for k, v in kinds.items())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json(place: object, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON: {error}") from None


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        table = tomli.loads(text)
        for key in ("train", "validation"):
            declared(table["data"], key)
        if not all(isinstance(name, str) for name in (table["name"], table["model"]["name"])):
            raise TypeError("a name is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the job of a run: {error!r}") from None
    return table
