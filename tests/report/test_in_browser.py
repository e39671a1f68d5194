"""Reports as a browser shows them: nothing fetched, nothing run, nothing wider than the window."""

from __future__ import annotations

import pytest

from runner.report.render import write_comparison, write_report
from tests.browser import find_browser, start_browser
from tests.sample_runs import HOSTILE, add_set, make_run, predictions

pytestmark = [
    pytest.mark.skipif(find_browser() is None, reason="no Chromium on the path"),
    pytest.mark.xdist_group("browser"),  # one for all pages
]


@pytest.fixture(scope="module")
def browser():
    opened = start_browser()
    if opened is None:
        pytest.skip("the Chromium on the path does not start")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a plain run, of a SQuAD v2 run whose data are hostile, and of a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "first", predictions())
    second = make_run(folder / "second", predictions(better=6), rate="5e-5")
    rows = predictions(unanswerable=True)
    for row in rows:
        row["question"] = HOSTILE
        row["id"] += HOSTILE
        row["answers"] = [HOSTILE] if row["answers"] else []
        for excerpt in row.get("excerpts", []):
            excerpt["text"] = HOSTILE + "x" * 300
    probe = HOSTILE.replace("\ud800", "")
    third = make_run(folder / "third", rows, unanswerable=True, probe=probe)
    both = make_run(folder / "both", predictions())
    add_set(both, "a-second-set-of-questions", predictions(60, better=9))
    for run in (first, second, third, both):
        write_report(run)
    write_comparison([first, second], folder)
    return {
        "plain": first / "report.html",
        "hostile": third / "report.html",
        "comparison": folder / "comparison.html",
        "sets": both / "report.html",
    }


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("name", ["plain", "hostile", "comparison", "sets"])
def test_a_page_is_whole_and_quiet_and_fits(browser, pages, name, width):
    browser.open(pages[name], width=width)
    requests = [r["request"]["url"] for r in browser.said("Network.requestWillBeSent")]
    assert requests == [pages[name].as_uri()]
    assert not browser.said("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert not browser.said("Page.javascriptDialogOpening")
    assert browser.ask("document.scripts.length") == 0
    assert browser.ask("document.compatMode") == "CSS1Compat"
    assert browser.ask("document.title") == browser.ask("document.querySelector('h1').textContent")
    assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.ask("document.querySelectorAll('table').length") >= 3
    # Every table has a caption, a row of heads, and a head for each row.
    assert browser.ask(
        "[...document.querySelectorAll('table')].every(t => t.caption.textContent.trim()"
        " && t.tHead.rows.length == 1"
        " && [...t.tBodies[0].rows].every(r => r.cells[0].scope == 'row'))"
    )
    # Charts are drawn: they have a size, a name and lines.
    charts = browser.ask(
        "[...document.querySelectorAll('svg.chart')].map(s => [s.getBoundingClientRect().width,"
        " s.querySelector('title').textContent, s.querySelectorAll('path.line').length])"
    )
    assert len(charts) == (4 if name == "sets" else 2)
    assert all(size > 250 and title and lines for size, title, lines in charts)
    # Every link of the contents leads somewhere.
    assert browser.ask(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    )


def test_texts_of_data_stay_texts(browser, pages):
    browser.open(pages["hostile"], width=1100)
    shown = browser.ask("document.querySelector('article.miss h3').textContent")
    assert "<script>alert(1)</script> & \"quotes\" 'single'" in shown
    assert "é 😀" in shown
    assert not {"\u202e", "\x07", "\x1b", "\ud800"} & set(shown)
    assert browser.ask("document.querySelectorAll('a:not(nav a)').length") == 0


def test_the_page_follows_the_readers_wish_for_dark(browser, pages):
    browser.open(pages["plain"], width=1100)
    grounds = []
    for dark in (False, True):
        browser.dark(dark)
        colour = browser.ask("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(int(part) for part in colour[4:-1].split(",")))
    assert grounds[0] > 700
    assert grounds[1] < 150


def test_the_page_can_be_printed(browser, pages):
    browser.open(pages["plain"], width=1100, media="print")
    assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    pdf = browser.call("Page.printToPDF", printBackground=True)["data"]
    assert len(pdf) > 10_000
