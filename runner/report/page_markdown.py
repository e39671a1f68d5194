"""Writes a page as Markdown that GitHub and a terminal show well."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from runner.report.page import (
    Cell,
    Charts,
    Code,
    Headline,
    Miss,
    Misses,
    Page,
    Paragraph,
    PercentCell,
    Span,
    Table,
    strip_controls,
)
from runner.utils.tables import format_value

_MARKUP = re.compile(r"([\\`*\[\]<>#|~&]|(?<!\w)_|_(?!\w))")


def page_markdown(page: Page) -> str:
    """The whole page."""
    parts = [f"# {inline(page.title)}", _paragraph(page.lead)]
    if page.facts:
        parts.append("\n".join(f"- {inline(k)}: {inline(v)}" for k, v in page.facts.items()))
    for section in page.sections:
        written = [part for block in section.blocks for part in _block(block)]
        if written:
            parts += [f"## {inline(section.title)}", *written]
    return "\n\n".join(part.rstrip() for part in parts if part.strip()) + "\n"


def inline(text: str) -> str:
    """Text of data as it may stand in a line of Markdown: nothing in it is markup."""
    return _MARKUP.sub(r"\\\1", " ".join(strip_controls(text).split()))


def _paragraph(text: str) -> str:
    # At its begin a dash or a number with a dot would make it a list.
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", inline(text))


def table_markdown(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Rows as a Markdown table: numbers to the right, a score's interval in brackets behind it."""
    keys = list(rows[0]) if rows else []
    right = {
        key: all(isinstance(row[key], int | float | PercentCell | None) for row in rows)
        for key in keys
    }
    lines = ["| " + " | ".join(map(inline, keys)) + " |"]
    lines.append("|" + "|".join("---:" if right[key] else "---" for key in keys) + "|")
    lines += ["| " + " | ".join(_cell(row[key], key) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def _cell(cell: Cell, column: str) -> str:
    if isinstance(cell, PercentCell):
        return f"{cell.value:.1f}" + (f" ({cell.interval()})" if cell.interval() else "")
    return f"{cell:,}" if isinstance(cell, int) else inline(format_value(cell, column))


def _block(block: object) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield _paragraph(block.text)
    elif isinstance(block, Headline):
        yield table_markdown([{"score": name, "%": score} for name, score in block.scores.items()])
    elif isinstance(block, Table):
        yield f"**{inline(block.caption)}**"
        yield table_markdown(block.rows)
    elif isinstance(block, Charts):
        if block.picture is not None:
            yield f"![curves]({block.picture})"
    elif isinstance(block, Misses):
        yield "\n".join(_miss(miss) for miss in block.misses)
    elif isinstance(block, Code):
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", block.text))])
        yield f"{_paragraph(block.title)}:"
        yield f"{fence}{block.language}\n{strip_controls(block.text).rstrip()}\n{fence}"


def _miss(miss: Miss) -> str:
    lines = [f"- **{inline(miss.question)}** ({inline(miss.facts)})"]
    lines += [
        f"  - {inline(name)}: {inline(answer) or '(no answer)'}"
        for name, answer in miss.answers.items()
    ]
    right = " / ".join(inline(text) for text in miss.right) or "(there is no answer)"
    lines.append(f"  - right: {right}")
    for excerpt in miss.excerpts:
        lines.append(f"  - {''.join(_marked(span) for span in excerpt)}")
    return "\n".join(lines)


def _marked(span: Span) -> str:
    # Emphasis must begin and end with a letter; blanks stay outside.
    text = _MARKUP.sub(r"\\\1", re.sub(r"\s+", " ", strip_controls(span.text)))
    if not span.kind or not text.strip():
        return text
    core = text.strip()
    left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    sign = {"answer": "_", "right": "**", "both": "**_"}[span.kind]
    return f"{left}{sign}{core}{sign[::-1]}{right}"
