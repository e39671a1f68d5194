"""Trackers by their real libraries: what they record, and that no outage reaches the training."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from runner.job.schema import Track
from runner.run.folder import RunDir
from runner.tracking import client as tracking
from runner.tracking.client import Trackers, start_trackers
from runner.utils.tables import read_rows
from tests.interruptions import outcome

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = {"seed": 7, "train": {"learning_rate": 2e-5, "adam_betas": [0.9, 0.999]}}
PROBE = {"epoch": 1, "probe": 1, "question": "Who?", "answer": "Ann [x]", "score": 0.25}
PROBE |= {"start_character": 0, "end_character": 7, "expected": None}
EARLIER = PROBE | {"epoch": 0, "answer": "Bob"}
ROWS = [
    ("train", {"step": 1, "epoch": 0.5, "loss_nats": 2.0, "grad_norm": None}),
    ("train", {"step": 2, "epoch": 1.0, "loss_nats": 1.0, "grad_norm": 0.5}),
    ("probes", PROBE),
    ("eval", {"epoch": 1, "step": 2, "f1_percent": 50.0}),
    ("result", {"f1": 51.0}),
]


def isolate(patch: pytest.MonkeyPatch, home: Path) -> None:
    """No account, no server, no home of the user: nothing can be sent anywhere."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "SLURM_"))]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))
    patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path) -> None:
    isolate(monkeypatch, tmp_path)


