"""Artifacts against each other: size × KL and speed × KL as one SVG file that stands alone.

KL is drawn on a log axis with its 95 % interval; the line joins the artifacts that no other beats
in both figures. The original has no KL: a dashed line stands where its size or speed is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pocketlm.evaluate.bootstrap import Interval
from pocketlm.report import svg
from pocketlm.report.words import bytes_text, number_text

WIDTH, HEIGHT = 460, 340  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 40, 48  # around what is plotted
STYLE = (
    "text{fill:#1c2430}.soft{fill:#5b6675}"
    ".axis{stroke:#c3cad4}.front{stroke:#0b63ce;stroke-width:1.5}"
    ".dot{fill:#8793a3}.best{fill:#0b63ce}.bar{stroke:#8793a3}.original{stroke:#8793a3;"
    "stroke-dasharray:4 4}"
)


@dataclass(frozen=True)
class Point:
    """One artifact.

    Attributes:
        name: Beside its dot.
        x: Bytes, or tokens a second.
        kl: From the original, with its interval.
    """

    name: str
    x: float
    kl: Interval


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: Above it.
        points: The artifacts, at least one.
        original: The original's x; None where it was not measured.
        more_is_better: Whether a larger x is (speed), or a smaller one (bytes).
        word: An x in words.
    """

    title: str
    points: tuple[Point, ...]
    original: float | None
    more_is_better: bool
    word: Callable[[float], str]


def frontier(points: Sequence[Point], more_is_better: bool) -> list[Point]:
    """The points that no other beats in both figures, by x.

    Args:
        points: Any.
        more_is_better: Of x; of KL less always is.
    """
    sign = -1 if more_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (sign * p.x, p.kl.value)):
        if not best or point.kl.value < best[-1].kl.value:
            best.append(point)
    return sorted(best, key=lambda p: p.x)


def size_panel(points: Sequence[Point], original: float | None) -> Panel:
    """Bytes of the weights × KL."""
    return Panel("Weights on disk × KL", tuple(points), original, False, bytes_text)


def speed_panel(points: Sequence[Point], original: float | None) -> Panel:
    """Tokens a second × KL."""
    return Panel("Decode, tokens/s × KL", tuple(points), original, True, number_text)


def pareto_svg(panels: Sequence[Panel]) -> str:
    """The panels side by side, as an SVG document.

    Args:
        panels: At least one.
    """
    drawn = [
        svg.element("g", _panel(panel), transform=f"translate({i * WIDTH},0)")
        for i, panel in enumerate(panels)
    ]
    return svg.document(WIDTH * len(panels), HEIGHT, drawn, STYLE)


def _panel(panel: Panel) -> Markup:
    least = min((p.kl.value for p in panel.points if p.kl.value > 0), default=1e-6)
    # a KL of 0 has no place on the axis: it stands a decade below the others
    shown = [Interval(**{end: max(kl, least / 10) for end, kl in p.kl}) for p in panel.points]
    xs = [p.x for p in panel.points] + ([] if panel.original is None else [panel.original])
    x = svg.Scale(xs, LEFT, WIDTH - RIGHT, log=False)
    ends = [end for kl in shown for end in (kl.low, kl.high)]
    y = svg.Scale(ends, HEIGHT - BOTTOM, TOP, log=True)
    parts = [svg.text(LEFT, 20, panel.title)]
    parts += [svg.line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, class_="axis")]
    for tick in y.ticks():
        parts.append(svg.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), class_="axis"))
        parts.append(svg.text(LEFT - 6, y(tick) + 4, number_text(tick), "end", class_="soft"))
    for tick in x.ticks():
        below = HEIGHT - BOTTOM + 16
        parts.append(svg.text(x(tick), below, panel.word(tick), "middle", class_="soft"))
    where = "right" if panel.more_is_better else "left"
    parts.append(svg.text(LEFT, HEIGHT - 10, f"better: down and {where}", class_="soft"))
    if panel.original is not None:
        at = x(panel.original)
        parts.append(svg.line(at, TOP, at, HEIGHT - BOTTOM, class_="original"))
        side, shift = ("end", -4) if at > WIDTH / 2 else ("start", 4)
        parts.append(svg.text(at + shift, TOP + 10, "original", side, class_="soft"))
    best = frontier(panel.points, panel.more_is_better)
    corners = [(p, kl) for p, kl in zip(panel.points, shown, strict=True) if p in best]
    corners.sort(key=lambda pair: pair[0].x)
    parts.append(svg.path([(x(p.x), y(kl.value)) for p, kl in corners], class_="front"))
    for point, kl in zip(panel.points, shown, strict=True):
        at = x(point.x)
        name = "best" if point in best else "dot"
        title = f"{point.name}: {panel.word(point.x)}, KL {number_text(point.kl.value)}"
        parts.append(svg.line(at, y(kl.low), at, y(kl.high), class_="bar"))
        parts.append(svg.dot(at, y(kl.value), title, class_=name))
        side, shift = ("end", -8) if at > WIDTH * 0.7 else ("start", 8)
        parts.append(svg.text(at + shift, y(kl.value) - 6, point.name, side))
    return Markup("").join(parts)
