"""One chart of lines with intervals as a self-contained SVG: no library, the reader's own fonts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
COLOURS = ("#0b62a4", "#d95f02", "#3a8f3a", "#7b3294")


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        name: In the legend.
        points: (x, value, low, high), by rising x.
    """

    name: str
    points: Sequence[tuple[float, float, float, float]]


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """Lines over a linear x and a logarithmic y, with interval bars and a value at each point.

    Args:
        title: Above it.
        x_label: Below the x axis.
        y_label: Beside the y axis.
        series: At least one point in all; values above zero.

    Returns:
        The SVG.
    """
    points = [point for line in series for point in line.points]
    low = min(max(p[2], p[1] / 10) for p in points) * 0.85
    high = max(p[3] for p in points) * 1.2
    left, right = min(p[0] for p in points) - 0.15, max(p[0] for p in points) + 0.15

    def x(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    beside = _text(0, 0, y_label, "middle")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 20, title, "middle", size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, "middle"),
        f'<g transform="translate(16 {HEIGHT / 2}) rotate(-90)">{beside}</g>',
    ]
    for tick in _ticks(low, high):
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "#dddddd"))
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    for tick in sorted({p[0] for p in points}):
        parts.append(_line(x(tick), HEIGHT - BOTTOM, x(tick), HEIGHT - BOTTOM + 5, "#555555"))
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle"))
    for index, line in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for where, value, least, most in line.points:
            parts.append(_line(x(where), y(least), x(where), y(most), colour))
            parts.append(
                f'<circle cx="{x(where):.1f}" cy="{y(value):.1f}" r="4" fill="{colour}">'
                f"<title>{escape(line.name)} at {where:g}: {value:.4g}</title></circle>"
            )
        row = TOP + 16 * index + 8
        parts.append(_line(WIDTH - 200, row, WIDTH - 180, row, colour, width=2))
        parts.append(_text(WIDTH - 174, row + 4, line.name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within the range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    return [step for step in steps if low <= step <= high]


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="#222222">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )
