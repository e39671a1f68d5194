"""The process of one tracker: reads rows from its standard input and passes them to W&B,
TensorBoard or MLflow until the pipe is closed.

It starts from nothing but a pipe, so that whatever a tracker's library does stays in here. What the
user should know goes to standard output, one line each; all else to standard error, a log file.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

PARAMETERS = 100  # that MLflow takes in one call
TrackerRow = Mapping[str, Any]
Say = Callable[[str], None]


class Tool(Protocol):
    """A tracker's library behind three calls."""

    def log(self, table: str, row: TrackerRow, step: int) -> None: ...

    def recall(self, probe: TrackerRow) -> None:
        """Take a row of probes.csv that an earlier attempt has logged: its curves have it, a table
        that is sent whole at the end must have it again."""
        ...

    def close(self, *, finished: bool) -> None: ...


class Wandb:
    """Weights & Biases: a run whose values are drawn over the optimiser step."""

    def __init__(self, settings: TrackerRow, say: Say) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        wanted = {
            "init_timeout": settings["patience"],
            "finish_timeout": max(1.0, settings["wait"] - 2),
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "silent": True,
            "x_stats_pid": settings["pid"],
        }
        known = {k: v for k, v in wanted.items() if k in wandb.Settings.model_fields}
        try:
            self._run = wandb.init(
                project=settings["project"],
                entity=settings["entity"],
                dir=settings["folder"],
                id=settings["id"],
                name=settings["name"],
                config=dict(settings["config"]),
                mode="offline" if settings["offline"] else "online",
                resume="allow",
                settings=wandb.Settings(**known),
            )
        except Exception:
            wandb.teardown()  # its service holds the run's id as taken
            raise
        # Steps may come twice after an interruption: W&B's own counter would refuse them.
        self._run.define_metric("*", step_metric="step")
        self._probes: list[Any] = []
        self._columns: list[Any] = []
        if settings["offline"]:
            say(f"offline; to send it: wandb sync {os.path.dirname(self._run.dir)}")
        else:
            say(f"{self._run.url}")

    def log(self, table: str, row: TrackerRow, step: int) -> None:
        if table == "result":
            self._run.summary.update(numeric_values(row))
            return
        if table == "probes":
            self.recall(row)
        self._run.log({"step": step, **values(table, row)})

    def recall(self, probe: TrackerRow) -> None:
        self._columns = list(probe)
        self._probes.append(list(probe.values()))

    def close(self, *, finished: bool) -> None:
        if self._probes:
            table = self._wandb.Table(columns=self._columns, data=self._probes)
            self._run.log({"probes": table})
        self._run.finish(exit_code=0 if finished else 1)


class Tensorboard:
    """TensorBoard: an event file, written without TensorFlow or torch."""

    def __init__(self, settings: TrackerRow, say: Say) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        event, summary, tensor, types = (
            importlib.import_module(f"tensorboard.compat.proto.{name}_pb2")
            for name in ("event", "summary", "tensor", "types")
        )
        self._event, self._summary = event.Event, summary.Summary
        self._metadata, self._tensor = summary.SummaryMetadata, tensor.TensorProto
        self._string = types.DT_STRING
        folder = os.path.join(settings["folder"], "tensorboard")
        self._writer = EventFileWriter(folder, flush_secs=10)
        self._text("job", f"```json\n{json.dumps(settings['config'], indent=2)}\n```", 0)
        say(f"to look at it: tensorboard --logdir {folder}")

    def log(self, table: str, row: TrackerRow, step: int) -> None:
        scalars = [
            self._summary.Value(tag=tag, simple_value=value)
            for tag, value in values(table, row).items()
        ]
        self._write(self._summary(value=scalars), step)
        if table == "probes":
            self._text(f"probes/{row['probe']}", f"{row['question']} **{row['answer']}**", step)

    def recall(self, probe: TrackerRow) -> None:
        pass  # what earlier attempts wrote lies in the same folder, and is shown with the rest

    def close(self, *, finished: bool) -> None:
        self._writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        metadata = self._metadata(plugin_data=self._metadata.PluginData(plugin_name="text"))
        tensor = self._tensor(dtype=self._string, string_val=[text.encode()])
        value = self._summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._write(self._summary(value=[value]), step)

    def _write(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))


