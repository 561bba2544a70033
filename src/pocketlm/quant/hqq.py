"""HQQ: a grid that suits most weights and leaves the outliers their error. No data.

minimise over the grid  |W - s c|_p,  p < 1,  by half-quadratic splitting (Badri and Shaji 2023,
mobiusml.github.io/hqq_blog, eq. 3-7): an auxiliary error E takes the outliers, in turns
    c = Q(W),   E = shrink_p(W - s c, b),   the grid by least squares for W - E,   b ← k b,
    shrink_p(x, b) = sign(x) max(|x| - |x|^(p-1) / b, 0).
The paper moves a fractional zero point. Here zero points are integers or absent, as engines have
them, so the scale moves too: s = <W - E, c> / <c, c>. Errors are measured in codes, so that b means
the same for every group. A group keeps the best of all turns, by |W - s c|_p.

Cost: 2 · `rounds` passes over the weight where symmetric (each sign of the scale), else `rounds`.

Legend: O output rows, I input columns, G groups of a row, i columns of a group.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.spec import Strict
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Stat
from pocketlm.quant.grid import (
    Grid,
    better_of,
    grouped,
    minmax_grid,
    renewed,
    round_to_grid,
)


class Hqq(Strict):
    """Half-quadratic quantization: a robust grid from the weight alone.

    Attributes:
        norm: p of the error's norm; smaller cares less for outliers.
        rounds: Turns of the iteration.
        beta: b of the first turn, for errors in codes.
        growth: k, by which b grows each turn.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    norm: float = Field(0.7, gt=0, le=2)
    rounds: int = Field(20, ge=1, le=1000)
    beta: float = Field(10.0, gt=0)
    growth: float = Field(1.01, ge=1)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear, rounded to the nearest code of the grid found.

        Raises:
            UnsupportedLayer: If the number format is no integer: others have scales by rule.
        """
        weight_OI, spec = state.reference_OI, state.spec
        if spec.type != "int":
            raise UnsupportedLayer(
                "hqq finds grids of integers only.",
                where=state.name,
                remedy="Use rtn, clip or gptq for this number format.",
            )
        best = minmax_grid(weight_OI, spec, state.scale_dtype)
        best_OG = self._error(weight_OI, best, state)
        for flip in (False, True) if spec.symmetric else (False,):
            grid, beta = minmax_grid(weight_OI, spec, state.scale_dtype, flip=flip), self.beta
            for _ in range(self.rounds):
                grid = self._moved(weight_OI, grid, state, beta)
                error_OG = self._error(weight_OI, grid, state)
                best = better_of(best, grid, error_OG < best_OG)
                best_OG = torch.minimum(best_OG, error_OG)
                beta *= self.growth
        return state.with_current(round_to_grid(weight_OI, best, spec))

    def _error(self, weight_OI: Tensor, grid: Grid, state: LinearState) -> Tensor:
        """Sum |W - s c|^p of each group [O, G]."""
        rounded_OI = round_to_grid(weight_OI, grid, state.spec).dequantize()
        return grouped((weight_OI - rounded_OI).abs() ** self.norm, state.spec).sum(-1)

    def _moved(self, weight_OI: Tensor, grid: Grid, state: LinearState, beta: float) -> Grid:
        """The grid after one turn."""
        spec = state.spec
        scale_OG1 = grid.scale_OG.to(weight_OI.dtype)[:, :, None]
        ideal_OGi = grouped(weight_OI, spec) / scale_OG1
        codes_OGi = grouped(round_to_grid(weight_OI, grid, spec).dequantize(), spec) / scale_OG1
        error_OGi = shrink(ideal_OGi - codes_OGi, beta, self.norm)
        target_OGi = ideal_OGi - error_OGi
        zero_OG = grid.zero_OG
        if zero_OG is not None:
            moved_OG = zero_OG + torch.round((codes_OGi - target_OGi).mean(-1))
            zero_OG = moved_OG.clamp(spec.code_min, spec.code_max).to(zero_OG.dtype)
        power_OG = codes_OGi.square().sum(-1)
        ratio_OG = (target_OGi * codes_OGi).sum(-1) / power_OG
        return renewed(Grid(grid.scale_OG, zero_OG), scale_OG1[:, :, 0] * ratio_OG, spec)

    def cost(self, rows: int, columns: int) -> Cost:
        """Passes over the weight, three of them a turn."""
        passes = 2 * self.rounds
        return Cost(24 * rows * columns, 60.0 * passes * rows * columns, 40 * passes)


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """The proximal operator of |x|_p: small errors become 0, large ones lose |x|^(p-1) / b."""
    size = x.abs()
    return x.sign() * (size - size ** (norm - 1) / beta).clamp(min=0).nan_to_num(0.0)
