"""The Pareto plot: its frontier, and a document that stands alone."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from pocketlm.evaluate.bootstrap import Interval
from pocketlm.report.pareto import Point, frontier, pareto_svg, size_panel, speed_panel


def point(name: str, x: float, kl: float) -> Point:
    return Point(name, x, Interval(value=kl, low=kl * 0.9, high=kl * 1.1))


POINTS = [point("w3", 3e6, 0.3), point("w4", 4e6, 0.05), point("bad", 5e6, 0.2),
          point("w8", 8e6, 0.001), point("same", 8e6, 0.002)]  # fmt: skip


def test_the_frontier_is_what_nothing_beats():
    assert [p.name for p in frontier(POINTS, more_is_better=False)] == ["w3", "w4", "w8"]
    assert [p.name for p in frontier(POINTS, more_is_better=True)] == ["w8"]
    assert [p.name for p in frontier(POINTS[:2], more_is_better=True)] == ["w4"]


def test_the_plot_is_a_document_with_every_name_escaped():
    points = [*POINTS, point("<out & co>", 2e6, 0.0)]
    text = pareto_svg([size_panel(points, 1.6e7), speed_panel(points[:1], None)])
    root = ElementTree.fromstring(text)
    words = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")]
    for name in ("w3", "w4", "bad", "w8", "<out & co>", "original", "better: down and left"):
        assert name in words
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    assert [c.get("class") for c in circles].count("dot") == 5
    for circle in circles[: len(points)]:
        assert 0 < float(circle.get("cx")) < 460
        assert 0 < float(circle.get("cy")) < 340
    heights = {n: float(c.get("cy")) for n, c in zip(
        [p.name for p in points], circles, strict=False)}  # fmt: skip
    assert heights["w3"] < heights["w4"] < heights["w8"] < heights["<out & co>"]
