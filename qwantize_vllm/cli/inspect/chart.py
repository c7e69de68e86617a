"""Lines over the layer index as inline SVG, coloured by the page's variables --s0 and on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 290, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 28, 4, 16, 24
_INSET = 8  # of the first and the last layer from the ends of the grid
COLORS = 6


@dataclasses.dataclass(frozen=True)
class Point:
    """One layer: its index, its value in percent, and what is shown where the pointer rests on it."""

    index: int
    percent: float
    title: str


def color(number: int) -> str:
    """The style that gives an element the colour of a setting."""
    return f"--c:var(--s{number % COLORS})"


def worst(points: Sequence[Point]) -> Point:
    """The highest one."""
    return max(points, key=lambda point: point.percent)


def lines(series: Sequence[Sequence[Point]], top: float, label: str) -> str:
    """One line for each setting, from 0 to at least `top` percent; the last one's highest point is ringed.

    label: says what is drawn to those who do not see it.
    """
    ticks = _ticks(top)
    highest, indices = ticks[-1], sorted({point.index for points in series for point in points})
    x = _Scale(indices[0], indices[-1], _LEFT + _INSET, _WIDTH - _RIGHT - _INSET)
    y = _Scale(0, highest, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for index in _some(indices):
        parts.append(f'<text x="{x(index):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{index}</text>')
    for number, points in enumerate(series):
        parts.append(_line(points, x, y, number))
    if series and series[-1]:
        point = worst(series[-1])
        ring = f'<circle class="worst" cx="{x(point.index):.1f}" cy="{y(point.percent):.1f}" r="6"/>'
        parts.append(f'<g style="{color(len(series) - 1)}">{ring}</g>')
    return "".join([*parts, "</svg>"])


def _line(points: Sequence[Point], x: _Scale, y: _Scale, number: int) -> str:
    path = " ".join(f"{x(point.index):.1f},{y(point.percent):.1f}" for point in points)
    dots = "".join(
        f'<circle class="dot" cx="{x(point.index):.1f}" cy="{y(point.percent):.1f}" r="2.6">'
        f"<title>{escape(point.title)}</title></circle>"
        for point in points
    )
    return f'<g style="{color(number)}"><polyline class="line" points="{path}"/>{dots}</g>'


class _Scale:
    """A linear map from one interval to another; all of an empty one goes to the middle."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.span, self.start, self.length = low, high - low, start, stop - start

    def __call__(self, value: float) -> float:
        part = (value - self.low) / self.span if self.span else 0.5
        return self.start + self.length * part


def _ticks(top: float) -> list[float]:
    """Round values from 0 on, three to seven of them, the last one at least `top`."""
    if top <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top))
    step = next(step * power for step in (0.2, 0.5, 1, 2, 5) if step * power * 6 >= top)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def _some(indices: Sequence[int]) -> list[int]:
    """At most eight of them at even distances, the first one included."""
    step = math.ceil(len(indices) / 8)
    return list(indices[::step])
