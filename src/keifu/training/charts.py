"""Line charts as inline SVG whose colours the page's style chooses; knows no run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 68, 14, 16, 42
POINTS = 400  # more are averaged: a screen shows no more

Point = tuple[float | int, float | int]


@dataclass(frozen=True)
class Curve:
    """A named line through points (x, y); `marked` draws each point, for few and important ones."""

    name: str
    points: Sequence[Point]
    marked: bool = False


def chart(title: str, y_label: str, curves: Iterable[Curve], x_label: str = "step", from_zero: bool = False) -> str:
    """An SVG figure of curves that share their axes. Without a finite point there is none."""
    shown = [Curve(c.name, _averaged(_finite(c.points)), c.marked) for c in curves]
    shown = [curve for curve in shown if curve.points]
    if not shown:
        return ""
    xs, ys = (_ticks([p[axis] for c in shown for p in c.points], zero) for axis, zero in ((0, True), (1, from_zero)))
    frame = _Frame(xs, ys)
    body = [*frame.axes(x_label, y_label), *(frame.curve(number, c) for number, c in enumerate(shown))]
    legend = "".join(f'<span class="key c{n}">{escape(c.name)}</span>' for n, c in enumerate(shown))
    names = legend if len(shown) > 1 else ""
    return (
        f'<figure><figcaption>{escape(title)} <span class="legend">{names}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )


@dataclass(frozen=True)
class _Frame:
    """Where a chart's numbers stand on the paper, from the ticks of both axes."""

    xs: list[float]
    ys: list[float]

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        """Grid, numbers and labels."""
        lines = [f'<path class="grid" d="M{LEFT} {self.y(v):.1f}H{WIDTH - RIGHT}"/>' for v in self.ys]
        left = [f'<text x="{LEFT - 7}" y="{self.y(v) + 4:.1f}" text-anchor="end">{_number(v)}</text>' for v in self.ys]
        base = HEIGHT - BOTTOM + 17
        below = [f'<text x="{self.x(v):.1f}" y="{base}" text-anchor="middle">{_number(v)}</text>' for v in self.xs]
        middle = (HEIGHT - BOTTOM + TOP) / 2
        labels = [
            f'<text x="{(WIDTH + LEFT - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
            f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
        ]
        return [*lines, *left, *below, *labels]

    def curve(self, number: int, curve: Curve) -> str:
        """A line, and a dot with its numbers for each marked point."""
        places = [(self.x(x), self.y(y)) for x, y in curve.points]
        line = f'<polyline class="line c{number}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
        marks = zip(places, curve.points, strict=True) if curve.marked or len(places) == 1 else ()
        dots = (
            f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
            f"<title>{escape(curve.name)} {value:.5g} at {at:,.0f}</title></circle>"
            for (x, y), (at, value) in marks
        )
        return line + "".join(dots)


def _finite(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _ticks(values: list[float], from_zero: bool) -> list[float]:
    """Round numbers, at most seven, that enclose the values."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = next(s for s in _steps((high - low) / 6))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _steps(least: float) -> Iterable[float]:
    power = 10.0 ** math.floor(math.log10(least))
    return (m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= scale:
            return f"{value / min(scale, 1e3 if letter == 'k' else scale):.4g} {letter}"
    return f"{value:,.10g}"
