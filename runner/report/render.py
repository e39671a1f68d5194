"""Writes pages as HTML and as Markdown, from the templates beside this module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.report.comparison_page import TESTS_TITLE, comparison_page
from runner.report.line_chart import line_chart
from runner.report.page import (
    Cell,
    Page,
    Paragraph,
    PercentCell,
    Span,
    display_text,
    strip_controls,
)
from runner.report.read import read_run
from runner.report.run_page import run_page, scores_of
from runner.run.folder import RunDir
from runner.run.ownership import check_evaluation, check_ours
from runner.utils.files import Fence, is_there, storage_errors, write_atomic
from runner.utils.tables import CellValue, format_value
from runner.utils.templates import template_environment

if TYPE_CHECKING:
    from jinja2 import Environment

COMPARISON = ("comparison.md", "comparison.html")
_MARKUP = re.compile(r"([\\`*\[\]<>#|~&]|(?<!\w)_|_(?!\w))")


@cache
def _environment() -> Environment:
    from markupsafe import Markup

    environment = template_environment(__file__, autoescape=True)
    environment.tests["percent"] = lambda value: isinstance(value, PercentCell)
    environment.filters |= {
        "kind": lambda block: type(block).__name__,
        "cell": _format_cell,
        "columns": _columns,
        "text": display_text,
        "line_chart": lambda chart, identity: Markup(line_chart(chart, identity)),
        # What is escaped for Markdown must not be escaped for HTML as well.
        "md": lambda text: Markup(escape_markdown(text)),
        "md_paragraph": lambda text: Markup(_paragraph(text)),
        "md_span": lambda span: Markup(_emphasised(span)),
        "verbatim": lambda text: Markup(strip_controls(text).rstrip()),
    }
    return environment


def page_html(page: Page) -> str:
    """The whole page; it is well-formed XML too."""
    return _environment().get_template("report.html.j2").render(page=page)


def page_markdown(page: Page) -> str:
    """The whole page."""
    return _environment().get_template("report.md.j2").render(page=page)


def escape_markdown(text: str) -> str:
    """Text of data as it may stand in a line of Markdown: nothing in it is markup."""
    return _MARKUP.sub(r"\\\1", " ".join(strip_controls(text).split()))


def _paragraph(text: str) -> str:
    # At its begin a dash or a number with a dot would make it a list.
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", escape_markdown(text))


def _emphasised(span: Span) -> str:
    # Emphasis must begin and end with a letter; blanks stay outside.
    text = _MARKUP.sub(r"\\\1", re.sub(r"\s+", " ", strip_controls(span.text)))
    if not span.kind or not text.strip():
        return text
    sign = {"answer": "_", "right": "**", "both": "**_"}[span.kind]
    return text.replace(text.strip(), f"{sign}{text.strip()}{sign[::-1]}")


def _format_cell(value: CellValue, column: str) -> str:
    return f"{value:,}" if isinstance(value, int) else format_value(value, column)


def _columns(rows: Sequence[Mapping[str, Cell]]) -> dict[str, bool]:
    """The columns of a table by name, and whether they hold numbers only."""
    return {
        key: all(isinstance(row[key], int | float | PercentCell | None) for row in rows)
        for key in (rows[0] if rows else ())
    }


def write_report(
    path: str | Path,
    result: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    fence: Fence | None = None,
) -> list[str]:
    """Write report.md and report.html of a run or of an evaluation.

    Args:
        path: its folder.
        result: what result.json is about to hold, for a run that is just ending.
        folder: where to write; None writes into `path`.
        fence: raises if that is no longer ours.

    Returns:
        A few lines for a terminal.

    Raises:
        RunDirError, DataError, StorageError: as `read_run` and `write_atomic`.
    """
    run = read_run(path, result)
    source = RunDir(path)
    target = RunDir(folder) if folder is not None else source
    if target is source and any(map(is_there, (source.report, source.report_page))):
        check = check_evaluation if run.job is None else check_ours
        check(source)  # else a report is a person's own
    _write(run_page(run), target.report, target.report_page, fence)
    if target.path != source.path and source.curves_svg.is_file():
        with storage_errors(source.curves_svg):
            picture = source.curves_svg.read_text(encoding="utf-8", errors="replace")
        write_atomic(target.curves_svg, picture)  # report.md shows it
    line = f"{run.name}: not finished, no score yet"
    if run.result is not None:
        scores = scores_of(run.result).items()
        spelled = ", ".join(f"{name} {s.value:.1f} % [{s.interval()}]" for name, s in scores)
        line = f"{run.name}: {spelled}"
    return [line, f"Written: {target.report_page}", f"         {target.report}"]


def write_comparison(paths: Sequence[str | Path], folder: Path) -> list[str]:
    """Write comparison.md and comparison.html of several runs or evaluations into `folder`.

    Returns:
        What the tests say, and the files' names.

    Raises:
        RunDirError, DataError, StorageError: as `read_run`, `comparison_page`, `write_atomic`.
    """
    page = comparison_page([read_run(path) for path in paths])
    markdown, html = (folder / name for name in COMPARISON)
    _write(page, markdown, html)
    tests = next(section for section in page.sections if section.title == TESTS_TITLE)
    paragraphs = [block.text for block in tests.blocks if isinstance(block, Paragraph)]
    return [*paragraphs[:-1], f"Written: {html}", f"         {markdown}"]


def _write(page: Page, markdown: Path, html: Path, fence: Fence | None = None) -> None:
    with storage_errors(html):
        html.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(markdown, page_markdown(page), fence)
    write_atomic(html, page_html(page), fence)
