"""The sensitivity table: the damage of each candidate of each unit, measured or filled.

Damage is the KL to the original with that unit alone quantized, in nats a token. Near the original
KL is quadratic in a unit's output error, so damage / error is one figure a unit, its *slope*:

    damage(candidate) = damage(measured) · error(candidate) / error(measured)

fills a unit from its measured candidate of the nearest error. A unit without any takes the slope of
its neighbours of the same kind, interpolated over depth in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from pocketlm.search.divergence import Variant
from pocketlm.search.units import Unit

ANCHOR_ERROR = 0.1  # large enough to stand above rounding noise, small enough to be quadratic
SMALL_ERROR = 1e-4  # below it KL drowns in rounding noise, and is quadratic anyway
TINY = 1e-12  # a damage that came out as zero still has a logarithm

Cell = tuple[int, int]  # index of a unit, index of its candidate
Choice = tuple[list[Cell], str | None]  # what is measured, and what to tell of the rest


def undominated(unit: Unit, errors: Sequence[float]) -> list[int]:
    """Candidates that no other beats: none has at most their bytes, bits and error.

    Args:
        unit: By rising bytes.
        errors: Relative errors of its candidates.

    Returns:
        Their indices.
    """

    def price(c: int) -> tuple[int, int, float]:
        return unit.candidates[c].file_bytes, unit.candidates[c].bits, errors[c]

    def beats(other: int, c: int) -> bool:
        no_worse = all(a <= b for a, b in zip(price(other), price(c), strict=True))
        return no_worse and (price(other) != price(c) or other < c)

    count = range(len(errors))
    return [c for c in count if not any(beats(other, c) for other in count)]


def anchor(errors: Sequence[float]) -> int:
    """The candidate that speaks for its unit: the coarsest of an error up to ANCHOR_ERROR."""
    fitting = [index for index, error in enumerate(errors) if error <= ANCHOR_ERROR]
    chosen = fitting or range(len(errors))
    largest = max if fitting else min
    return largest(chosen, key=lambda index: errors[index])


def choose_cells(
    units: Sequence[Unit],
    errors: Sequence[Sequence[float]],
    seconds: Callable[[Sequence[Variant]], float],
    limit_seconds: float,
) -> Choice:
    """What is measured in the time: all candidates, else one a unit, else that of every nth block.

    Args:
        units: What is free to choose.
        errors: Relative errors, by unit and candidate.
        seconds: What measuring some variants takes.
        limit_seconds: The time there is.

    Returns:
        The cells, and a sentence on what is filled in besides very small errors; None for nothing.
    """

    def takes(cells: Sequence[Cell]) -> float:
        return seconds([Variant(units[u], units[u].candidates[c]) for u, c in cells])

    anchors = [(u, anchor(row)) for u, row in enumerate(errors)]
    every = [(u, c) for u, row in enumerate(errors) for c, e in enumerate(row) if e > SMALL_ERROR]
    every = sorted({*every, *anchors})
    if takes(every) <= limit_seconds:
        return every, None
    if takes(anchors) <= limit_seconds:
        return anchors, "KL was measured for one grid of each unit, the others follow its error."
    last = max(unit.block for unit in units)
    stride = 2
    while stride < last:
        some = [(u, c) for u, c in anchors if units[u].block % stride == 0 or
                units[u].block == last]  # fmt: skip
        if takes(some) <= limit_seconds:
            break
        stride *= 2
    else:
        some = [(u, c) for u, c in anchors if units[u].block in (0, last)]
    blocks = len({units[u].block for u, _ in some})
    return some, (
        f"KL was measured for one grid of each unit in {blocks} blocks of {last + 1}; the others "
        "follow the errors of their outputs. More --search-minutes measure more."
    )


def filled(
    units: Sequence[Unit], errors: Sequence[Sequence[float]], measured: Mapping[Cell, float]
) -> list[list[float]]:
    """The damage of every candidate.

    Args:
        units: What is free to choose.
        errors: Relative errors, by unit and candidate.
        measured: Damages; at least one cell.

    Returns:
        Damages in nats a token, by unit and candidate.
    """
    slopes = [_slope(u, units, errors, measured) for u in range(len(units))]
    table: list[list[float]] = []
    for u, row in enumerate(errors):
        known = {c: measured[u, c] for c in range(len(row)) if (u, c) in measured}
        damages: list[float] = []
        for c, error in enumerate(row):
            if not known:
                damages.append(slopes[u] * error)
            elif c in known:
                damages.append(known[c])
            else:
                near = min(known, key=lambda k: abs(_log(row[k]) - _log(error)))
                damages.append(known[near] * error / max(row[near], TINY))
        table.append(damages)
    return table


def _slope(
    u: int,
    units: Sequence[Unit],
    errors: Sequence[Sequence[float]],
    measured: Mapping[Cell, float],
) -> float:
    """Damage for each error of a unit, from the measured units of its kind, else from all."""
    slopes = {
        (v, c): kl / errors[v][c] for (v, c), kl in measured.items() if errors[v][c] > SMALL_ERROR
    }
    slopes = slopes or {
        cell: kl / max(errors[cell[0]][cell[1]], TINY) for cell, kl in measured.items()
    }
    alike = [
        (units[v].block, _log(s)) for (v, _), s in slopes.items() if units[v].kind == units[u].kind
    ]
    if not alike:
        logs = sorted(_log(slope) for slope in slopes.values())
        return math.exp(logs[len(logs) // 2])
    return math.exp(_interpolated(sorted(alike), units[u].block))


def _interpolated(points: Sequence[tuple[int, float]], x: int) -> float:
    """Linear between the nearest points on both sides, constant beyond the ends."""
    before = [point for point in points if point[0] <= x]
    after = [point for point in points if point[0] >= x]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _log(value: float) -> float:
    return math.log(max(value, TINY))
