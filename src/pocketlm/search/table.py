"""The sensitivity table: the damage of each candidate of each unit, measured or filled.

Damage is the KL to the original with that unit alone quantized, in nats a token. Near the original
KL is quadratic in a unit's output error, so damage / error is one figure a unit, its *slope*:

    damage(candidate) = damage(measured) · error(candidate) / error(measured)

fills a unit from its measured candidate of the nearest error.
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
    """What is measured: all candidates where there is time, else one a unit.

    One a unit is the least: how much an error weighs differs a hundredfold between neighbouring
    blocks, and a choice that guesses it is worse than none (docs/experiments.md).

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
    note = "KL was measured for one grid of each unit, the others follow its error."
    least = takes(anchors)
    if least > limit_seconds:
        note += (
            f" That took about {least / 60:.0f} min, more than --search-minutes: it is the least "
            "that tells where bits matter."
        )
    return anchors, note


def filled(errors: Sequence[Sequence[float]], measured: Mapping[Cell, float]) -> list[list[float]]:
    """The damage of every candidate.

    Args:
        errors: Relative errors, by unit and candidate.
        measured: Damages; at least one cell of each unit.

    Returns:
        Damages in nats a token, by unit and candidate.
    """
    table: list[list[float]] = []
    for u, row in enumerate(errors):
        known = {c: measured[u, c] for c in range(len(row)) if (u, c) in measured}
        damages: list[float] = []
        for c, error in enumerate(row):
            if c in known:
                damages.append(known[c])
                continue
            near = min(known, key=lambda k: abs(_log(row[k]) - _log(error)))
            damages.append(known[near] * error / max(row[near], TINY))
        table.append(damages)
    return table


def _log(value: float) -> float:
    return math.log(max(value, TINY))
