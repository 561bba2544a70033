"""The roofline as a drawing: operators by intensity and reachable rate, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from pocketlm.formats.shards import write_file
from pocketlm.report import svg

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
    x = svg.Scale((low, high), LEFT, WIDTH - RIGHT, log=True, margin=0)
    y = svg.Scale((slope * low, 2 * peak), HEIGHT - BOTTOM, TOP, log=True, margin=0)
    title = f"{found.model} on {found.device.title}, batch {found.batch}, context {found.context}"
    roof = [(low, slope * low), (found.ridge, peak), (high, peak)]
    parts = [
        svg.text(LEFT, 24, title, font_size=15),
        *_axes(x, y),
        svg.path([(x(i), y(rate)) for i, rate in roof], stroke="black", stroke_width=2),
    ]
    for kind, name, intensity, rate in points:
        said = f"{kind}: {name}, {intensity:.3g} FLOP/byte"
        colour = COLOURS[kind]
        parts.append(svg.dot(x(intensity), y(rate), said, fill=colour, fill_opacity="0.7"))
    for row, done in enumerate((found.prefill, found.decode)):
        parts += _legend(done, row)
    return svg.document(WIDTH, HEIGHT, parts)


def _points(done: Pass, peak: float, slope: float) -> list[tuple[str, str, float, float]]:
    """Pass, name, intensity, reachable rate; what computes nothing has no place."""
    return [
        (done.name, operator.name, operator.intensity, min(peak, slope * operator.intensity))
        for operator in done.operators
        if operator.operations > 0
    ]


def _axes(x: svg.Scale, y: svg.Scale) -> list[Markup]:
    """Powers of ten."""
    parts: list[Markup] = []
    for tick in x.ticks((1,)):
        parts.append(svg.line(x(tick), TOP, x(tick), HEIGHT - BOTTOM, stroke="#ddd"))
        parts.append(svg.text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle"))
    for tick in y.ticks((1,)):
        parts.append(svg.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), stroke="#ddd"))
        parts.append(svg.text(LEFT - 8, y(tick) + 4, f"{tick / 1e12:g}", "end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(svg.text(middle, HEIGHT - 16, "FLOP per byte", "middle"))
    parts.append(svg.text(16, TOP - 8, "TFLOP/s"))
    return parts


def _legend(done: Pass, row: int) -> list[Markup]:
    """The pass in its colour, its time, and the operators that take most of it."""
    x, y = WIDTH - RIGHT + 16, TOP + 16 + row * 190
    total = f"{done.name}: {1e3 * done.seconds:.3g} ms, {done.tokens_per_second:,.0f} tokens/s"
    parts = [svg.dot(x, y - 4, done.name, fill=COLOURS[done.name]), svg.text(x + 12, y, total)]
    longest = sorted(done.operators, key=lambda operator: -operator.seconds)[:7]
    for place, operator in enumerate(longest, 1):
        share = f"{operator.name} {100 * operator.seconds / done.seconds:.0f} %"
        parts.append(svg.text(x + 12, y + 18 * place, share, fill="#555"))
    return parts
