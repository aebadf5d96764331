"""Line and bar charts as SVG text, so that a plot needs no plotting library.

Knows numbers and names. The y axis of lines is logarithmic where the values span more than a factor of four.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 820, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 50
BAR_LEFT, BAR_RIGHT = 110, 90
COLORS = ("#1b6ca8", "#c1440e", "#2a7f3f", "#6a4c93", "#8a6d00", "#444444")
LOGARITHMIC_FROM = 4.0


@dataclass(frozen=True, slots=True)
class Line:
    """One named series of (x, y), x rising."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, mark: tuple[float, str] | None = None) -> str:
    """The whole SVG. `mark` is an x value with a name, drawn as a dashed line where it is within the chart."""
    ys = [y for line in lines for _, y in line.points]
    x_most = max(x for line in lines for x, _ in line.points)
    low, high = min(ys), max(ys)
    logarithmic = low > 0 and high / low > LOGARITHMIC_FROM
    low, high = (low / 1.1, high * 1.1) if logarithmic else (max(0.0, low - 0.1 * (high - low)), high * 1.05)
    scale: Callable[[float], float] = math.log if logarithmic else float

    def at(x: float, y: float) -> tuple[float, float]:
        up = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_most, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    parts = [_text(WIDTH / 2, 22, title, size=15), _text(WIDTH / 2, HEIGHT - 10, x_label)]
    for value in _ticks(low, high, logarithmic):
        _, y = at(0, value)
        parts += [_rule((LEFT, y), (WIDTH - RIGHT, y), "#dddddd"), _text(LEFT - 6, y + 4, f"{value:,g}", "end")]
    for value in _ticks(0, x_most, False):
        x, y = at(value, low)
        parts += [_rule((x, y), (x, y + 4), "#444444"), _text(x, y + 18, f"{value:,g}")]
    if mark is not None and mark[0] <= x_most:
        x, bottom = at(mark[0], low)
        parts += [_rule((x, TOP), (x, bottom), "#888888", "5 4"), _text(x + 5, bottom - 6, mark[1], "start")]
    for number, line in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{places}"/>')
        parts.append(_rule((LEFT + 12, TOP + 14 + 18 * number), (LEFT + 36, TOP + 14 + 18 * number), color, width=3))
        parts.append(_text(LEFT + 42, TOP + 18 + 18 * number, line.name, "start"))
    return _svg(parts)


def bar_chart(bars: Sequence[tuple[str, float]], *, title: str) -> str:
    """The whole SVG of bars from zero, each with its name and value."""
    step = (HEIGHT - TOP - 10) / len(bars)
    most, room = max(value for _, value in bars), WIDTH - BAR_LEFT - BAR_RIGHT
    parts = [_text(WIDTH / 2, 22, title, size=15)]
    for number, (name, value) in enumerate(bars):
        top, width = TOP + number * step, room * value / most
        size = f'x="{BAR_LEFT}" y="{top:.1f}" width="{width:.1f}" height="{0.7 * step:.1f}"'
        parts.append(f'<rect {size} fill="{COLORS[number % len(COLORS)]}"/>')
        parts.append(_text(BAR_LEFT - 8, top + 0.35 * step + 4, name, "end"))
        parts.append(_text(BAR_LEFT + width + 8, top + 0.35 * step + 4, f"{value:,g}", "start"))
    return _svg(parts)


def _svg(parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return f'{head}\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values within the range."""
    if logarithmic:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**ten for ten in tens for digit in (1, 2, 5)]
    else:
        rough = (high - low) / 6
        ten = 10.0 ** math.floor(math.log10(rough))
        step = next(ten * digit for digit in (1, 2, 5, 10) if ten * digit >= rough)
        found = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [value for value in found if low <= value <= high]


def _rule(start: tuple[float, float], end: tuple[float, float], color: str, dashes: str = "", *, width: int = 1) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    places = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {places} stroke="{color}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", *, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
