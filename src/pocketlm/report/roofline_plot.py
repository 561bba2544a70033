"""The roofline as a drawing: operators by intensity and reachable rate, both axes logarithmic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import escape

from pocketlm.formats.shards import write_file

if TYPE_CHECKING:
    from pocketlm.evaluate.roofline import Pass, RooflineReport

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 480, 80, 50, 230, 60
COLOURS = {"prefill": "#c2571a", "decode": "#1a6fc2"}


def write_plot(found: RooflineReport, path: Path) -> None:
    """Writes the drawing.

    Args:
        found: What to draw.
        path: An SVG file.

    Raises:
        ResourceError: If it cannot be written.
    """
    write_file(path, draw_plot(found).encode())


def draw_plot(found: RooflineReport) -> str:
    """The drawing as SVG text."""
    peak, slope = found.ridge * found.device.bandwidth, found.device.bandwidth
    points = [p for done in (found.prefill, found.decode) for p in _points(done, peak, slope)]
    low = min(0.1, *(x for _, _, x, _ in points))
    high = max(10 * found.ridge, *(x for _, _, x, _ in points))
    scale = _Scale(low, high, slope * low, peak)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(found.model)} on '
        f"{escape(found.device.title)}, batch {found.batch}, context {found.context}</text>",
        *_axes(scale),
        '<polyline fill="none" stroke="black" stroke-width="2" '
        f'points="{scale.at(low, slope * low)} {scale.at(found.ridge, peak)} '
        f'{scale.at(high, peak)}"/>',
    ]
    for kind, name, x, y in points:
        place_x, place_y = scale.at(x, y).split(",")
        parts.append(
            f'<circle cx="{place_x}" cy="{place_y}" r="4" fill="{COLOURS[kind]}" '
            f'fill-opacity="0.7"><title>{kind}: {escape(name)}, {x:.3g} FLOP/byte</title></circle>'
        )
    for row, done in enumerate((found.prefill, found.decode)):
        parts += _legend(done, row)
    return "\n".join([*parts, "</svg>", ""])


class _Scale:
    """Logarithmic places."""

    def __init__(self, left: float, right: float, bottom: float, top: float) -> None:
        self.x = (math.log10(left), math.log10(right))
        self.y = (math.log10(bottom), math.log10(top) + 0.3)

    def at(self, x: float, y: float) -> str:
        """``x,y`` on the page."""
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        page_x = LEFT + across * (WIDTH - LEFT - RIGHT)
        return f"{page_x:.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"


def _points(done: Pass, peak: float, slope: float) -> list[tuple[str, str, float, float]]:
    """Pass, name, intensity, reachable rate; what computes nothing has no place."""
    return [
        (done.name, operator.name, operator.intensity, min(peak, slope * operator.intensity))
        for operator in done.operators
        if operator.operations > 0
    ]


def _axes(scale: _Scale) -> list[str]:
    parts = []
    for power in range(math.ceil(scale.x[0]), math.floor(scale.x[1]) + 1):
        x = scale.at(10.0**power, 10 ** scale.y[0]).split(",")[0]
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>'
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{10.0**power:g}</text>'
        )
    for power in range(math.ceil(scale.y[0]), math.floor(scale.y[1]) + 1):
        y = scale.at(10 ** scale.x[0], 10.0**power).split(",")[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{10.0 ** (power - 12):g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 16}" text-anchor="middle">FLOP per byte</text>')
    parts.append(f'<text x="16" y="{TOP - 8}">TFLOP/s</text>')
    return parts


def _legend(done: Pass, row: int) -> list[str]:
    """The pass in its colour, its time, and the operators that take most of it."""
    x, y = WIDTH - RIGHT + 16, TOP + 16 + row * 190
    parts = [
        f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{COLOURS[done.name]}"/>',
        f'<text x="{x + 12}" y="{y}">{done.name}: {1e3 * done.seconds:.3g} ms, '
        f"{done.tokens_per_second:,.0f} tokens/s</text>",
    ]
    longest = sorted(done.operators, key=lambda operator: -operator.seconds)[:7]
    for place, operator in enumerate(longest, 1):
        share = 100 * operator.seconds / done.seconds
        parts.append(
            f'<text x="{x + 12}" y="{y + 18 * place}" fill="#555">'
            f"{escape(operator.name)} {share:.0f} %</text>"
        )
    return parts
