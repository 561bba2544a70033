"""One chart of lines with intervals as an SVG file that stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocketlm.report import svg

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
    points = [point for one in series for point in one.points]
    least = min(p[1] for p in points) / 10  # an interval that reaches further down is cut off
    ends = [end for p in points for end in (max(p[2], least), p[3])]
    x = svg.Scale([p[0] for p in points], LEFT, WIDTH - RIGHT, log=False)
    y = svg.Scale(ends, HEIGHT - BOTTOM, TOP, log=True)
    beside = svg.text(0, 0, y_label, "middle")
    parts = [
        svg.text(WIDTH / 2, 20, title, "middle", font_size=14),
        svg.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, "middle"),
        svg.element("g", beside, transform=f"translate(16 {HEIGHT / 2}) rotate(-90)"),
    ]
    for tick in y.ticks():
        parts.append(svg.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), stroke="#ddd"))
        parts.append(svg.text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    for tick in sorted({p[0] for p in points}):
        parts.append(
            svg.line(x(tick), HEIGHT - BOTTOM, x(tick), HEIGHT - BOTTOM + 5, stroke="#555")
        )
        parts.append(svg.text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle"))
    for index, one in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(
            svg.path([(x(p[0]), y(p[1])) for p in one.points], stroke=colour, stroke_width=2)
        )
        for where, value, low, high in one.points:
            bottom, top = y(max(low, least)), y(high)
            parts.append(svg.line(x(where), bottom, x(where), top, stroke=colour))
            said = f"{one.name} at {where:g}: {value:.4g}"
            parts.append(svg.dot(x(where), y(value), said, fill=colour))
        row = TOP + 16 * index + 8
        parts.append(svg.line(WIDTH - 200, row, WIDTH - 180, row, stroke=colour, stroke_width=2))
        parts.append(svg.text(WIDTH - 174, row + 4, one.name))
    return svg.document(WIDTH, HEIGHT, parts)
