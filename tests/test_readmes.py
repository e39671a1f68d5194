"""Every command, link and example of the READMEs is what it says."""

from __future__ import annotations

import csv
import io
import re
import shlex
from pathlib import Path

import pytest

from runner.cli.command import _parse
from runner.data.dataset import load_dataset
from runner.job.load import load_job

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", ".git", "golden", "node_modules"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".soak") for part in path.parts)
)
NAMES = [str(path.relative_to(ROOT)) for path in READMES]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def blocks(text: str, *kinds: str) -> list[str]:
    """The contents of all code blocks of these kinds."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S)
    return [content for kind, content in found if kind in kinds]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_fits_in_the_head():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 150


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one(name):
    """Its verb and options are there; what a command names need not be."""
    text = "\n".join(blocks((ROOT / name).read_text(encoding="utf-8"), "sh", "bash"))
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r" && | \| |; ", re.sub(r"\s#.*", "", line)):
            if not re.match(r"\s*([A-Z_]+=\S* )*(make|spantune) ", part):
                continue
            words = shlex.split(part)
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            words = words[: words.index(">")] if ">" in words else words
            if words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= TARGETS, line
            elif "..." not in words:
                _parse(words[1:])


def test_the_example_of_ones_own_data_is_checked_and_read(tmp_path, tiny):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (rows,) = blocks(text, "csv")
    (job,) = blocks(text, "toml")
    assert [set(row) for row in csv.DictReader(io.StringIO(rows))] == [
        {"context", "question", "answer"}
    ]
    for name in ("train.csv", "validation.csv"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "my.toml").write_text(job)
    loaded = load_job(tmp_path / "my.toml", [f"model.name={tiny('bert')}"])
    assert loaded.name == "my-products"
    data = loaded.data
    assert isinstance(data.train, str)
    (read,) = load_dataset(
        data.train, columns=data.columns, unanswerable=False, on_bad_row="fail"
    ).examples
    assert read.answers == ("washable linen",)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_in_python_is_python(name):
    for block in blocks((ROOT / name).read_text(encoding="utf-8"), "python"):
        compile(block, name, "exec")
