"""Round to nearest: no data, min-max grid. The baseline of every other method.

Cost: one pass over the weight.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pocketlm.core.spec import Strict
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Stat
from pocketlm.quant.grid import grid_of, round_to_grid


class Rtn(Strict):
    """Rounds each weight to the nearest level of its tile's grid.

    An earlier step's grid (``clip``) is kept; else the grid is min-max.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = ()
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "grid", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear on its grid."""
        return state.with_current(round_to_grid(state.reference_OI, grid_of(state), state.spec))

    def cost(self, rows: int, columns: int) -> Cost:
        """One pass over the weight, with two temporaries."""
        return Cost(bytes_held=9 * rows * columns, flops=10.0 * rows * columns, calls=20)
