"""ASVD: truncated SVD of the weight, its columns scaled by the size of their inputs.

W ≈ U_r Σ_r V_rᵀ S⁻¹ with U Σ Vᵀ = W S, S = diag((mean |x_i|)^α) (arXiv:2312.05821,
in its absolute-mean form); Σ is shared out evenly between both factors. α = 0 is plain
SVD.

In the place of the paper's search for ranks stands `allocation: sensitivity` (`search.ranks`), for
all methods here.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import AbsMean, Stat
from pocketlm.lowrank.factor import Diagonal, factor_flops, factorised
from pocketlm.lowrank.rank import Ranked


class Asvd(Ranked):
    """SVD of scaled columns.

    Attributes:
        alpha: α; the paper takes 0.5.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = (AbsMean,)

    alpha: float = Field(0.5, ge=0, le=2)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear as two factors."""
        metric = Diagonal(stats[AbsMean].value_I() ** self.alpha)
        return factorised(state, self.rank_of(state.name, state.shape), metric)

    def cost(self, rows: int, columns: int) -> Cost:
        """A singular value decomposition."""
        return Cost(20 * rows * columns, factor_flops(rows, columns), calls=30)
