"""LQER: a low-rank part makes up for the error of a quantized weight, W ≈ Q + L R.

L R is the best factorisation of W - Q in a metric of the inputs (`factor`):

none        plain SVD of the error: LoRC (ZeroQuant-V2, arXiv:2303.08302) and LQER
            (arXiv:2402.02446);
mean        S = diag(mean |x_i|): L²QER (the same paper). Its common factor
            1 / √(min · max) cancels in S … S⁻¹ and is left out;
whitening   S Sᵀ = XXᵀ, which minimises |(W - Q - L R) X|² (QERA's exact solution,
            arXiv:2410.06040).

Deviation: L²QER takes the largest of the batches' means; here it is the mean over all tokens.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pocketlm.core.factored import LowRank, Sum
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import AbsMean, Hessian, Stat
from pocketlm.lowrank.factor import Diagonal, Metric, Plain, best_factors, factor_flops, whitening
from pocketlm.lowrank.residual import Repair, base_of


class Lqer(Repair):
    """Low-rank repair of a quantization error.

    Attributes:
        scaling: The metric, see above.
        damping: Share of the Hessian's mean diagonal that is added; with "whitening".
    """

    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian, AbsMean)

    scaling: Literal["none", "mean", "whitening"] = "whitening"
    damping: float = Field(1e-4, gt=0, le=1)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear as what it was, plus two factors."""
        rank = self.rank_of(state.name, state.shape)
        if rank is None:
            return state
        base = base_of(state, type(self).__name__.lower())
        error_OI = state.reference_OI - base.dequantize()
        metric, notes = self._metric(stats)
        left_OR, right_RI = best_factors(error_OI, rank, metric)
        dtype = state.scale_dtype
        low = LowRank(self.encoded(left_OR, dtype), self.encoded(right_RI, dtype))
        return state.with_current(Sum(base, low), *notes)

    def _metric(self, stats: Statistics) -> tuple[Metric, tuple[Note, ...]]:
        if self.scaling == "mean":
            return Diagonal(stats[AbsMean].value_I()), ()
        if self.scaling == "whitening":
            return whitening(stats[Hessian], self.damping, 0.0)
        return Plain(), ()

    def cost(self, rows: int, columns: int) -> Cost:
        """A singular value decomposition, exact unless the weight is large."""
        held = 4 * (6 * rows * columns + 3 * columns * columns)
        return Cost(held, factor_flops(rows, columns) + columns**3, calls=60)


class Lorc(Lqer):
    """LoRC: what LQER does, without data."""

    needs: ClassVar[tuple[type[Stat], ...]] = ()

    scaling: Literal["none"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride]
