"""Artifacts against each other: size × KL and speed × KL as one SVG file that stands alone.

KL is drawn on a log axis with its 95 % interval; the line joins the artifacts that no other beats
in both figures. The original has no KL: a dashed line stands where its size or speed is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pocketlm.evaluate.bootstrap import Interval
from pocketlm.report.words import bytes_text, number_text

WIDTH, HEIGHT = 460, 340  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 40, 48  # around what is plotted
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1c2430}.soft{fill:#5b6675}"
    ".axis{stroke:#c3cad4}.front{fill:none;stroke:#0b63ce;stroke-width:1.5}"
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
    drawn = Markup("").join(
        Markup('<g transform="translate({},0)">{}</g>').format(i * WIDTH, _panel(panel))
        for i, panel in enumerate(panels)
    )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" '
        'role="img"><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{drawn}'
        "</svg>\n"
    ).format(w=WIDTH * len(panels), h=HEIGHT, style=Markup(STYLE), drawn=drawn)


class _Scale:
    """Values to pixels, linear or logarithmic, with a margin of 8 % at both ends."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool) -> None:
        self._log = log
        ends = [self._place(value) for value in values]
        low, high = min(ends), max(ends)
        pad = 0.08 * (high - low) or abs(high) * 0.08 or 1.0
        self._low, self._span = low - pad, high - low + 2 * pad
        self._start, self._stop = start, stop

    def _place(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._place(value) - self._low) / self._span
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """Round values in the middle of the scale, one to six."""
        low, high = self._low, self._low + self._span
        if self._log:
            found = [
                step * 10.0**power
                for power in range(math.floor(low), math.ceil(high) + 1)
                for step in (1, 2, 5)
                if low <= math.log10(step * 10.0**power) <= high
            ]
            return found[:: math.ceil(len(found) / 6)] if found else [10 ** ((low + high) / 2)]
        size = 10.0 ** math.floor(math.log10(self._span / 3))
        size *= next((m for m in (5, 2) if self._span / (size * m) >= 2.5), 1)
        first = math.ceil(low / size)
        return [size * i for i in range(first, math.floor(high / size) + 1)]


def _panel(panel: Panel) -> Markup:
    least = min((p.kl.value for p in panel.points if p.kl.value > 0), default=1e-6)
    # a KL of 0 has no place on the axis: it stands a decade below the others
    shown = [Interval(**{end: max(kl, least / 10) for end, kl in p.kl}) for p in panel.points]
    xs = [p.x for p in panel.points] + ([] if panel.original is None else [panel.original])
    x = _Scale(xs, LEFT, WIDTH - RIGHT, log=False)
    ends = [end for kl in shown for end in (kl.low, kl.high)]
    y = _Scale(ends, HEIGHT - BOTTOM, TOP, log=True)
    parts = [Markup('<text x="{}" y="20">{}</text>').format(LEFT, panel.title)]
    parts += [_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis")]
    for tick in y.ticks():
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "axis"))
        parts.append(_text(LEFT - 6, y(tick) + 4, number_text(tick), "end", "soft"))
    for tick in x.ticks():
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 16, panel.word(tick), "middle", "soft"))
    where = "right" if panel.more_is_better else "left"
    parts.append(_text(LEFT, HEIGHT - 10, f"better: down and {where}", "start", "soft"))
    if panel.original is not None:
        at = x(panel.original)
        parts.append(_line(at, TOP, at, HEIGHT - BOTTOM, "original"))
        side = "end" if at > WIDTH / 2 else "start"
        parts.append(_text(at + (-4 if side == "end" else 4), TOP + 10, "original", side, "soft"))
    best = frontier(panel.points, panel.more_is_better)
    corners = [(p, kl) for p, kl in zip(panel.points, shown, strict=True) if p in best]
    corners.sort(key=lambda pair: pair[0].x)
    path = " ".join(f"{x(p.x):.1f},{y(kl.value):.1f}" for p, kl in corners)
    parts.append(Markup('<polyline class="front" points="{}"/>').format(path))
    for point, kl in zip(panel.points, shown, strict=True):
        at = x(point.x)
        name = "best" if point in best else "dot"
        title = f"{point.name}: {panel.word(point.x)}, KL {number_text(point.kl.value)}"
        parts.append(_line(at, y(kl.low), at, y(kl.high), "bar"))
        parts.append(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" class="{}"><title>{}</title></circle>')
            .format(at, y(kl.value), name, title)
        )  # fmt: skip
        side = "end" if at > WIDTH * 0.7 else "start"
        shift = -8 if side == "end" else 8
        parts.append(_text(at + shift, y(kl.value) - 6, point.name, side, ""))
    return Markup("").join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(
        x1, y1, x2, y2, name
    )


def _text(x: float, y: float, words: str, anchor: str, name: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, name, words
    )
