"""What a search finds: typed, with a JSON round trip."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pocketlm.core.spec import QuantSpec, Recipe


class Point(BaseModel):
    """One way to spend bits.

    Attributes:
        label: "allocated", or the one grid of a uniform choice.
        bits_per_weight: Real bits of the compressed linears, scales and zero points counted.
        file_bytes: Of the weight files, headers and kept tensors counted; never below what is
            written.
        damage: Sum of the units' damages, in nats a token: a forecast to compare by, not a loss.
        grids: Grid in words → how many linears have it.
    """

    model_config = ConfigDict(extra="forbid")

    label: str
    bits_per_weight: float
    file_bytes: int
    damage: float
    grids: dict[str, int]


class UnitFinding(BaseModel):
    """One unit's line of the sensitivity table.

    Attributes:
        name: Module path, or that of what the target fuses.
        linears: How many linears.
        weights: How many weights.
        grids: Its candidates; None: it keeps its precision.
        errors: Relative output error of each.
        damages: KL of the model with this unit alone on it, in nats a token.
        measured: Whether that KL was measured; else it follows the error.
        chosen: Index of the chosen one; None without a budget.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    linears: int
    weights: int
    grids: list[QuantSpec | None]
    errors: list[float]
    damages: list[float]
    measured: list[bool]
    chosen: int | None


class SearchResult(BaseModel):
    """What a search found.

    Attributes:
        recipe: With the chosen grids; None without a budget.
        chosen: What the choice comes to; None without a budget.
        frontier: The best choices from the smallest budget to the largest.
        uniform: The same grid everywhere, where every unit may have it.
        units: The sensitivity table.
        notes: What a user must be told.
        calibration: What was measured on.
        table: Directory of the findings.
        seconds: This search took.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: Recipe | None
    chosen: Point | None
    frontier: list[Point]
    uniform: list[Point]
    units: list[UnitFinding]
    notes: list[str]
    calibration: str
    table: str
    seconds: float
