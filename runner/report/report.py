"""Writes the page of one run, or of several side by side, as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.report.comparison_page import NOISE, comparison_page
from runner.report.page import Page, Paragraph
from runner.report.page_markdown import page_markdown
from runner.report.read import read_scored
from runner.report.render import page_html
from runner.report.run_page import run_page, scores_of
from runner.run.folder import RunDir, storage_errors, write_atomic

COMPARISON = ("comparison.md", "comparison.html")


def write_report(
    path: str | Path, result: Mapping[str, Any] | None = None, folder: Path | None = None
) -> list[str]:
    """Write report.md and report.html of a run or of an evaluation.

    Args:
        path: its folder.
        result: what result.json is about to hold, for a run that is just ending.
        folder: where to write; None writes into `path`.

    Returns:
        A few lines for a terminal.

    Raises:
        RunDirError, DataError, StorageError: as `read_scored` and `write_atomic`.
    """
    scored = read_scored(path, result)
    own = RunDir(path)
    run = RunDir(folder) if folder is not None else own
    _write(run_page(scored), run.report, run.report_page)
    if run.path != own.path and own.curves_svg.is_file():  # report.md shows the picture beside it
        with storage_errors(own.curves_svg):
            picture = own.curves_svg.read_text(encoding="utf-8", errors="replace")
        write_atomic(run.curves_svg, picture)
    lines = [f"{scored.name}: not finished, no score yet"]
    if scored.result is not None:
        scores = scores_of(scored.result)
        told = ", ".join(f"{n} {p.value:.1f} % [{p.interval()}]" for n, p in scores.items())
        lines = [f"{scored.name}: {told}"]
    return [*lines, f"Written: {run.report_page}", f"         {run.report}"]


def write_comparison(paths: Sequence[str | Path], folder: Path) -> list[str]:
    """Write comparison.md and comparison.html of several runs or evaluations into `folder`.

    Returns:
        The verdicts and the files' names.

    Raises:
        RunDirError, DataError, StorageError: as `read_scored`, `comparison_page`, `write_atomic`.
    """
    page = comparison_page([read_scored(path) for path in paths])
    markdown, html = (folder / name for name in COMPARISON)
    _write(page, markdown, html)
    verdicts = next(section for section in page.sections if section.title == NOISE)
    said = [block.text for block in verdicts.blocks if isinstance(block, Paragraph)]
    return [*said[:-1], f"Written: {html}", f"         {markdown}"]


def _write(page: Page, markdown: Path, html: Path) -> None:
    with storage_errors(html):
        html.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(markdown, page_markdown(page))
    write_atomic(html, page_html(page))
