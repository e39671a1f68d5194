"""Writes a page as Markdown that GitHub and a terminal show well."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from runner.page import Charts, Code, Headline, Miss, Misses, Page, Paragraph, Percent, Span, Table
from runner.tables import Value, markdown


def page_markdown(page: Page) -> str:
    """The whole page."""
    parts = [f"# {inline(page.title)}", inline(page.lead)]
    if page.facts:
        parts.append("\n".join(f"- {inline(k)}: {inline(v)}" for k, v in page.facts.items()))
    for section in page.sections:
        parts.append(f"## {inline(section.title)}")
        for block in section.blocks:
            parts += _block(block)
    return "\n\n".join(part.rstrip() for part in parts if part.strip()) + "\n"


def inline(text: str) -> str:
    """Text of data as it may stand in a line of Markdown: nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>#|~!])", r"\\\1", " ".join(text.split()))


def flat(rows: Sequence[Mapping[str, Value | Percent]]) -> list[dict[str, Value]]:
    """Rows whose percentages stand beside their intervals, for `tables`."""
    keys = list(rows[0]) if rows else []
    with_ends = {
        key: any(isinstance(row[key], Percent) and row[key].interval() for row in rows)  # type: ignore[union-attr]
        for key in keys
    }
    table: list[dict[str, Value]] = []
    for row in rows:
        line: dict[str, Value] = {}
        for key in keys:
            cell = row[key]
            line[key] = cell.value if isinstance(cell, Percent) else cell
            if with_ends[key]:
                line[f"{key}, 95 %"] = cell.interval() if isinstance(cell, Percent) else ""
        table.append(line)
    return table


def _block(block: object) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield inline(block.text)
    elif isinstance(block, Headline):
        rows = [{"score": name, "%": score} for name, score in block.scores.items()]
        yield markdown(flat(rows))
    elif isinstance(block, Table):
        yield f"**{inline(block.caption)}**"
        yield markdown([_spelled(row) for row in flat(block.rows)])
    elif isinstance(block, Charts):
        if block.picture is not None:
            yield f"![curves]({block.picture})"
    elif isinstance(block, Misses):
        yield "\n".join(_miss(miss) for miss in block.misses)
    elif isinstance(block, Code):
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", block.text))])
        yield f"{inline(block.title)}:"
        yield f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"


def _spelled(row: Mapping[str, Value]) -> dict[str, Value]:
    # `markdown` sees to the bars of a table itself.
    return {
        key: inline(value).replace("\\|", "|") if isinstance(value, str) else value
        for key, value in row.items()
    }


def _miss(miss: Miss) -> str:
    lines = [f"- **{inline(miss.question)}** ({inline(miss.facts)})"]
    lines += [
        f"  - {inline(name)}: {inline(answer) or '(no answer)'}"
        for name, answer in miss.answers.items()
    ]
    right = " / ".join(inline(text) for text in miss.right) or "(there is no answer)"
    lines.append(f"  - right: {right}")
    for excerpt in miss.excerpts:
        lines.append(f"  - … {''.join(_marked(span) for span in excerpt)} …")
    return "\n".join(lines)


def _marked(span: Span) -> str:
    # Emphasis must begin and end with a letter; blanks stay outside.
    text = re.sub(r"([\\`*_\[\]<>#|~!])", r"\\\1", re.sub(r"\s+", " ", span.text))
    if not span.kind or not text.strip():
        return text
    core = text.strip()
    left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    sign = {"answer": "_", "right": "**", "both": "**_"}[span.kind]
    return f"{left}{sign}{core}{sign[::-1]}{right}"