class Mlflow:
    """MLflow: a run on a tracking server, or in files of the run folder."""

    def __init__(self, settings: TrackerRow, say: Say) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Without these a call waits for two minutes, and is tried seven times.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(settings["patience"]))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        # Files need no database library, and no locks of a shared file system.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient, entities

        folder = os.path.join(settings["folder"], "mlflow")
        uri = settings["uri"] or os.environ.get("MLFLOW_TRACKING_URI")
        if settings["offline"] or not uri:
            uri = f"file:{folder}"
        self._metric = entities.Metric
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(settings["project"])
        place = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(settings["project"])
        )
        existing = self._client.search_runs([place], f"tags.`spantune.id` = '{settings['id']}'")
        tags = {"spantune.id": settings["id"]}
        run = (
            existing[0]
            if existing
            else self._client.create_run(place, None, tags, settings["name"])
        )
        self._run = run.info.run_id
        self._client.update_run(self._run, status="RUNNING")
        known = run.data.params if existing else {}
        flat = flatten(settings["config"]).items()
        parameters = [entities.Param(k, v) for k, v in flat if k not in known]
        for place in range(0, len(parameters), PARAMETERS):
            self._client.log_batch(self._run, params=parameters[place : place + PARAMETERS])
        self._probes: list[TrackerRow] = []
        local = f"to look at it: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {uri}"
        say(local if uri.startswith("file:") else f"run {self._run} on {uri}")

    def log(self, table: str, row: TrackerRow, step: int) -> None:
        now = int(time.time() * 1000)
        found = [self._metric(key, value, now, step) for key, value in values(table, row).items()]
        self._client.log_batch(self._run, metrics=found)
        if table == "probes":
            self.recall(row)

    def recall(self, probe: TrackerRow) -> None:
        self._probes.append(probe)

    def close(self, *, finished: bool) -> None:
        if self._probes:
            self._client.log_dict(self._run, {"probes": self._probes}, "probes.json")
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


TOOLS: dict[str, Callable[[TrackerRow, Say], Tool]] = {
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
}


def numeric_values(row: TrackerRow) -> dict[str, float]:
    """The numbers of a row by their names; the step is no value but the place of the others."""
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
    }


def values(table: str, row: TrackerRow) -> dict[str, float]:
    """What a row adds to curves: `train/loss_nats`, `eval/f1_percent`, `probes/1/score`."""
    if table == "probes":
        return {f"probes/{row['probe']}/score": float(row["score"])}
    return {f"{table}/{key}": value for key, value in numeric_values(row).items()}


def flatten(table: TrackerRow, prefix: str = "") -> dict[str, str]:
    """Nested settings as `train.learning_rate`: text, cut to what MLflow takes."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[f"{prefix}{key}"] = text[:500]
    return flat


def begin(settings: TrackerRow, say: Say) -> Tool:
    """Open the tracker; where that fails online, in the run folder."""
    make = TOOLS[settings["tool"]]
    try:
        return make(settings, say)
    except Exception as error:
        if settings["offline"]:
            raise
        say(f"kept in the run folder ({first_sentence(error)})")
        return make({**settings, "offline": True}, say)


def first_sentence(error: BaseException) -> str:
    """The first line of an error, not too long."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    first = first.partition(" with exception")[0]  # MLflow adds three libraries' accounts of it
    return first if len(first) <= 120 else f"{first[:117]}..."


def follow_rows(lines: Any, say: Say) -> None:
    """Pass on rows from the pipe until it is closed; without word of an end before, the run is
    taken for a failed one."""
    settings = json.loads(next(lines))
    tool = begin(settings, say)
    finished, step, failures = False, 0, 0
    for line in lines:
        message = json.loads(line)
        if "end" in message:
            finished = message["end"]
            continue
        row = message["row"]
        if "step" in row:
            step = row["step"]
        try:
            if message["table"] == "earlier_probes":
                tool.recall(row)
            else:
                tool.log(message["table"], row, step)
        except Exception as error:  # one row that is not taken does not end the others
            failures += 1
            if failures == 1:
                say(f"{first_sentence(error)}; some rows are in the run's tables only")
    # The run that started us may be dead: nobody else ends a library that hangs.
    deadline = threading.Timer(settings["wait"] + 5, os._exit, [1])
    deadline.daemon = True
    deadline.start()
    tool.close(finished=finished)


def main() -> None:
    """Be a tracker's process."""
    # These are meant for the run; its end closes our pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    voice = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs to the log

    def say(text: str) -> None:
        try:
            # A tracker's address from the environment may hold a password.
            voice.write(re.sub(r"//\S*@", "//", " ".join(text.split())) + "\n")
        except OSError:  # the run is gone; what is left is to bring this to an end
            sys.stderr.write(f"{text}\n")

    try:
        follow_rows(iter(sys.stdin.buffer), say)
    except Exception as error:
        say(f"{first_sentence(error)}; the run goes on without it")
        raise


if __name__ == "__main__":
    main()
