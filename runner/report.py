"""Writes the page of one run, or of several side by side, as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.comparison_report import comparison_page
from runner.page import Page
from runner.page_html import page_html
from runner.page_markdown import page_markdown
from runner.report_data import Scored, read_scored
from runner.run_report import run_page
from runner.rundir import RunDir, storage_errors, write_atomic

COMPARISON = ("comparison.md", "comparison.html")


def write_report(path: str | Path, result: Mapping[str, Any] | None = None) -> Scored:
    """Write report.md and report.html into the folder of a run or of an evaluation.

    Args:
        path: the folder.
        result: what result.json is about to hold, for a run that is just ending.

    Raises:
        RunDirError, DataError, StorageError: as `read_scored` and `write_atomic`.
    """
    scored = read_scored(path, result)
    run, page = RunDir(path), run_page(scored)
    _write(page, run.report, run.report_page)
    return scored


def write_comparison(paths: Sequence[str | Path], folder: Path) -> Page:
    """Write comparison.md and comparison.html into `folder`; return the page.

    Raises:
        RunDirError, DataError, StorageError: as `read_scored`, `comparison_page`, `write_atomic`.
    """
    page = comparison_page([read_scored(path) for path in paths])
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write(page, *(folder / name for name in COMPARISON))
    return page


def _write(page: Page, markdown: Path, html: Path) -> None:
    write_atomic(markdown, page_markdown(page))
    write_atomic(html, page_html(page))
