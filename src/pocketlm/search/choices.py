"""What choices come to in bits, bytes and damage: the frontier, uniform grids, the chosen one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pocketlm.core.spec import QuantSpec
from pocketlm.engine.grids import Grids, grid_text
from pocketlm.search.allocate import allocate, smallest
from pocketlm.search.budget import Spent
from pocketlm.search.results import Point, UnitFinding
from pocketlm.search.table import Cell
from pocketlm.search.units import Unit

FRONTIER_POINTS = 13


class Choices:
    """What choices of one sensitivity table come to.

    Args:
        grids: Of every compressed linear; those of the units are replaced.
        units: What is free to choose.
        damages: By unit and candidate.
        before: What is spent outside the units.
    """

    def __init__(
        self,
        grids: Grids,
        units: Sequence[Unit],
        damages: Sequence[Sequence[float]],
        before: Spent,
    ) -> None:
        self._grids, self._units = grids, units
        self._damages, self._before = damages, before

    def point(self, label: str, chosen: Sequence[int]) -> Point:
        """A choice in figures."""
        candidates = [unit.candidates[c] for unit, c in zip(self._units, chosen, strict=True)]
        specs: dict[str, QuantSpec] = dict(self._grids.quantized)
        for candidate in candidates:
            specs.update(candidate.specs)
        bits = self._before.bits + sum(candidate.bits for candidate in candidates)
        return Point(
            label=label,
            bits_per_weight=bits / self._before.weights,
            file_bytes=self._before.file_bytes + sum(c.file_bytes for c in candidates),
            damage=sum(row[c] for row, c in zip(self._damages, chosen, strict=True)),
            grids=dict(Counter(grid_text(spec) for spec in specs.values()).most_common()),
        )

    def frontier(self) -> list[Point]:
        """The best choices from the smallest budget in bits to the largest."""
        prices = [[candidate.bits for candidate in unit.candidates] for unit in self._units]
        low, high = smallest(prices), sum(max(row) for row in prices)
        steps = max(FRONTIER_POINTS - 1, 1)
        budgets = sorted({low + (high - low) * step // steps for step in range(steps + 1)})
        found = [self.point("allocated", allocate(self._damages, prices, b)) for b in budgets]
        return list({point.bits_per_weight: point for point in found}.values())

    def uniform(self) -> list[Point]:
        """The same grid for every unit, where each may have it."""
        points: list[Point] = []
        for spec in dict.fromkeys(c.spec for unit in self._units for c in unit.candidates):
            if spec is None:
                continue
            chosen = [  # embedding and head keep their precision
                next(
                    (
                        i
                        for i, c in enumerate(unit.candidates)
                        if c.spec == (None if unit.end else spec)
                    ),
                    None,
                )
                for unit in self._units
            ]
            if None not in chosen:
                points.append(self.point(grid_text(spec), [c for c in chosen if c is not None]))
        return points


def findings(
    units: Sequence[Unit],
    errors: Sequence[Sequence[float]],
    damages: Sequence[Sequence[float]],
    measured: Mapping[Cell, float],
    chosen: Sequence[int] | None,
) -> list[UnitFinding]:
    """The table, unit by unit."""
    return [
        UnitFinding(
            name=unit.name,
            linears=len(unit.linears),
            weights=unit.weights,
            grids=[candidate.spec for candidate in unit.candidates],
            errors=list(errors[u]),
            damages=list(damages[u]),
            measured=[(u, c) in measured for c in range(len(unit.candidates))],
            chosen=None if chosen is None else chosen[u],
        )
        for u, unit in enumerate(units)
    ]
