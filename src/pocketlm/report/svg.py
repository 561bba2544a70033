"""What the drawings share: SVG elements with everything escaped, and scales with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup


def element(name: str, words: str | None = None, /, **attributes: str | float) -> Markup:
    """An SVG element.

    Args:
        name: Of the element.
        words: Text or other elements inside it; None: nothing.
        **attributes: Numbers get one decimal; ``_`` stands for ``-``, and a name that Python keeps
            for itself ends in one (``class_``). An empty word is left out.
    """
    said = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if type(value) is float else value
        )
        for key, value in attributes.items()
        if value != ""
    )
    if words is None:
        return Markup("<{}{}/>").format(Markup(name), said)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), said, words)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: str | float) -> Markup:
    """A straight line."""
    ends = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", **ends, **attributes)


def text(x: float, y: float, words: str, anchor: str = "", **attributes: str | float) -> Markup:
    """Words; `anchor` is ``start``, ``middle`` or ``end``."""
    return element("text", words, x=float(x), y=float(y), text_anchor=anchor, **attributes)


def dot(x: float, y: float, title: str, **attributes: str | float) -> Markup:
    """A point that says what it is when it is pointed at."""
    inside = element("title", title)
    return element("circle", inside, cx=float(x), cy=float(y), r=4, **attributes)


def path(points: Iterable[tuple[float, float]], **attributes: str | float) -> Markup:
    """Points joined by lines."""
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=corners, fill="none", **attributes)


def document(width: int, height: int, parts: Iterable[str], style: str = "") -> str:
    """A drawing on white as a file that stands alone.

    Args:
        width: In pixels.
        height: In pixels.
        parts: Elements.
        style: CSS.
    """
    sheet = [element("style", Markup(style))] if style else []
    ground = element("rect", width="100%", height="100%", fill="#fff")
    drawn = Markup("\n").join([Markup(""), *sheet, ground, *parts, Markup("")])
    return element(
        "svg", drawn, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}",
        width=width, height=height, role="img", font_family="system-ui, sans-serif", font_size=12,
    ) + "\n"  # fmt: skip


class Scale:
    """Values to pixels, linear or logarithmic.

    Args:
        values: What must have a place; on a logarithmic scale above zero.
        start: Pixel of the least value, before the margin.
        stop: Pixel of the largest.
        log: Whether it is logarithmic.
        margin: Share of the values' span that is left free at both ends.
    """

    def __init__(
        self, values: Sequence[float], start: float, stop: float, *, log: bool, margin: float = 0.08
    ) -> None:
        self._log = log
        ends = [self._place(value) for value in values]
        low, high = min(ends), max(ends)
        pad = margin * (high - low) or margin * abs(high) or margin or 0.0
        self._low, self._span = low - pad, high - low + 2 * pad
        self._start, self._stop = start, stop

    def _place(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = (self._place(value) - self._low) / self._span
        return self._start + share * (self._stop - self._start)

    def ticks(self, steps: Sequence[int] = (1, 2, 5)) -> list[float]:
        """Round values on the scale, at most six in the middle of it.

        Args:
            steps: Of a power of ten, where the scale is logarithmic.
        """
        low, high = self._low, self._low + self._span
        if self._log:
            found = [
                step * 10.0**power
                for power in range(math.floor(low), math.ceil(high) + 1)
                for step in steps
                if low <= math.log10(step * 10.0**power) <= high
            ]
            return found[:: math.ceil(len(found) / 6)] if found else [10 ** ((low + high) / 2)]
        size = 10.0 ** math.floor(math.log10(self._span / 3))
        size *= next((m for m in (5, 2) if self._span / (size * m) >= 2.5), 1)
        first = math.ceil(low / size)
        return [size * i for i in range(first, math.floor(high / size) + 1)]