class Started:
    """`start(tool, ...)` starts trackers on a run folder; `.said` holds what the user is told."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir(folder / "run")
        self.said: list[str] = []
        self.started: list[Trackers] = []

    def __call__(self, *tools: str, **section: object) -> Trackers:
        for tool in tools:
            pytest.importorskip(tool)
        self.run.path.mkdir(exist_ok=True)
        section = Track.model_validate({"tools": tools} | section)
        trackers = start_trackers(section, self.run, "job", CONFIG, self.said.append)
        self.started.append(trackers)
        return trackers

    @property
    def text(self) -> str:
        return "\n".join(self.said)

    def close(self) -> None:
        for trackers in self.started:
            trackers.close()


@pytest.fixture
def start(tmp_path) -> Iterator[Started]:
    started = Started(tmp_path)
    yield started
    started.close()


def log_all(trackers: Trackers) -> None:
    for table, row in ROWS:
        trackers.log(table, row)


def wandb_records(folder: Path) -> list:
    """The records of a .wandb file: protocol buffers in LevelDB's log format (a header of 7 bytes,
    then blocks of 32 KiB holding chunks of checksum, length, kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("offline-run-*/*.wandb")
    raw, place, records, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", raw[place + 4 : place + 7])
        parts += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_history(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of one metric."""
    rows = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for record in wandb_records(folder)
        if record.HasField("history")
    ]
    return [(row["step"], row[name]) for row in rows if name in row]


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Iterator[tuple[Started, int]]:
    """A whole run with all trackers as a SLURM job has it, and how often a server was asked."""
    folder = tmp_path_factory.mktemp("tracked")
    started = Started(folder)
    with pytest.MonkeyPatch.context() as patch, loopback("answers") as server:
        isolate(patch, folder)
        patch.setenv("SLURM_JOB_ID", "17")
        patch.setenv("WANDB_API_KEY", "0" * 40)
        patch.setenv("WANDB_BASE_URL", server.url)
        # More settings than MLflow takes in one call.
        patch.setitem(CONFIG, "many", {f"key{n}": n for n in range(230)})
        tools = ("wandb", "tensorboard", "mlflow")
        trackers = started(*tools, project="products", mlflow_uri=server.url)
        trackers.resume([EARLIER])
        log_all(trackers)
        trackers.close()
        asked = server.requests
    yield started, asked
    started.close()


together = pytest.mark.xdist_group("tracking")  # one such run for all


@together
def test_in_a_slurm_job_nothing_is_sent_unless_asked_for(offline):
    """What is sent where it is asked for: test_after_an_outage_the_run_folder_has_it_all."""
    start, asked = offline
    assert asked == 0
    assert "wandb: offline" in start.text
    assert "mlflow: to look at it: " in start.text


@together
def test_wandb_records_offline(offline):
    start, _ = offline
    assert "wandb: offline; to send it: wandb sync " in start.text
    folder = Path(start.text.split("wandb sync ")[1].splitlines()[0])
    assert folder.is_dir()
    assert folder.is_relative_to(start.run.trackers)
    history = wandb_history(start.run.trackers, "train/loss_nats")
    assert history == [(1, 2.0), (2, 1.0)]
    assert wandb_history(start.run.trackers, "eval/f1_percent") == [(2, 50.0)]
    # What an earlier attempt had logged is in the table of probes, and not on its curve again.
    assert wandb_history(start.run.trackers, "probes/1/score") == [(2, 0.25)]
    (file,) = start.run.trackers.rglob("probes_*.table.json")
    table = json.loads(file.read_text())
    place = table["columns"].index("answer")
    assert [row[place] for row in table["data"]] == ["Bob", "Ann [x]"]
    records = wandb_records(start.run.trackers)
    (begun,) = [r.run for r in records if r.HasField("run")]
    assert (begun.project, begun.display_name) == ("products", "job/run")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["train"]["learning_rate"] == 2e-5
    summary = {i.key: i.value_json for r in records for i in r.summary.update}
    assert summary["f1"] == "51.0"
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


@together
def test_tensorboard_records(offline):
    start, _ = offline
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(start.run.trackers / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss_nats")]
    assert found == [(1, 2.0), (2, 1.0)]
    assert [(e.step, e.value) for e in events.Scalars("train/grad_norm")] == [(2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("probes/1/score")] == [(2, 0.25)]
    assert events.Tensors("probes/1")[0].tensor_proto.string_val == [b"Who? **Ann [x]**"]
    assert b'"learning_rate": 2e-05' in events.Tensors("job")[0].tensor_proto.string_val[0]


@together
def test_mlflow_records_in_the_run_folder(offline, monkeypatch):
    start, _ = offline
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{start.run.trackers / 'mlflow'}")
    place = client.get_experiment_by_name("products").experiment_id
    (run,) = client.search_runs([place])
    assert (run.info.run_name, run.info.status) == ("job/run", "FINISHED")
    assert run.data.params["train.learning_rate"] == "2e-05"
    assert len([key for key in run.data.params if key.startswith("many.")]) == 230
    assert run.data.metrics["result/f1"] == 51.0
    history = client.get_metric_history(run.info.run_id, "train/loss_nats")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0)]
    (file,) = start.run.trackers.rglob("probes.json")
    asked = json.loads(file.read_text())["probes"]
    assert [(row["epoch"], row["answer"]) for row in asked] == [(0, "Bob"), (1, "Ann [x]")]


def test_mlflow_goes_on_with_the_run_of_an_earlier_attempt(start, monkeypatch):
    """In the same place; the second attempt is cut short, and one of its rows is refused."""
    log_all(start("mlflow", project="products"))
    start.close()
    trackers = start("mlflow", project="products")
    trackers.resume([EARLIER])
    trackers.log("train", {"step": 3, "not a name?": 1.0, "loss_nats": 1.0})
    trackers.log("train", {"step": 4, "loss_nats": 0.5})
    trackers.log("probes", PROBE | {"epoch": 2})
    trackers.close(finished=False)
    assert start.text.count("some rows are in the run's tables only") == 1
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{start.run.trackers / 'mlflow'}")
    place = client.get_experiment_by_name("products").experiment_id
    (run,) = client.search_runs([place])
    assert run.info.status == "FAILED"
    history = client.get_metric_history(run.info.run_id, "train/loss_nats")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0), (4, 0.5)]
    # Its table of probes takes the place of the one before, and has the earlier rows too.
    assert len(client.get_metric_history(run.info.run_id, "probes/1/score")) == 2
    (file,) = start.run.trackers.rglob("probes.json")
    asked = json.loads(file.read_text())["probes"]
    assert [(row["epoch"], row["answer"]) for row in asked] == [(0, "Bob"), (2, "Ann [x]")]


def test_without_a_key_wandb_is_kept_in_the_run_folder(start):
    trackers = start("wandb", mode="online")
    log_all(trackers)
    trackers.close()
    assert "wandb: kept in the run folder (No API key configured." in start.text
    assert wandb_history(start.run.trackers, "eval/f1_percent") == [(2, 50.0)]


@pytest.mark.parametrize("tool", ["wandb", "tensorboard", "mlflow"])
def test_a_package_that_is_not_installed_is_a_line(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _: None)
    said: list[str] = []
    run = RunDir(tmp_path)
    trackers = start_trackers(Track(tools=(tool,)), run, "job", CONFIG, said.append)
    log_all(trackers)
    trackers.close()
    (line,) = said
    assert line.startswith(f"{tool}: not installed (pip install ")
    assert not run.trackers.exists()


def test_a_library_that_breaks_when_imported_is_a_line(start, tmp_path, monkeypatch):
    (tmp_path / "broken" / "mlflow").mkdir(parents=True)
    (tmp_path / "broken" / "mlflow" / "__init__.py").write_text("raise OSError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    trackers = start("mlflow")
    log_all(trackers)
    trackers.close()
    assert "mlflow: no such thing; the run goes on without it" in start.text
    assert "mlflow: ended with code 1; see" in start.text


class Server:
    """A server on loopback that is of no use; counts what it is asked."""

    def __init__(self, kind: str) -> None:
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.requests += 1
                self.rfile.read(int(self.headers.get("content-length") or 0))
                if kind == "slow":
                    time.sleep(30)
                with contextlib.suppress(OSError):
                    self.send_response(200 if kind == "answers" else 500)
                    self.send_header("content-length", "2")
                    self.end_headers()
                    self.wfile.write(b"{}")

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@contextlib.contextmanager
def loopback(kind: str) -> Iterator[Server]:
    server = Server(kind)
    yield server
    server.http.shutdown()
    server.http.socket.close()


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@contextlib.contextmanager
def trouble(kind: str) -> Iterator[str]:
    """The address of a server in one kind of trouble."""
    if kind == "refused":
        yield "http://127.0.0.1:9"
    elif kind == "silent":  # takes connections and says nothing, as a firewall may
        with socket.create_server(("127.0.0.1", 0)) as hole:
            yield f"http://127.0.0.1:{hole.getsockname()[1]}"
    else:
        with loopback(kind) as server:
            yield server.url


def family() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.mark.parametrize("kind", [slow("refused"), "silent", slow("broken"), slow("slow")])
def test_an_outage_neither_blocks_nor_outlives_a_run(start, kind, monkeypatch):
    before = family()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with trouble(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        trackers = start("wandb", "mlflow", mlflow_uri=url, wait=0.5, mode="online")
        assert family() - before
        # More than pipe and buffer hold: were a row to wait for its reader, it would be for ever.
        row = {"step": 1, "text": "x" * 4000}
        for _ in range(500):
            trackers.log("train", row)
        # W&B's library starts a process of its own, which is to end as well.
        while len(begun := [process for process in family() if process not in before]) < 3:
            assert len(begun) == 2, start.text
            time.sleep(0.02)
        trackers.close()
    assert not family() - before
    # Killed, which of a grandchild nobody is told.
    assert not psutil.wait_procs(begun, timeout=30)[1]
    assert "does not keep up" in start.text
    assert "rows are in the run's tables only" in start.text
    trackers.log("train", row)  # a late row does no harm


@pytest.mark.parametrize(
    ("wandb", "mlflow"),
    [("silent", "broken"), slow("refused", "silent"), slow("broken", "refused")],
)
def test_after_an_outage_the_run_folder_has_it_all(start, wandb, mlflow, monkeypatch):
    """In a SLURM job that wants its rows sent: the servers are asked, and give nothing."""
    monkeypatch.setattr(tracking, "TRACKER_START_S", 1)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with trouble(wandb) as url, trouble(mlflow) as uri:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        trackers = start("wandb", "mlflow", mlflow_uri=uri, wait=60, mode="online")
        log_all(trackers)
        trackers.close()
    assert "wandb: kept in the run folder (Failed to get resume status for run " in start.text
    assert f"mlflow: kept in the run folder (API request to {uri}/api/" in start.text
    history = wandb_history(start.run.trackers, "train/loss_nats")
    assert history == [(1, 2.0), (2, 1.0)]
    assert [*(start.run.trackers / "mlflow").rglob("loss_nats")]


def test_a_tracker_ends_with_a_run_that_was_killed(tmp_path):
    pytest.importorskip("wandb")
    script = f"""
import os, time
from pathlib import Path
from runner.job.schema import Track
from runner.run.folder import RunDir
from runner.tracking.client import start_trackers
run = RunDir({str(tmp_path / "run")!r})
run.path.mkdir()
trackers = start_trackers(Track(tools=("wandb",), mode="offline"), run, "job", {{}}, print)
while not [*run.trackers.rglob("*.wandb")]:
    trackers.log("train", {{"step": 1, "loss_nats": 1.0}})
    time.sleep(0.1)
print("ready", flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert any(line.startswith("ready") for line in run.stdout)
        children = psutil.Process(run.pid).children(recursive=True)
        assert children
        run.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    records = wandb_records(tmp_path / "run")
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]  # a failed run


def test_a_tracker_that_is_killed_is_a_line(start):
    before = family()
    trackers = start("tensorboard")
    (process,) = family() - before
    process.kill()
    psutil.wait_procs([process], timeout=10)
    for _ in range(3):
        log_all(trackers)
    trackers.close()
    assert [line for line in start.said if "ended with code -9" in line] == start.said


JOB = """
name = "tracked"
[data]
train = "{data}/product_qa_train.json[:8]"
validation = "{data}/product_qa_validation.json[:4]"
max_length = 128
stride = 32
[model]
name = "{model}"
precision = "fp32"
[train]
epochs = 2
batch_size = 4
learning_rate = 1e-3
log_every = 1
[[probe]]
question = "What is the shade made of?"
context = "The shade is washable linen, the base beech."
"""


# Lets a run end only when a tracker has begun, which by then need not be.
ONCE_BEGUN = """
import time
from pathlib import Path
from runner.tracking.client import Trackers
close = Trackers.close
def close_once_begun(self, **options):
    while not [*Path({folder!r}).rglob("events.out.tfevents.*")]:
        time.sleep(0.02)
    close(self, **options)
Trackers.close = close_once_begun
"""


def test_a_run_with_trackers_in_trouble_gives_the_same_weights(zygote, tiny, tmp_path):
    """And the same tables."""
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(data=CHECKOUT / "jobs" / "data", model=tiny("bert")))
    plain, tracked = (RunDir(tmp_path / name) for name in ("plain", "tracked"))
    codes, text = zygote.run(job, "--run-dir", plain.path)
    assert codes == [0], text
    with trouble("silent") as url:
        told = f"track={{tools=['wandb','tensorboard','mlflow'],wait=0.5,mlflow_uri='{url}'}}"
        codes, text = zygote.run(
            *(job, "--run-dir", tracked.path, "--set", told),
            code=ONCE_BEGUN.format(folder=str(tracked.path)),
            WANDB_BASE_URL=url,
            WANDB_API_KEY="0" * 40,
        )
    assert codes == [0], text
    # Weights, answers, scores and every cell of the tables but those that tell of time.
    assert outcome(plain.path) == outcome(tracked.path)
    assert all(len(read_rows(table)) > 1 for table in plain.tables)
    assert "had not sent everything after 0.5 s (track.wait)" in text
    assert not plain.trackers.exists()
    assert [*tracked.trackers.rglob("events.out.tfevents.*")]


def test_nobody_is_told_unless_named(start):
    before = family()
    trackers = start()
    log_all(trackers)
    trackers.close()
    assert not family() - before
    assert not start.said
    assert not start.run.trackers.exists()
