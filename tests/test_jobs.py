"""The committed jobs: each passes check, says what it is, and runs from end to end, made small."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest

from runner.cli.command import main
from runner.job.load import load_job
from runner.run.folder import RunDir
from runner.utils.files import file_sha256
from tests.interruptions import sets

CHECKOUT = Path(__file__).resolve().parents[1]
JOBS = sorted((CHECKOUT / "jobs").glob("*.toml"))
HUB = [path for path in JOBS if path.stem != "quickstart"]
PRODUCTS = CHECKOUT / "jobs" / "data"
HEX = "[0-9a-f]{40}"
# What the notebooks showed, and where a run has it.
EVAL = (
    *("epoch", "step", "train_loss_nats", "train_span_accuracy_percent", "validation_loss_nats"),
    *("exact_match_percent", "f1_percent", "span_accuracy_percent", "train_seconds"),
    *("evaluation_seconds", "examples_per_second"),
)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_check_finds_no_problem(path, capsys, monkeypatch):
    # The weights of the quickstart live in a package that is not installed everywhere.
    monkeypatch.setattr("runner.job.load.package_folder", lambda name: Path("/somewhere"))
    assert main(["check", str(path)]) == 0
    assert f"no problems ({path.stem}: " in capsys.readouterr().out


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)
def test_hub_names_are_whole_and_pinned_to_a_commit(path):
    job = load_job(path)
    assert re.fullmatch(r"[\w-]+/[\w-]+", job.model.name)
    assert re.fullmatch(HEX, job.model.revision or "")
    slices = rf"rajpurkar/squad(_v2)?@{HEX}:(train|validation)(\[-?\d*:-?\d*\])?"
    for name in filter(None, (job.data.train, job.data.validation, job.data.tuning)):
        on_hub = re.fullmatch(slices, name)
        assert on_hub or Path(name).is_relative_to(PRODUCTS)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_header_says_how_to_run_it_how_long_it_takes_and_what_comes_out(path):
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nname = ")]
    assert path.name in header
    assert re.search(r"\d+ minutes|[Tt]ime: ", header)
    assert re.search(r"EM \d|[Ss]core.*: not measured", header)
    table = (CHECKOUT / "jobs" / "README.md").read_text(encoding="utf-8")
    assert f"[`{path.name}`]({path.name})" in table


# What makes a job small: everything else is the job's own.
SMALL = {
    "data.max_length": "128",
    "data.stride": "32",
    "train.batch_size": "8",
    "train.micro_batch_size": "4",
    "train.log_every": "1",
    "expect.tolerance": "100",
    "track.mode": "offline",
}
ONLY_WHERE_DECLARED = ("expect", "track")


def weights(path: Path, tiny) -> dict[str, str]:
    """Overrides that give the job a tiny model of the family it names."""
    folder = tiny("distilbert" if "distilbert" in path.stem else "bert")
    overrides = {"model.name": str(folder)}
    if path not in HUB:  # the quickstart declares the hash of its weights
        overrides["model.sha256"] = file_sha256(folder / "model.safetensors")
    return overrides


def small(path: Path, tiny, questions: Path | None) -> list[str]:
    """Options that make the job small."""
    given = weights(path, tiny)
    job = load_job(path, [f"{key}={value}" for key, value in given.items()])
    overrides = {**given, **SMALL}
    train, validation = PRODUCTS / "product_qa_train.json", PRODUCTS / "product_qa_validation.json"
    cuts = "[:8]", "[:4]"
    if questions and job.data.unanswerable:
        train = validation = questions / "squad_v2_dev_half.json"
        cuts = "[:8]", "[-4:]"
    elif questions and "squad" in path.stem:
        train = questions / "squadshifts_new_wiki_v1.0.json"
        validation = questions / "xquad_en_v1.1.json"
    overrides |= {"data.train": f"{train}{cuts[0]}", "data.validation": f"{validation}{cuts[1]}"}
    if job.data.tuning:
        overrides["data.tuning"] = f"{train}[8:12]"
    if job.data.sample:
        overrides |= {"data.sample": "6", "data.validation_sample": "3"}
    if job.train.epochs > 3:
        # Probes are asked after every epoch, also where the second and third alone are evaluated.
        overrides |= {"train.epochs": "3", "train.eval_every": "2"}
    declared = job.model_dump(exclude_unset=True)
    return sets(
        *(
            f"{key}={value}"
            for key, value in overrides.items()
            if key.split(".")[0] in declared or key.split(".")[0] not in ONLY_WHERE_DECLARED
        )
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# One process looks at all that these runs export, and those of test_train's families.
together = pytest.mark.xdist_group("verified")


@pytest.fixture(scope="module")
def runs(zygote, tiny, tmp_path_factory) -> dict[str, RunDir]:
    """All jobs, made small, run one after another; on real questions where there are some."""
    beside = CHECKOUT.parent / "shared" / "data"
    questions: Path | None = Path(os.environ.get("SPANTUNE_TEST_DATA", beside))
    if not questions.is_dir():
        questions = None
    folder = tmp_path_factory.mktemp("jobs")
    found = {path.stem: RunDir(folder / path.stem) for path in JOBS}
    said = []
    for path in JOBS:
        options = ("--run-dir", found[path.stem].path, *small(path, tiny, questions))
        codes, text = zygote.run(path, *options, whole=True, HOME=str(folder))
        assert codes == [0], text
        said.append(text)
    (folder / "said.txt").write_text("".join(said), encoding="utf-8")
    return found


@together
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_made_small_runs_from_end_to_end(runs, path, tiny):
    run = runs[path.stem]
    job = load_job(path, [f"{key}={value}" for key, value in weights(path, tiny).items()])
    result = json.loads(run.result.read_text())
    evals = rows(run.eval_table)
    assert set(EVAL) <= set(evals[0])
    epochs = min(job.train.epochs, 3)
    evaluated = [2, 3] if job.train.epochs > 3 else [*range(1, epochs + 1)]
    assert [int(row["epoch"]) for row in evals] == evaluated
    assert all(row[name] for row in evals for name in EVAL)
    # Every probe before training and after each epoch, its answer a piece of its text.
    probes = rows(run.probe_table)
    asked = [(row["epoch"], row["probe"]) for row in probes]
    numbers = range(1, len(job.probe) + 1)
    assert asked == [(str(e), str(n)) for e in range(epochs + 1) for n in numbers]
    for row in probes:
        context = job.probe[int(row["probe"]) - 1].context
        assert context[int(row["start_character"]) : int(row["end_character"])] == row["answer"]
        assert float(row["score"]) >= 0
    assert run.curves_png.stat().st_size > 10_000
    assert "optimiser step" in run.curves_svg.read_text(encoding="utf-8")
    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert ("\nlicense: apache-2.0\n" in card) is (path in HUB)
    assert ("drawn with the seed:" in card) is (job.data.validation_sample is not None)
    assert ("best_f1" in result["metrics"]) is job.data.unanswerable
    assert (", tuned on 4 questions of" in card) is (job.data.tuning is not None)
    record = json.loads(run.provenance.read_text())
    assert record["zero_stage"] == job.zero.stage
    wanted = {"auto": record["precision"]}.get(job.model.precision, job.model.precision)
    assert record["precision"] == wanted


@together
def test_frozen_parts_of_the_product_job_do_not_move(runs, tiny):
    from safetensors.torch import load_file

    before = load_file(tiny("bert") / "model.safetensors")
    after = load_file(runs["bert_product_qa"].model / "model.safetensors")
    moved = {n for n in before if not before[n].to(after[n].dtype).equal(after[n])}
    assert moved == {"qa_outputs.weight", "qa_outputs.bias"}  # of 2 layers, 0-5 are all


@together
def test_the_squad_job_is_followed_by_wandb_as_it_says(runs):
    pytest.importorskip("wandb")
    assert [*runs["distilbert_squad"].trackers.rglob("*.wandb")]
    assert not [
        run for name, run in runs.items() if name != "distilbert_squad" and run.trackers.exists()
    ]


@together
def test_the_v2_job_trains_on_the_questions_that_the_seed_draws(runs):
    record = json.loads(runs["distilbert_squad_v2"].provenance.read_text())
    assert len({part["sha256"] for part in record["data"].values()}) == 2
    assert "train: 6 questions" in runs["distilbert_squad_v2"].log.read_text()


def test_the_job_for_two_nodes_is_a_batch_script_for_two_nodes(capsys, fake_slurm):
    calls = fake_slurm()
    path = CHECKOUT / "jobs" / "bert_large_squad_v2.toml"
    assert main(["submit", str(path), "--dry-run"]) == 0
    script = capsys.readouterr().out
    for option in ("nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "time=4:00:00", "requeue"):
        assert f"\n#SBATCH --{option}\n" in script
    assert "scontrol show node" in script  # where the ranks of both nodes meet
    assert script.endswith('\nexit "$code"\n')
    assert not calls.read_text()


@together
def test_every_table_of_a_run_fits_a_terminal(runs):
    said = (runs["bert_squad"].path.parent / "said.txt").read_text(encoding="utf-8")
    tables = [line for line in said.splitlines() if "─" in line or re.match(r" +\d+ +\d", line)]
    assert len(tables) > 10
    assert not [line for line in tables if len(line) > 80]
    assert re.search(r" +train +train +valid\. +valid\. +EM % +F1 % +time *\n", said)
    half = r"[\d.]+ ±[\d.]+"  # of each interval
    head = r"\n +epoch .*±95 % CI +±95 % CI .*\n[ ─]+\n"
    assert len(re.findall(rf"{head} +\d .* {half} +{half} +\d+ ", said)) >= len(JOBS)
