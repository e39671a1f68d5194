"""Pages as Markdown and as HTML: escaping, structure, contrast; both held by golden files."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.report.page import (
    Chart,
    Charts,
    Code,
    Headline,
    Miss,
    Misses,
    Page,
    PageSection,
    Paragraph,
    PercentCell,
    Series,
    Span,
    Table,
    strip_controls,
)
from runner.report.render import escape_markdown, page_html, page_markdown
from tests.sample_runs import HOSTILE

GOLDEN = Path(__file__).parents[1] / "golden"


def page(text: str = "some text") -> Page:
    """A page with everything that a page can hold, `text` in every place that data can reach."""
    chart = Chart(text, text, text, [Series(text, "blue", [(1, 2.0)], [(1, 1.0, 3.0)])])
    spans = [Span("before ", ""), Span(text, "answer"), Span(" and ", ""), Span(text, "right")]
    missed = Miss(text, text, {text: text, "other": ""}, [text, text], text, [spans])
    nothing = Miss("q", "id", {"answered": "x"}, [], "F1 0 %", [[Span("x", "both")]])
    rows = [
        {"name": text, "n": 3, "score %": PercentCell(55.0, 40.25, 70.0), "loss": 0.5},
        {"name": "b", "n": 12, "score %": PercentCell(7.0), "loss": None},
    ]
    blocks = [
        Headline({text: PercentCell(55.0, 40.0, 70.0), "plain": PercentCell(1.0)}),
        Paragraph(text),
        Table(text, rows),
        Charts([chart], "curves.svg"),
        Misses([missed, nothing]),
        Code(text, "toml", text),
    ]
    sections = [PageSection(text, blocks), PageSection("Two", []), PageSection("Three", [])]
    return Page(text, text, {text: text}, sections)


def parsed(html: str) -> ET.Element:
    assert html.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


@pytest.mark.parametrize(("name", "write"), [("page.md", page_markdown), ("page.html", page_html)])
def test_pages_are_the_golden_ones(name, write):
    """If a change of a page is meant, write the golden file anew and say why."""
    assert write(page()) == (GOLDEN / name).read_text(encoding="utf-8")


@given(st.text(st.characters(codec=None), max_size=30))
def test_any_text_leaves_a_well_formed_page_with_that_text(text):
    root = parsed(page_html(page(text)))
    expected = strip_controls(text).replace(" %", "\N{NO-BREAK SPACE}%").replace("\r", "\n")
    assert "".join(root.find("body/header/h1").itertext()) == expected  # type: ignore[union-attr]
    assert not root.findall(".//script")


def test_hostile_texts_make_no_elements_attributes_or_addresses():
    harmless, hostile = (parsed(page_html(page(t))) for t in ("some text", HOSTILE))
    # The same elements with the same attributes, whatever the texts are.
    assert [(e.tag, sorted(e.attrib)) for e in harmless.iter()] == [
        (e.tag, sorted(e.attrib)) for e in hostile.iter()
    ]
    assert [e.get("href") for e in hostile.iter("a")] == ["#s1", "#s2", "#s3"]
    # A page that could be made to fetch something is not allowed to.
    policy = hostile.find("head/meta[@http-equiv='Content-Security-Policy']")
    assert policy is not None
    assert policy.attrib["content"].startswith("default-src 'none';")
    assert not {"src", "srcset", "onclick", "onload"} & {
        k for e in hostile.iter() for k in e.attrib
    }


def test_nothing_of_a_page_points_outside_of_it():
    html = page_html(page())
    assert re.findall(r"https?://[^\"]+", html) == ["http://www.w3.org/2000/svg"]  # a name, unread
    assert "url(" not in html
    assert "@import" not in html


def test_a_page_is_told_apart_by_those_who_do_not_see_it():
    root = parsed(page_html(page()))
    assert root.attrib["lang"] == "en"
    assert len(root.findall(".//h1")) == 1
    for section in root.findall(".//section"):
        assert section.find(f"h2[@id='{section.attrib['aria-labelledby']}']") is not None
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    for table in root.findall(".//table"):
        assert "".join(table.find("caption").itertext())  # type: ignore[union-attr]
        assert {th.get("scope") for th in table.findall("thead//th")} == {"col"}
        assert {row[0].get("scope") for row in table.findall("tbody/tr")} == {"row"}
    # What a bar shows stands beside it as a number.
    assert {bar.get("aria-hidden") for bar in root.iter() if bar.get("class") == "bar"} == {"true"}
    # Marks are told by their title and by underlines, not by colour alone.
    marks = root.findall(".//mark")
    assert {m.attrib["title"] for m in marks} == {
        *("the model's answer", "right", "answered and right")
    }


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def palettes() -> list[dict[str, str]]:
    """Colours by name, in the light, in the dark and on paper."""
    rules = re.findall(r":root\{(.*?)\}", page_html(page()), flags=re.DOTALL)
    return [dict(re.findall(r"--(\w+):(#\w{6});", rule)) for rule in rules]


def test_a_page_is_printed_as_in_the_light():
    light, dark, paper = palettes()
    assert light == paper
    assert light.keys() == dark.keys()
    assert len(light) == 12


@pytest.mark.parametrize("palette", palettes())
def test_texts_and_lines_stand_out(palette):
    """WCAG 2.2: 4.5 for text, 3 for graphics."""
    grounds = [palette["ground"], palette["raised"]]
    for ground in grounds:
        for text in ("text", "soft", "blue"):
            assert contrast(palette[text], ground) >= 4.5, (text, ground)
    for ground in (palette["answer"], palette["right"]):
        assert contrast(palette["text"], ground) >= 4.5
    for line in ("blue", "orange", "green", "purple"):
        assert contrast(palette[line], palette["ground"]) >= 3
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


# ---- Markdown


def test_scores_stand_with_their_intervals_and_numbers_to_the_right():
    rows = [
        {"run": "a|b", "F1 %": PercentCell(61.25, 50.0, 72.34), "n": 7, "seconds": None},
        {"run": "c", "F1 %": PercentCell(5.0), "n": 1200, "seconds": 0.25},
    ]
    text = page_markdown(Page("t", "l", {}, [PageSection("s", [Table("c", rows)])]))
    assert text.partition("**c**\n\n")[2].splitlines() == [
        "| run | F1 % | n | seconds |",
        "|---|---:|---:|---:|",
        "| a\\|b | 61.2 (50.0 to 72.3) | 7 | - |",
        "| c | 5.0 | 1,200 | 0.250 |",
    ]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("two\n\nlines", "two lines"),
        ("<b> & *x* _y_ `z`", r"\<b\> \& \*x\* \_y\_ \`z\`"),
        ("[l](u) ![i](u) # ~~s~~ a|b \\", r"\[l\](u) !\[i\](u) \# \~\~s\~\~ a\|b \\"),
        ("snake_case _it_ x__y_", r"snake_case \_it\_ x__y\_"),
        ("\u202eabc\x1b[31m", "\ufffdabc\ufffd\\[31m"),
    ],
)
def test_no_text_is_markup(text, written):
    assert escape_markdown(text) == written


def test_a_code_block_is_longer_than_the_fences_in_it():
    text = page_markdown(Page("t", "l", {}, [PageSection("s", [Code("c", "toml", "a\n````\nb")])]))
    assert "`````toml\na\n````\nb\n`````" in text


def test_hostile_texts_start_no_blocks():
    """Line by line, a page of hostile texts begins as one of harmless texts does."""

    def begins(text: str) -> list[str]:
        lines = re.sub(r"(`{3,})toml\n.*?\1\n", "", page_markdown(page(text)), flags=re.DOTALL)
        found = [
            re.match(r" *(#+|[-+>]|\||\*\*|!\[|\d+[.)]|===|`{3})?", line)
            for line in lines.splitlines()
        ]
        return [match[0] if match else "" for match in found]

    assert begins(HOSTILE.replace(" ", "\n")) == begins("some text")
    for text in ("# a", "- a", "| a", "1. a", "+ a", "2) a", "===", "```", "> a"):
        assert begins(text) == begins("some text")
