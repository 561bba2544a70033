"""SVD-LLM: truncation in the metric of the inputs (arXiv:2403.07378).

With S Sᵀ = XXᵀ and W S = U Σ Vᵀ, dropping the singular value σ_i costs exactly σ_i² of |W X|², and
dropping several the sum of their squares:
    L R = U_r Σ_r V_rᵀ S⁻¹.

The paper takes S from the original model's inputs and then renews U for those of the compressed
model, in closed form against W X' (the first version's section on layer-wise updates). Here S is
that of the compressed model's own inputs X', for which L R is already the best of its rank: the
update has nothing left to do. What the original gave for its own inputs, W X, is aimed at by the
step `correct` before this one.

Deviation: XXᵀ is shrunk towards its diagonal for few tokens, as everywhere here
(`Hessian.shrunk_II`), and damped.

Cost: a factorisation of the Hessian for linears that share an input, a singular value decomposition
for each linear.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.lowrank.factor import best_factors, factor_flops, left_alone, stored, whitening
from pocketlm.lowrank.rank import Ranked


class SvdLlm(Ranked):
    """Truncation-aware whitening.

    Attributes:
        damping: Share of the Hessian's mean diagonal that is added before it is factorised.
        shrinkage: Share of each column's own diagonal that is added.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)

    damping: float = Field(1e-4, gt=0, le=1)
    shrinkage: float = Field(0.0, ge=0, le=10)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear as two factors."""
        rank = self.rank_of(state.name, state.shape)
        if rank is None:
            return left_alone(state)
        metric, notes = whitening(stats[Hessian], self.damping, self.shrinkage)
        left_OR, right_RI = best_factors(state.reference_OI, rank, metric)
        return state.with_current(stored(left_OR, right_RI, state.scale_dtype), *notes)

    def cost(self, rows: int, columns: int) -> Cost:
        """A Cholesky factor, its inverse, a triangular solve and a singular value decomposition."""
        held = 4 * (5 * rows * columns + 4 * columns * columns)
        flops = factor_flops(rows, columns) + columns**3 + float(rows) * columns * columns
        return Cost(held, flops, calls=40)
