"""Draws lines over an axis as SVG that stands inside a page: no picture file, no script, no font.

Colours are classes, so that the page decides them for light, dark and print; each series also has
its own mark and dash, for readers and printers without colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from runner.report.page import Chart, Series, display_text

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 44
LEGEND = 20  # height of a line of the legend
Place = Callable[[float, float], tuple[float, float]]
DASHES = {"grey": "", "blue": "", "orange": "7 4", "green": "2 4", "purple": "9 3 2 3"}


def line_chart(chart: Chart, identity: str) -> str:
    """Draw a chart.

    Args:
        chart: at least one series with a point.
        identity: of the chart within its page, for the texts that screen readers are given.
    """
    drawn = [series for series in chart.series if series.points]
    xs = [x for series in drawn for x, _ in series.points]
    ys = [y for series in drawn for _, y in series.points]
    ys += [high for series in drawn for _, _, high in series.band]
    x_ticks = ticks(0.0, max(xs), 6, whole=True)
    y_ticks = ticks(0.0, chart.top if chart.top is not None else max(ys), 5)
    x_end, y_end = max(x_ticks[-1], max(xs)), y_ticks[-1]
    bottom = HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x / x_end if x_end else 0.0)
        return across, bottom - (bottom - TOP) * min(y / y_end if y_end else 0.0, 1.0)

    rows = -(-len(drawn) // 2)
    height = HEIGHT + rows * LEGEND
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-labelledby="{identity}-title {identity}-text" xmlns="http://www.w3.org/2000/svg">',
        f'<title id="{identity}-title">{text(chart.title)}</title>',
        f'<desc id="{identity}-text">{text(_description(chart, drawn))}</desc>',
        *_axes(chart, x_ticks, y_ticks, place),
    ]
    for series in drawn:
        parts += _band(series, place)
    for series in drawn:
        parts += _line(series, place)
    return "".join([*parts, *_legend(drawn), "</svg>"])


def text(value: str) -> str:
    """Text of data as SVG."""
    return escape(display_text(value))


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to at least `high`, about `most` of them."""
    rough = max(high - low, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step - 1e-9))
    count = max(1, math.ceil((high - low) / step - 1e-6))
    return [low + step * n for n in range(count + 1)]


def number(value: float) -> str:
    """Spell a tick: no trailing zeros."""
    return f"{value:.4g}"


def _axes(
    chart: Chart, x_ticks: Sequence[float], y_ticks: Sequence[float], place: Place
) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    for value in y_ticks:
        _, y = place(0, value)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" />'
        yield (
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">'
            f"{number(value)}</text>"
        )
    for value in x_ticks:
        x, _ = place(value, 0)
        yield (
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{number(value)}</text>"
        )
    yield f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}" />'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield (
        f'<text class="label" x="{middle:.0f}" y="{bottom + 35}" text-anchor="middle">'
        f"{text(chart.x_label)}</text>"
    )
    yield (
        f'<text class="label" transform="translate(11 {(TOP + bottom) / 2:.0f}) rotate(-90)"'
        f' text-anchor="middle">{text(chart.y_label)}</text>'
    )


def _legend(drawn: Sequence[Series]) -> Iterator[str]:
    for nth, series in enumerate(drawn):
        x = LEFT + nth % 2 * (WIDTH - LEFT - RIGHT) / 2
        y = HEIGHT + nth // 2 * LEGEND + 4
        yield _stroke(series.style, f"M{x:.1f} {y}h26")
        if series.style != "grey":
            yield _mark(series.style, x + 13, y)
        yield f'<text class="label" x="{x + 34:.1f}" y="{y + 4}">{text(series.name)}</text>'


def _band(series: Series, place: Place) -> list[str]:
    if len(series.band) < 2:
        return []
    above = [place(x, high) for x, _, high in series.band]
    below = [place(x, low) for x, low, _ in reversed(series.band)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in [*above, *below]) + "Z"
    return [f'<path class="band {series.style}" d="{path}" />']


def _line(series: Series, place: Place) -> list[str]:
    places = [place(x, y) for x, y in series.points]
    parts = [_stroke(series.style, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places))]
    if series.style == "grey":
        return parts
    for x, low, high in series.band if len(series.band) == 1 else ():
        (across, foot), (_, head) = place(x, low), place(x, high)
        parts.append(
            f'<path class="line {series.style}" d="M{across:.1f} {foot:.1f}V{head:.1f}" />'
        )
    for (x, y), (across, up) in zip(series.points, places, strict=True):
        label = text(f"{series.name}: {number(y)} at {number(x)}")
        parts.append(f"<g><title>{label}</title>{_mark(series.style, across, up)}</g>")
    return parts


def _stroke(style: str, path: str) -> str:
    dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] else ""
    return f'<path class="line {style}"{dash} d="{path}" />'


def _mark(style: str, x: float, y: float) -> str:
    shapes = {
        "blue": f'<circle class="mark blue" cx="{x:.1f}" cy="{y:.1f}" r="4" />',
        "orange": f'<rect class="mark orange" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7"'
        ' height="7" />',
        "green": f'<path class="mark green" d="M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z" />',
        "purple": f'<path class="mark purple" d="M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z" />',
    }
    return shapes[style]


def _description(chart: Chart, drawn: Sequence[Series]) -> str:
    """The chart in words: first and last value of each line."""
    lines = [
        f"{series.name} from {number(series.points[0][1])} to {number(series.points[-1][1])}"
        for series in drawn
    ]
    return f"{chart.y_label} against {chart.x_label}: {'; '.join(lines)}."
