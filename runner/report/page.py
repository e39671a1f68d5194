"""What a page is made of, whatever it is written in: sections of tables, charts, missed questions.

`run_page` and `comparison_page` make it, `render` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runner.utils.tables import CellValue


@dataclass(frozen=True)
class PercentCell:
    """A score in percent and, where it has one, its interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def interval(self) -> str:
        """`51.2 to 62.9`, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"{self.low:.1f} to {self.high:.1f}"


Cell = CellValue | PercentCell


@dataclass(frozen=True)
class Paragraph:
    """A few sentences of plain text."""

    text: str


@dataclass(frozen=True)
class Headline:
    """The two or three numbers that matter most."""

    scores: Mapping[str, PercentCell]


@dataclass(frozen=True)
class Table:
    """Rows of equal keys; the first column names the row."""

    caption: str
    rows: Sequence[Mapping[str, Cell]]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: for the legend.
        style: "grey", "blue", "orange", "green" or "purple"; each has its own mark and dash too.
        points: (x, y), ascending in x.
        band: (x, low, high) around the line; empty for none.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over one axis; `top` fixes the upper end of y, None fits it to the data."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    top: float | None = None


@dataclass(frozen=True)
class Charts:
    """Charts that stand side by side, and the picture that a Markdown page shows instead."""

    charts: Sequence[Chart]
    picture: str | None


@dataclass(frozen=True)
class Span:
    """A stretch of text; `kind` is "", "answer" (the model's), "right", or "both"."""

    text: str
    kind: str


@dataclass(frozen=True)
class Miss:
    """A question that was answered wrongly.

    Attributes:
        question, id: as in the data.
        answers: the model's answer, one for each model that is compared; "" is no answer.
        right: right answers; none where there is none.
        facts: a few words about scores and windows.
        excerpts: stretches of the context, marked.
    """

    question: str
    id: str
    answers: Mapping[str, str]
    right: Sequence[str]
    facts: str
    excerpts: Sequence[Sequence[Span]]


@dataclass(frozen=True)
class Misses:
    """Missed questions, worst first."""

    misses: Sequence[Miss]


@dataclass(frozen=True)
class Code:
    """A file shown as it is, folded away where a page can fold."""

    title: str
    language: str
    text: str


Block = Paragraph | Headline | Table | Charts | Misses | Code


@dataclass(frozen=True)
class PageSection:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: title, one sentence below it, short facts, sections."""

    title: str
    lead: str
    facts: Mapping[str, str]
    sections: Sequence[PageSection] = field(default_factory=tuple)


# Control characters, lone surrogates, and what overrides the direction of writing.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def strip_controls(text: str) -> str:
    """Text of data without characters that no page may hold or that turn its lines round."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def display_text(text: str) -> str:
    """Text of data for a page that breaks its lines: a number and its unit stay on one line."""
    return strip_controls(text).replace(" %", "\N{NO-BREAK SPACE}%")
