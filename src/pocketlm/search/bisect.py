"""Which restored units lower a model's KL most: adaptive group testing by halves.

gain(S) = KL(compressed) - KL(compressed, the units of S restored)

Best first: the range of units with the largest gain is halved, the left half is measured, the right
one taken to gain the rest until its turn comes, when it is measured too. A single unit that is
measured and stands first is found. Finding m of N units takes about m log2(N / m) measurements;
where that is no less than N, each unit is measured by itself. Ranges whose parts cancel
each other (gains of both signs) are not looked into: gains are rarely negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOGETHER = 4  # ranges measured in one pass over the model

Range = tuple[int, int]  # units from, up to
Measure = Callable[[Sequence[Range]], list[float]]


@dataclass(frozen=True)
class Suspect:
    """A range of units and what restoring it gains.

    Attributes:
        units: From, up to.
        gain: In nats a token.
        measured: Else taken from the range that it is half of.
    """

    units: Range
    gain: float
    measured: bool


def forecast(units: int, wanted: int) -> int:
    """About how many measurements `find_worst` makes, at most one a unit."""
    wanted = min(wanted, units)
    return min(units, wanted * (2 + math.ceil(math.log2(max(1, units / max(wanted, 1))))))


def find_worst(
    units: int, whole_gain: float, wanted: int, measure: Measure, least_gain: float
) -> list[Suspect]:
    """The single units with the largest gains, largest first.

    Args:
        units: How many there are.
        whole_gain: Of restoring all of them, measured.
        wanted: How many to find.
        measure: Gives the gains of ranges.
        least_gain: Ranges that gain less are left alone.

    Returns:
        `wanted` of them, or fewer where no other gains as much as `least_gain`.
    """
    open_: list[Suspect] = [Suspect((0, units), whole_gain, True)]
    if forecast(units, wanted) == units:  # halving would take no fewer
        singles = [(at, at + 1) for at in range(units)]
        parts = [singles[at : at + TOGETHER] for at in range(0, units, TOGETHER)]
        open_ = [
            Suspect(unit, gain, True)
            for part in parts
            for unit, gain in zip(part, measure(part), strict=True)
        ]
    found: list[Suspect] = []
    while open_:
        open_.sort(key=lambda s: -s.gain)
        open_ = [s for s in open_ if s.gain >= least_gain]
        while open_ and open_[0].measured and _width(open_[0]) == 1 and len(found) < wanted:
            found.append(open_.pop(0))
        if len(found) == wanted or not open_:
            break
        together = min(TOGETHER, wanted - len(found))
        chosen = [s for s in open_ if not s.measured or _width(s) > 1][:together]
        asked = [_first_half(s.units) if s.measured else s.units for s in chosen]
        for suspect, part, gain in zip(chosen, asked, measure(asked), strict=True):
            open_.remove(suspect)
            open_.append(Suspect(part, gain, True))
            if suspect.measured:
                rest = (part[1], suspect.units[1])
                open_.append(Suspect(rest, suspect.gain - gain, False))
    return found


def _width(suspect: Suspect) -> int:
    return suspect.units[1] - suspect.units[0]


def _first_half(units: Range) -> Range:
    return units[0], (units[0] + units[1]) // 2
