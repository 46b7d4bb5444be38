"""A figure as SVG: readable without scripts, in print, by a screen reader, and in light or dark by the page's style.

Own drawing instead of a plotting library, because of what a report has to be: one file that may be mailed. Plotly's
script alone has 4.8 MB and draws nothing where scripts are off; Matplotlib's SVG cannot be restyled by the page. Drawn
are points, lines, steps and bars with intervals, on linear, logarithmic and category axes, and nothing else.

Every mark carries its values in a `<title>` and `data-` attributes, which is what the page's script shows on hover and
what arrow keys step through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from fedpt_secure.report.document import Axis, Figure, Series

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 18, 16, 58
_MARKERS = ("circle", "square", "diamond", "triangle")
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_MOST_MARKERS = 60
"""Beyond so many points a line has no markers of its own; its values are in the table below the figure."""

Place = Callable[[float], float]


def figure_svg(figure: Figure) -> str:
    """The figure as one `<svg>` element with a title and a description."""
    x_low, x_high = _range(figure.x, [value for s in figure.series for value in s.x], from_zero=False)
    heights = [value for s in figure.series for value in (*s.y, *s.low, *s.high)]
    bars = [s for s in figure.series if s.mark == "bars"]
    y_low, y_high = _range(figure.y, heights, from_zero=bool(bars))
    x = _place(figure.x, x_low, x_high, _LEFT, WIDTH - _RIGHT)
    y = _place(figure.y, y_low, y_high, HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{figure.key}-title {figure.key}-text" '
        f'class="chart" data-key="{escape(figure.key)}">',
        f'<title id="{figure.key}-title">{escape(figure.title)}</title>',
        f'<desc id="{figure.key}-text">{escape(figure.caption)}</desc>',
        *_grid(figure, x, y, (x_low, x_high), (y_low, y_high)),
    ]
    for index, series in enumerate(figure.series):
        parts.append(f'<g class="series c{series.colour % 8}" data-series="{escape(series.name)}">')
        if series.mark == "bars":
            parts += _bars(figure, series, bars.index(series), len(bars), x, y, y_low)
        else:
            parts += _line(figure, series, index, x, y)
        parts.append("</g>")
    parts.append("</svg>")
    return "\n".join(parts)


def legend(figure: Figure) -> list[tuple[str, int]]:
    """Name and palette index of each series, where there is more than one."""
    return [(s.name, s.colour % 8) for s in figure.series] if len(figure.series) > 1 else []


def ticks(axis: Axis, low: float, high: float) -> list[tuple[float, str]]:
    """Positions and labels of an axis's ticks within [low, high]."""
    if axis.scale == "categories":
        return [(float(place), name) for place, name in enumerate(axis.categories)]
    if axis.scale == "log":
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        marks = [10.0**power for power in range(first, last + 1)]
        if last - first <= 1:
            marks = sorted({mark * factor for mark in marks for factor in (1, 2, 5)})
        return [(mark, f"{mark:g}") for mark in marks if low * 0.999 <= mark <= high * 1.001]
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    places = [first + offset for offset in range(int((high - first * step) / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return [
        (place * step, f"{place * step:.{digits}f}" if abs(place * step) < 1e6 else f"{place * step:g}")
        for place in places
    ]


def value_text(axis: Axis, value: float) -> str:
    """A value as a reader wants it."""
    if axis.scale == "categories":
        return axis.categories[round(value)]
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _range(axis: Axis, values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    if axis.scale == "categories":
        return -0.5, len(axis.categories) - 0.5
    low, high = min(values), max(values)
    if axis.scale == "log":
        pad = (high / low) ** 0.05 if high > low else 2.0
        low, high = low / pad, high * pad
    else:
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        if from_zero and low == high:  # all bars are 0
            high = pad
        low, high = (low if from_zero and low == 0 else low - pad), (high if from_zero and high == 0 else high + pad)
    return (low if axis.low is None else axis.low), (high if axis.high is None else axis.high)


def _place(axis: Axis, low: float, high: float, begin: float, end: float) -> Place:
    if axis.scale == "log":
        bottom, top = math.log10(low), math.log10(high)
        return lambda value: begin + (math.log10(max(value, low)) - bottom) / (top - bottom) * (end - begin)
    return lambda value: begin + (value - low) / (high - low) * (end - begin)


def _grid(figure: Figure, x: Place, y: Place, x_range: tuple[float, float], y_range: tuple[float, float]) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = ['<g class="grid">']
    for place, label in ticks(figure.y, *y_range):
        at = y(place)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for place, label in ticks(figure.x, *x_range):
        at = x(place)
        if figure.x.scale != "categories":
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<path class="frame" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(figure.x.label)}</text>'
    )
    parts.append(
        f'<text class="label" transform="translate(16 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(figure.y.label)}</text></g>"
    )
    return parts


def _line(figure: Figure, series: Series, index: int, x: Place, y: Place) -> list[str]:
    # Side by side in a category, so that intervals of several series do not hide each other.
    beside = (index - (len(figure.series) - 1) / 2) * 9 if figure.x.scale == "categories" else 0.0
    points = [(x(a) + beside, y(b)) for a, b in zip(series.x, series.y, strict=True)]
    parts = []
    if series.mark in ("line", "step") and len(points) > 1:
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for a, b in points[1:]:
            path += f"H{a:.1f}V{b:.1f}" if series.mark == "step" else f"L{a:.1f} {b:.1f}"
        dash = _DASHES[series.colour % 8 % len(_DASHES)]
        parts.append(f'<path class="line" d="{path}"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")
    if len(points) > _MOST_MARKERS:
        return parts
    for number, (a, b) in enumerate(points):
        inner = ""
        if series.low:
            top, bottom = y(series.high[number]), y(series.low[number])
            inner += f'<path class="interval" d="M{a - 4:.1f} {top:.1f}h8M{a:.1f} {top:.1f}V{bottom:.1f}m-4 0h8"/>'
        inner += _marker(_MARKERS[series.colour % len(_MARKERS)], a, b)
        parts.append(_mark(figure, series, number, inner))
    return parts


def _bars(figure: Figure, series: Series, index: int, count: int, x: Place, y: Place, floor: float) -> list[str]:
    width = 0.8 / count
    zero = y(floor if figure.y.scale == "log" else max(0.0, floor))
    parts = []
    half = _bar_half_width(figure, series)
    for number, (place, height) in enumerate(zip(series.x, series.y, strict=True)):
        left = x(place - half + 2 * half * (0.1 + index * width))
        right = x(place - half + 2 * half * (0.1 + (index + 1) * width))
        top, bottom = min(y(height), zero), max(y(height), zero)
        inner = (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 1):.1f}" '
            f'height="{max(bottom - top, 0.5):.1f}"/>'
        )
        if series.low:
            a, up, down = (left + right) / 2, y(series.high[number]), y(series.low[number])
            inner += f'<path class="interval" d="M{a - 4:.1f} {up:.1f}h8M{a:.1f} {up:.1f}V{down:.1f}m-4 0h8"/>'
        parts.append(_mark(figure, series, number, inner))
    return parts


def _bar_half_width(figure: Figure, series: Series) -> float:
    if figure.x.scale == "categories" or len(series.x) < 2:
        return 0.5
    return min(b - a for a, b in zip(series.x, series.x[1:], strict=False)) / 2


def _mark(figure: Figure, series: Series, number: int, inner: str) -> str:
    text = f"{series.name}: {value_text(figure.x, series.x[number])}, {value_text(figure.y, series.y[number])}"
    if series.low:
        text += f" [{value_text(figure.y, series.low[number])}, {value_text(figure.y, series.high[number])}]"
    return f'<g class="mark" data-text="{escape(text)}"><title>{escape(text)}</title>{inner}</g>'


def _marker(shape: str, x: float, y: float) -> str:
    if shape == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if shape == "diamond":
        return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
    if shape == "triangle":
        return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>'
