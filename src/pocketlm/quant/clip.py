"""Clip search: shrinks each group's grid to where the weighted rounding error is least.

minimise over the shrink p:  sum_i h_i (w_i - Q_p(w_i))²,  h the Hessian's diagonal.

A grid step: what follows (rtn, gptq) keeps its scales and zero points. Cost: `steps` passes over
the weight, twice that where symmetric (each sign of the scale).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pocketlm.core.spec import Strict
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.quant.grid import round_to_grid, searched_grid


class Clip(Strict):
    """Searches the clipping of every group.

    Attributes:
        smallest: The strongest shrink of the min-max range that is tried.
        steps: How many shrinks are tried.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    summary: ClassVar[str] = "search of each group's clipping; a grid for rtn or gptq"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)
    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})

    smallest: float = Field(0.5, gt=0, lt=1)
    steps: int = Field(40, ge=1, le=1000)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear, rounded to the nearest code of the searched grid."""
        importance_I = stats[Hessian].diagonal_I()
        if not bool((importance_I > 0).any()):
            importance_I = None  # no token was seen: all columns count the same
        grid = searched_grid(
            state.reference_OI,
            state.spec,
            state.scale_dtype,
            importance_I,
            smallest=self.smallest,
            steps=self.steps,
        )
        return state.with_current(round_to_grid(state.reference_OI, grid, state.spec))

    def cost(self, rows: int, columns: int) -> Cost:
        """2 · steps passes over the weight, some rows at a time."""
        passes = 2 * self.steps
        return Cost(9 * rows * columns, 160.0 * passes * rows * columns, 25 * passes)
