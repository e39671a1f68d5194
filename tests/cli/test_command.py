"""The command as it is used: exit codes, what goes to stdout, what to stderr."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runner import __version__, errors
from runner.cli import command as cli
from runner.cli import run
from runner.errors import JobError, RunnerError
from runner.run import launch
from runner.run.folder import RunDir
from runner.run.lease import Lease

ROOT = Path(__file__).parents[2]
JOB = """\
name = "n"
data = {train = "o/n", validation = "o/n"}
model = {name = "o/n"}
train = {epochs = 1, batch_size = 8, learning_rate = 1e-4}
"""
WRONG = JOB.replace("epochs = 1", "epoch = 1").replace('"n"', "5", 1)
PROBLEMS = [
    "job.toml:1: name: expected a string in quotes, found 5",
    "job.toml:4: train.epoch: unknown key; did you mean epochs?",
]
VERBS = (
    "init",
    "check",
    "run",
    "predict",
    "evaluate",
    "report",
    "reproduce",
    "prune",
    "submit",
    "status",
)
VERBS += ("logs", "cancel", "schema")
CODES = {
    "JobError": 64,
    "DataError": 65,
    "AssetError": 69,
    "MachineError": 71,
    "SlurmError": 72,
    "RunDirError": 73,
    "StorageError": 74,
    "Interrupted": 75,
    "DivergedError": 76,
    "ExpectationError": 78,
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Run each test alone, in an empty folder with one good job."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PYTHON")) or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("job.toml").write_text(JOB)


def spantune(*arguments: str, script: str = "-m runner", **variables: str):
    """Run the command as a process of its own; return its exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *script.split(), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def called(capsys, *arguments: str) -> tuple[int, str, str]:
    """The same of a call in this process, which takes no time to start."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:  # by argparse
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


# ---- processes


def test_a_start_that_fails_leaves_word_of_it():
    """A model that is nowhere is found missing before any library is loaded."""
    code, out, err = spantune("run", "job.toml", "--run-dir", "runs/mine", HF_HUB_OFFLINE="1")
    assert (code, out) == (69, "n: starting 1 rank\n")
    words = err.removesuffix("\n")
    assert words.startswith("not in the cache")
    run = Path("runs/mine")
    assert json.loads((run / "attempts/0001.end.json").read_text())["message"] == words
    assert (run / "log.txt").read_text()[9:] == err
    code, out, err = spantune("logs", str(run))
    assert (code, out[9:], err) == (0, f"{words}\n", "")
    code, out, err = spantune("status")
    assert "mine" in out
    assert "failed (69)" in out
    assert " ".join(out.split()).endswith(words)


def test_a_start_that_is_refused_says_nothing_in_the_log_of_the_one_that_runs():
    run = RunDir("runs/mine")
    run.path.mkdir(parents=True)
    lease = Lease.acquire(run)
    run.log.write_text("it runs\n")
    code, _, err = spantune("rank", "job.toml", "--run-dir", str(run.path))
    assert code == 73
    assert "is being run by" in err
    assert run.log.read_text() == "it runs\n"
    assert not (run.attempts / "0001.end.json").exists()
    lease.release(0)


def test_a_good_job():
    code, out, err = spantune("check", "job.toml")
    assert (code, err) == (0, "")
    assert out == "job.toml: no problems (n: o/n on o/n)\n"


def test_every_trial_of_a_sweep_is_checked(capsys):
    Path("job.toml").write_text(f"{JOB}[sweep]\nover = {{train.epochs = [1, 2]}}\n")
    code, out, err = called(capsys, "check", "job.toml")
    assert (code, err) == (0, "")
    assert out == "job.toml: no problems (n: o/n on o/n, 2 trials)\n"
    Path("job.toml").write_text(f"{JOB}[sweep]\nover = {{train.epochs = [1, 0]}}\n")
    code, out, err = called(capsys, "check", "job.toml")
    assert (code, out) == (64, "")
    assert err == "job.toml:6: sweep.over.train.epochs.2: must be at least 1, found 0\n"


@pytest.mark.parametrize("verb", [["check"], ["run"], ["rank"], []])
def test_a_wrong_job_is_a_line_a_problem_and_64(verb):
    Path("job.toml").write_text(WRONG)
    code, out, err = spantune(*verb, "job.toml")
    assert (code, out) == (64, "")
    assert err.splitlines() == PROBLEMS


def test_deepspeed_starts_the_same_command(tmp_path):
    # Another package of our name must not come before the checkout's own.
    (tmp_path / "runner").mkdir()
    (tmp_path / "runner" / "__init__.py").write_text("raise RuntimeError('not this one')")
    main = str(ROOT / "runner" / "main.py")
    Path("job.toml").write_text(WRONG)
    assert spantune("check", "job.toml", script=main, PYTHONPATH=str(tmp_path)) == (
        64,
        "",
        "\n".join([*PROBLEMS, ""]),
    )


@pytest.mark.parametrize("verb", [[], ["check"]])
@pytest.mark.parametrize(("rank", "lines"), [("0", PROBLEMS), ("1", [])])
def test_rank_0_speaks_for_all(rank, lines, verb):
    Path("job.toml").write_text(WRONG)
    code, out, err = spantune("--local_rank=0", *verb, "job.toml", RANK=rank, WORLD_SIZE="2")
    assert (code, out) == (64, "")
    assert err.splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--set", "name=7"], 0, ""),
        (["--set", "train.epochs=0"], 64, "--set: train.epochs: must be at least 1, found 0"),
        (["--set", "seed"], 64, "--set seed: write it as section.key=value"),
    ],
)
def test_overrides(capsys, arguments, code, problem):
    found, out, err = called(capsys, "check", "job.toml", *arguments)
    assert found == code
    assert err.startswith(problem)
    assert bool(err) is bool(problem)
    assert ("no problems (7: " in out) is not bool(problem)


def test_line_100_is_a_line(capsys):
    Path("job.toml").write_text(JOB + "\n" * 95 + "nmae = 1\n")
    assert called(capsys, "check", "job.toml")[2] == (
        "job.toml:100: nmae: unknown key; did you mean name?\n"
    )


@pytest.mark.parametrize("verb", [[], *([v] for v in VERBS)])
def test_help_fits_80_columns(capsys, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = called(capsys, *verb, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith("usage: spantune ")
    if not verb:
        assert all(f" {number} " in " ".join(out.split()) for number in (0, 2, *CODES.values(), 70))


def test_version():
    assert spantune("--version") == (0, f"spantune {__version__}\n", "")


def test_the_schema_is_written_as_it_is_committed():
    committed = (ROOT / "jobs" / "job.schema.json").read_text(encoding="utf-8")
    assert spantune("schema") == (0, committed, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runs"], "the following arguments are required: VERB"),
        (["check"], "the following arguments are required: JOB.toml"),
        (["chekc", "job.toml"], "no verb chekc; did you mean check?"),
        (["check", "job.toml", "--ranks", "0"], "must be a whole number of at least 1, not '0'"),
        (["check", "job.toml", "--ranks", "two"], "must be a whole number of at least 1, not"),
        (["check", "job.toml", "--gpu"], "unrecognized arguments: --gpu"),
    ],
)
def test_a_wrong_command_line_is_2(capsys, arguments, words):
    code, out, err = called(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_names_that_a_terminal_cannot_spell():
    name = os.fsdecode("n\u00e4me\u4e2d".encode() + b"\xff.toml")
    Path(name).write_text(JOB)
    code, out, err = spantune("check", name, PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "")
    assert out.startswith("n\\xe4me\\u4e2d\\udcff.toml: no problems")
    Path(name).write_text(WRONG)
    code, out, err = spantune("check", name, PYTHONIOENCODING="ascii")
    assert (code, out) == (64, "")
    assert err.count("\n") == 2


def test_a_reader_who_has_seen_enough():
    command = f"{sys.executable} -m runner schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)
    assert done.stdout == b"{"
    assert done.stderr == b""
    assert done.returncode in (0, 141)  # 0 where the pipe takes all before `head` has gone


def test_a_closed_pipe_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "runner", "schema"], stdout=write, stderr=-1, timeout=60, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def codes_without_a_rank(capsys) -> list[int]:
    """Exit codes of verbs that need no rank."""
    verbs = (["check"], ["submit", "--dry-run"])
    commands = [["schema"], ["status"], *([*verb, "job.toml"] for verb in verbs)]
    return [called(capsys, *command)[0] for command in commands]


def test_a_full_disk_below_stdout_is_named():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "runner", "schema"],
            stdout=full, stderr=-1, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr.decode()) == (
        74,
        "standard output: No space left on device; free some space where it goes, or send it"
        " elsewhere\n",
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("check none.toml 2>/dev/full", 64),
        ("check none.toml 2>&-", 64),
        ("check job.toml >&-", 0),
        ("--version >/dev/full", 74),
        ("predict none <&-", 74),
    ],
)
def test_streams_that_are_full_or_closed_change_no_code(command, code):
    shell = ["bash", "-c", f"{sys.executable} -m runner {command}"]
    done = subprocess.run(shell, capture_output=True, timeout=60, check=False)
    assert done.returncode == code
    assert done.stderr.count(b"\n") == ("2>" not in command and code != 0)


@pytest.mark.parametrize(
    "command",
    [
        "status LONG",
        "status --runs LONG",
        "run job.toml --run-dir LONG",
        "report LONG",
        "reproduce LONG",
        "logs LONG",
        "cancel LONG",
    ],
)
@pytest.mark.parametrize("name", ["a" * 300, "a/" * 2500], ids=["name", "path"])
def test_a_name_that_is_too_long_is_told(capsys, command, name):
    code, out, err = called(capsys, *command.replace("LONG", name).split())
    assert (code, out) == (74, "")
    assert err.endswith(": File name too long\n")
    assert err.count("\n") == 1


def test_only_what_trains_needs_a_rank(capsys, monkeypatch):
    monkeypatch.setenv("SPANTUNE_SLURM", "")
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = called(capsys, "rank", "job.toml")
    assert (code, out) == (71, "")
    assert err.startswith("the launcher's variables")
    assert err.count("\n") == 1
    assert codes_without_a_rank(capsys) == [0, 0, 0, 0]
    Path("job.toml").write_text(WRONG)
    assert called(capsys, "check", "job.toml") == (64, "", "\n".join([*PROBLEMS, ""]))


def test_every_verb_answers_in_the_shell_of_salloc(capsys, monkeypatch):
    # A step of its own, one process; no SLURM_NTASKS unless -n was given.
    monkeypatch.setenv("SPANTUNE_SLURM", "")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_STEP_ID", "4294967290")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert codes_without_a_rank(capsys) == [0, 0, 0, 0]
    assert called(capsys, "predict", "x", "--question", "a")[0] == 2


def test_a_wrong_command_line_is_the_code_of_the_process():
    code, out, err = spantune("chekc", "job.toml")
    assert (code, out) == (2, "")
    assert "did you mean check?" in err


@pytest.mark.parametrize(
    ("verb", "text", "code"),
    [
        ("check", JOB, 0),
        ("check", WRONG, 64),
        ("schema", JOB, 0),
        ("run", JOB, 0),
        ("--help", JOB, 0),
    ],
)
def test_the_desk_loads_no_heavy_library(verb, text, code):
    """It answers within a third of a second, since it does with a few hundred modules."""
    Path("job.toml").write_text(text)
    script = (
        "import sys, runner.run.launch\n"
        "runner.run.launch.launch = lambda *_: 0\n"
        "from runner.cli.command import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'evaluate', 'numpy'}\n"
        "print(heavy & set(sys.modules) or len(sys.modules))\n"
        "sys.exit(code)\n"
    )
    arguments = [verb] if verb in ("--help", "schema") else [verb, "job.toml"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (2 if code else 0)
    assert 100 < int(done.stdout.splitlines()[-1]) < 600


# ---- in this process


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_every_error_of_a_run_is_its_sentence_and_its_code(monkeypatch, capsys, name, code):
    kind = getattr(errors, name)
    error = kind(["a: b [c]"]) if kind is JobError else kind("a: b [c]")

    def fail(*_):
        raise error

    monkeypatch.setattr("runner.cli.run.load_job", fail)
    assert cli.main(["check", "job.toml"]) == code
    assert capsys.readouterr() == ("", "a: b [c]\n")


def test_every_kind_of_error_has_a_code_of_its_own():
    kinds = {kind.__name__: kind.exit_code for kind in RunnerError.__subclasses__()}
    assert kinds == CODES
    assert RunnerError.exit_code == 70


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            ZeroDivisionError("x"),
            70,
            ("Traceback", "ZeroDivisionError: x", "a mistake in spantune"),
        ),
        (KeyboardInterrupt(), 130, ()),
    ],
)
def test_what_is_no_error_of_a_run(monkeypatch, capsys, error, code, words):
    def fail(*_):
        raise error

    monkeypatch.setattr("runner.cli.run.load_job", fail)
    assert cli.main(["check", "job.toml"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in words)
    assert bool(err) is bool(words)


@pytest.mark.parametrize(
    ("arguments", "passed", "ranks"),
    [
        (["job.toml"], ["rank", "job.toml", "--runs", "runs"], None),
        (["run", "job.toml"], ["rank", "job.toml", "--runs", "runs"], None),
        (
            [
                *("job.toml", "--set", "seed=1", "--set", "model.revision=a b", "--runs", "r"),
                *("--run-dir", "d", "--threads", "3", "--ranks", "2"),
            ],
            [
                *(
                    "rank",
                    "job.toml",
                    "--set",
                    "seed=1",
                    "--set",
                    "model.revision=a b",
                    "--runs",
                    "r",
                ),
                *("--run-dir", "d", "--threads", "3"),
            ],
            2,
        ),
    ],
)
def test_what_a_run_starts(monkeypatch, arguments, passed, ranks):
    started = []
    monkeypatch.setattr(launch, "launch", lambda *given: started.append(given) or 65)
    assert cli.main(arguments) == 65
    assert started == [(passed, ranks)]


def test_a_job_may_have_any_name(monkeypatch):
    Path("my job").write_text(JOB)
    started = []
    monkeypatch.setattr(launch, "launch", lambda *given: started.append(given) or 0)
    assert cli.main(["run", "my job"]) == 0
    # the rank's command must not take it for a verb
    assert started[0][0][:2] == ["rank", "my job"]


SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("variables", "verb"),
    [
        ({}, "run_run"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "run_rank"),
        ({**SRUN, "SLURM_NTASKS": "2"}, "run_rank"),  # srun has started every rank already
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "run_run"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "run_run"),  # the batch script itself
        # the shell of salloc -n 2: nobody has started another rank
        ({**SRUN, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967290"}, "run_run"),
    ],
)
def test_a_bare_job_is_a_run_or_one_rank_of_it(monkeypatch, variables, verb):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    called = []
    for name in ("run_run", "run_rank"):
        monkeypatch.setattr(run, name, lambda _, name=name: called.append(name) or 0)
    assert cli.main(["--local_rank=0", "job.toml"]) == 0
    assert called == [verb]


def test_the_help_tells_every_verb_that_people_use(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    verbs = re.findall(r"^    (\w+)(?: {2,}|$)", capsys.readouterr().out, re.MULTILINE)
    assert verbs == list(VERBS)


def test_the_bare_command_is_its_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    assert "exit codes: 0 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        *(("train", "run"), ("trian", "run"), ("chekc", "check"), ("eval", "evaluate")),
        *(("squeue", "status"), ("clean", "prune"), ("ask", "predict"), ("help", "--help")),
    ],
)
def test_a_word_that_is_no_verb_leads_to_the_verb(word, verb, capsys):
    assert cli.main([word, "x.toml"]) == 2
    assert f"no verb {word}; did you mean {verb}" in capsys.readouterr().err


def test_what_looks_like_nothing_is_answered_by_what_there_is(tmp_path, capsys):
    assert cli.main(["qqqq"]) == 2
    said = capsys.readouterr().err
    assert "there are init, check, run" in said
    assert "may-requeue" not in said
    (tmp_path / "job.yaml").touch()
    assert cli.main([str(tmp_path / "job.yaml")]) == 2
    assert "ends in .toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ("[expect]\nf1 = 0.8\n", "expect.f1 = 0.8 means 0.8 percent; for a share of 0.8 write 80"),
        ("[expect]\nf1 = 80.0\n", None),
        ("[expect]\nloss = 0.8\n", None),
        ('[slurm]\nmem = "64"\n', 'slurm.mem = "64" means 64 MB to SLURM; for GB write "64G"'),
        ('[slurm]\nmem = "64G"\n', None),
        ('[slurm]\nmem = "0"\n', None),
    ],
)
def test_what_is_hardly_meant_gets_a_word(extra, word, tmp_path, capsys):
    path = tmp_path / "job.toml"
    path.write_text(JOB + extra)
    assert cli.main(["check", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == ([f"note: {word}"] if word else [])
