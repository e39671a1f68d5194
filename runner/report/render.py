"""Writes a page as one HTML file: styles and charts inside, no script, nothing fetched.

It reads well on a phone, in the dark and on paper; whatever the data says stays text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.report.comparison_page import NOISE, comparison_page
from runner.report.line_chart import line_chart, text
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
)
from runner.report.page_markdown import page_markdown
from runner.report.read import read_run
from runner.report.run_page import run_page, scores_of
from runner.run.folder import RunDir
from runner.utils.files import storage_errors, write_atomic
from runner.utils.tables import format_value

# Nothing may be fetched or run, whatever a data set says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

COMPARISON = ("comparison.md", "comparison.html")


def page_html(page: Page) -> str:
    """The whole page; it is well-formed XML too."""
    body = [
        "<header>",
        f"<h1>{text(page.title)}</h1>",
        f'<p class="lead">{text(page.lead)}</p>',
    ]
    if page.facts:
        facts = "".join(
            f"<div><dt>{text(name)}</dt><dd>{text(fact)}</dd></div>"
            for name, fact in page.facts.items()
        )
        body.append(f'<dl class="facts">{facts}</dl>')
    body.append("</header>")
    if len(page.sections) > 2:
        links = "".join(
            f'<li><a href="#s{n}">{text(section.title)}</a></li>'
            for n, section in enumerate(page.sections, 1)
        )
        body.append(f'<nav aria-label="Contents"><ul>{links}</ul></nav>')
    body.append("<main>")
    for n, section in enumerate(page.sections, 1):
        body.append(f'<section id="s{n}" aria-labelledby="h{n}">')
        body.append(f'<h2 id="h{n}">{text(section.title)}</h2>')
        for place, block in enumerate(section.blocks, 1):
            body += _block(block, f"s{n}-{place}")
        body.append("</section>")
    body.append("</main>")
    return _FRAME.format(
        title=text(page.title), policy=_POLICY, style=PAGE_STYLE, body="\n".join(body)
    )


def _block(block: object, identity: str) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield f"<p>{text(block.text)}</p>"
    elif isinstance(block, Headline):
        yield from _headline(block)
    elif isinstance(block, Table):
        yield from _table(block, identity)
    elif isinstance(block, Charts):
        charts = (
            f"<figure><figcaption>{text(chart.title)}</figcaption>"
            f"{line_chart(chart, f'{identity}-{n}')}</figure>"
            for n, chart in enumerate(block.charts, 1)
        )
        yield f'<div class="charts">{"".join(charts)}</div>'
    elif isinstance(block, Misses):
        yield from (_miss(miss) for miss in block.misses)
    elif isinstance(block, Code):
        yield (
            f"<details><summary>{text(block.title)}</summary>"
            f'<pre tabindex="0"><code>{text(block.text)}</code></pre></details>'
        )


def _headline(block: Headline) -> Iterator[str]:
    yield '<div class="headline">'
    for name, score in block.scores.items():
        ends = f"<span>95 % interval {score.interval()}</span>" if score.interval() else ""
        yield (
            f'<div><span class="name">{text(name)}</span>'
            f"<strong>{score.value:.1f}<small> %</small></strong>{_bar(score)}{ends}</div>"
        )
    yield "</div>"


def _table(block: Table, identity: str) -> Iterator[str]:
    keys = list(block.rows[0]) if block.rows else []
    numeric = {
        key: all(isinstance(row[key], int | float | PercentCell | None) for row in block.rows)
        for key in keys
    }
    # Wide tables scroll by themselves, with the keyboard too; the page never does.
    yield f'<div class="scroll" role="region" aria-labelledby="{identity}" tabindex="0"><table>'
    yield f'<caption id="{identity}">{text(block.caption)}</caption>'
    align = {key: ' class="number"' if numeric[key] else "" for key in keys}
    align |= dict.fromkeys(keys[:1], "")  # the first column names the row
    heads = (f'<th scope="col"{align[key]}>{text(key)}</th>' for key in keys)
    yield f"<thead><tr>{''.join(heads)}</tr></thead><tbody>"
    for row in block.rows:
        first, *rest = keys
        cells = [f'<th scope="row">{_cell(row[first], first)}</th>']
        cells += [f"<td{align[key]}>{_cell(row[key], key)}</td>" for key in rest]
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def _cell(cell: Cell, column: str) -> str:
    if isinstance(cell, PercentCell):
        ends = f' <span class="ends">{cell.interval()}</span>' if cell.interval() else ""
        return f"{cell.value:.1f}{ends}{_bar(cell)}"
    return f"{cell:,}" if isinstance(cell, int) else text(format_value(cell, column))


def _bar(score: PercentCell) -> str:
    """The score as a bar, its interval as a line over it; the numbers stand beside it."""
    value, ends = max(0.0, min(100.0, score.value)), ""
    if score.low is not None and score.high is not None:
        width = max(0.4, score.high - score.low)
        ends = (
            f'<rect class="whisker" x="{score.low:.1f}" y="2.5" width="{width:.1f}" height="1" />'
        )
    return (
        '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="6" />'
        f'<rect class="fill" width="{value:.1f}" height="6" />{ends}</svg>'
    )


def _miss(miss: Miss) -> str:
    answers = "".join(
        f"<div><dt>{text(name)}</dt><dd>{_answer(answer)}</dd></div>"
        for name, answer in miss.answers.items()
    )
    right = (
        " <i>or</i> ".join(f'<span class="right">{text(t)}</span>' for t in miss.right)
        or "<i>there is no answer</i>"
    )
    excerpts = "".join(
        f"<blockquote>{''.join(map(_marked, excerpt))}</blockquote>" for excerpt in miss.excerpts
    )
    return (
        f'<article class="miss"><h3>{text(miss.question)}</h3>'
        f"<dl>{answers}<div><dt>right</dt><dd>{right}</dd></div></dl>"
        f'{excerpts}<p class="note">{text(miss.facts)} · {text(miss.id)}</p></article>'
    )


def _answer(answer: str) -> str:
    return f'<span class="answer">{text(answer)}</span>' if answer else "<i>no answer</i>"


def _marked(span: Span) -> str:
    if not span.kind:
        return text(span.text)
    told = {"answer": "the model's answer", "right": "right", "both": "answered and right"}
    return f'<mark class="{span.kind}" title="{told[span.kind]}">{text(span.text)}</mark>'


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta http-equiv="Content-Security-Policy" content="{policy}" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="color-scheme" content="light dark" />
<meta name="generator" content="spantune" />
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

# Pairs of text and ground have a contrast of at least 4.5 (WCAG 2.2 AA); a test computes it.
LIGHT = {
    "ground": "#ffffff",
    "raised": "#f6f7f9",
    "text": "#1c2128",
    "soft": "#586069",
    "line": "#d8dee4",
    "blue": "#0b66a8",
    "orange": "#b8500b",
    "green": "#1a7a55",
    "purple": "#8a3f73",
    "grey": "#9aa3ad",
    "answer": "#fde6d2",
    "right": "#d6f2e3",
}

DARK = {
    "ground": "#14181d",
    "raised": "#1c2229",
    "text": "#e6e9ed",
    "soft": "#a3adb8",
    "line": "#343c46",
    "blue": "#6cb6f0",
    "orange": "#f0a05a",
    "green": "#5cc79a",
    "purple": "#d99ac2",
    "grey": "#66717d",
    "answer": "#553419",
    "right": "#174a35",
}


def _colours(palette: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in palette.items())


PAGE_STYLE = (
    f":root{{color-scheme:light dark;{_colours(LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_colours(DARK)}}}}}"
    f"@media print{{:root{{{_colours(LIGHT)}}}}}"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:62rem;background:var(--ground);
color:var(--text);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"Liberation Sans","DejaVu Sans",sans-serif;overflow-wrap:break-word}
h1{margin:0;font-size:1.9rem;line-height:1.2;letter-spacing:-.015em}
h2{margin:3rem 0 1rem;padding-top:.9rem;border-top:1px solid var(--line);font-size:1.25rem;
line-height:1.3}
h3{margin:0 0 .6rem;font-size:1rem;line-height:1.4}
p{margin:.6rem 0;max-width:46rem}
a{color:var(--blue)}
.lead{margin-top:.5rem;font-size:1.05rem;color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.7rem 1.5rem;
margin:1.5rem 0 0}
.facts dt{font-size:.78rem;color:var(--soft)}
dd{margin:0;font-variant-numeric:tabular-nums}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1.75rem 0 0;padding:0;list-style:none;
font-size:.9rem}
.headline{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:1rem}
.headline div{padding:1rem 1.15rem 1.1rem;border-radius:.6rem;background:var(--raised)}
.headline span{display:block;font-size:.85rem;color:var(--soft)}
.headline strong{display:block;font-size:2.3rem;line-height:1.25;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.headline small{font-size:1.1rem;font-weight:400;color:var(--soft)}
.headline .bar{width:100%;margin:.35rem 0 .5rem}
.scroll{margin:1.4rem 0;overflow-x:auto;
background:linear-gradient(to right,var(--ground) 40%,transparent) 0 0/2.5rem 100% local,
linear-gradient(to left,var(--ground) 40%,transparent) 100% 0/2.5rem 100% local,
linear-gradient(to right,var(--line),transparent) 0 0/.8rem 100% scroll,
linear-gradient(to left,var(--line),transparent) 100% 0/.8rem 100% scroll;
background-repeat:no-repeat}
table{width:100%;border-collapse:collapse;font-size:.92rem}
caption{padding-bottom:.45rem;text-align:left;font-weight:600}
th,td{padding:.42rem .9rem .42rem 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top;font-weight:400}
th:last-child,td:last-child{padding-right:0}
thead th{font-size:.8rem;color:var(--soft);vertical-align:bottom}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.ends{display:inline-block;min-width:6.4rem;font-size:.8rem;color:var(--soft)}
.bar{display:block;height:.35rem;border-radius:.2rem}
td .bar{width:100%;min-width:6rem;margin-top:.25rem}
tbody th{min-width:7.5rem}
.track{fill:var(--line)}.fill{fill:var(--blue)}.whisker{fill:var(--text)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1.5rem}
figure{margin:0}
figcaption{margin-bottom:.45rem;font-size:.92rem;font-weight:600}
.chart{display:block;width:100%;height:auto;font-size:13px}
.chart text{fill:var(--text);font-variant-numeric:tabular-nums}
.chart .tick{fill:var(--soft);font-size:12px}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.axis{stroke:var(--soft);stroke-width:1;fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.grey{stroke:var(--grey);stroke-width:1}
.line.blue{stroke:var(--blue)}.line.orange{stroke:var(--orange)}.line.green{stroke:var(--green)}
.line.purple{stroke:var(--purple)}.mark.purple{fill:var(--purple)}
.mark.blue{fill:var(--blue)}.mark.orange{fill:var(--orange)}.mark.green{fill:var(--green)}
.band{opacity:.16}.band.blue{fill:var(--blue)}.band.orange{fill:var(--orange)}
.band.green{fill:var(--green)}
.miss{margin:1rem 0;padding:1rem 1.15rem;border-radius:.6rem;background:var(--raised);
break-inside:avoid}
.miss dl{margin:0}
.miss dl div{display:grid;grid-template-columns:6.5rem 1fr;gap:.6rem}
.miss dt{color:var(--soft)}
.miss blockquote{margin:.7rem 0 0;padding-left:.9rem;border-left:3px solid var(--line);
color:var(--soft);font-size:.94rem}
.note{margin:.6rem 0 0;font-size:.8rem;color:var(--soft)}
mark{padding:.05em .15em;border-radius:.2em;color:var(--text);text-decoration-thickness:2px;
text-underline-offset:.2em}
mark.answer{background:var(--answer);text-decoration:underline dashed var(--orange)}
mark.right,mark.both{background:var(--right);text-decoration:underline var(--green)}
details{margin:1rem 0}
summary{cursor:pointer}
pre{overflow-x:auto;padding:1rem;border-radius:.6rem;background:var(--raised);font-size:.82rem;
line-height:1.5}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",
monospace}
:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
@media (max-width:34rem){body{padding-top:1.5rem}h1{font-size:1.5rem}
.miss dl div{grid-template-columns:1fr;gap:0}.miss dd{margin-bottom:.35rem}
table{font-size:.85rem}th,td{padding-right:.55rem}tbody th{min-width:5.2rem}
.number .ends{display:block;min-width:0;font-size:.72rem}td .bar{min-width:3.2rem}
.facts{grid-template-columns:repeat(auto-fit,minmax(7rem,1fr))}}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}h2{break-after:avoid}
figure,tr{break-inside:avoid}.scroll{overflow:visible}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""
)


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
    scored = read_run(path, result)
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
    page = comparison_page([read_run(path) for path in paths])
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
