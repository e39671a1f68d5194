"""What happens when an epoch ends, scored or not: curves, probes, and both after a resume."""

from __future__ import annotations

import csv
from pathlib import Path

from runner.run.folder import RunDir
from runner.utils.tables import read_rows
from tests.interruptions import CONTEXT, MAY_ANSWER_NOTHING, STOP

JOB = (
    """
name = "ends"
[data]
train = "{data}[:24]"
tuning = "{data}[24:36]"
validation = "{data}[36:]"
"""
    + MAY_ANSWER_NOTHING
    + """[train]
epochs = 4
eval_every = 2
batch_size = 8
learning_rate = 1e-3
[[probe]]
question = "How long does the battery last?"
context = "{context}"
"""
)
# Tells of each question to the probes, each picture, and each row that trackers are reminded of.
SPY = """
import hashlib
import runner.report.plots, runner.train.trainer, runner.tracking.client
from runner.utils.tables import read_rows
read = runner.train.trainer.predict_windows
draw, log = runner.report.plots.draw_curves, runner.tracking.client.Trackers.log
def read_windows(*arguments, **options):
    if "step" not in options:
        print("SPY probes", repr(float(arguments[3].null_threshold)))
    return read(*arguments, **options)
def draw_curves(run, *rest):
    draw(run, *rest)
    digest = hashlib.sha256(run.curves_svg.read_bytes()).hexdigest()
    print("SPY curves", read_rows(run.train_table)[-1]["epoch"], digest)
def tell(self, table, row):
    if table == "earlier_probes":
        print("SPY earlier", row["epoch"])
    log(self, table, row)
runner.train.trainer.predict_windows = read_windows
runner.train.run_log.draw_curves = draw_curves
runner.tracking.client.Trackers.log = tell
"""


def write_questions(path: Path) -> None:
    rows = [
        {
            "id": f"q{n}",
            "question": f"How long is it, question {n}?",
            "context": CONTEXT,
            "answer": "" if n % 2 else "nine hours",
            "answer_start": "" if n % 2 else CONTEXT.find("nine hours"),
        }
        for n in range(44)
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_every_epoch_has_its_curves_and_asks_its_probes_at_the_threshold_in_use(
    zygote, tiny, tmp_path
):
    """Of 4 epochs with 3 steps each, 2 and 4 are scored; the run is stopped in 3 and goes on."""
    write_questions(tmp_path / "data.csv")
    job, run = tmp_path / "job.toml", RunDir(tmp_path / "run")
    job.write_text(JOB.format(data=tmp_path / "data.csv", model=tiny("bert"), context=CONTEXT))
    spied: list[list[str]] = []
    for code, ends in ((STOP.format(step=7, rank=0), [75]), ("", [0])):
        codes, text = zygote.run(job, "--run-dir", run.path, code=SPY + code)
        assert codes == ends, text
        spied += [line.split()[1:] for line in text.splitlines() if line.startswith("SPY ")]
    second, fourth = (row["null_threshold_logits"] for row in read_rows(run.eval_table))
    assert second != "3.0", "tuning must find another threshold than the job's"
    thresholds = [rest[0] for kind, *rest in spied if kind == "probes"]
    assert thresholds == ["3.0", "3.0", second, second, fourth]
    pictures = [rest for kind, *rest in spied if kind == "curves"]
    assert [float(epoch) for epoch, _ in pictures] == [1, 2, 3, 4]
    assert len({digest for _, digest in pictures}) == 4
    assert [rest for kind, *rest in spied if kind == "earlier"] == [["0"], ["1"], ["2"]]
