"""Truncated SVD of the weight itself: the least |W - L R|, without data. The baseline.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Stat
from pocketlm.lowrank.factor import Plain, factor_flops, factorised
from pocketlm.lowrank.rank import Ranked


class Svd(Ranked):
    """Keeps the largest singular values (Eckart and Young)."""

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = ()

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear as two factors."""
        return factorised(state, self.rank_of(state.name, state.shape), Plain())

    def cost(self, rows: int, columns: int) -> Cost:
        """A singular value decomposition."""
        return Cost(16 * rows * columns, factor_flops(rows, columns), calls=20)
