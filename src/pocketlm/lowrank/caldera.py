"""CALDERA: W ≈ Q + L R, all three quantized (arXiv:2405.18886).

    minimise |(W - Q - L R) X|²

by turns over Q for given L R and over L R for given Q. The turns are the recipe's
steps: the quantizer before this one makes Q of W - L R, this one L R of W - Q, and again. Q's
method is the recipe's choice (the paper: LDLQ, which is gptq).

L R is found as in the paper's LPLR factorisation, with E = W - Q and H = XXᵀ: the best
factors in 32 bits first, then, `iterations` times,
    L = round(E H Rᵀ (R H Rᵀ)⁻¹),   R = round((LᵀL)⁻¹ Lᵀ E),
and the best pair of all is kept. (Rounded means: as stored.)

Deviation: factors are rounded to the nearest on integer grids of groups or rows, without the
paper's Hadamard transform and lattices.

Legend: O output rows, I input columns, R rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.factored import LowRank, Sum, best_left
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.core.tensors import Dense, Packed
from pocketlm.lowrank.factor import best_factors, factor_flops, whitening
from pocketlm.lowrank.residual import Repair, base_of


class Caldera(Repair):
    """The low-rank part of a quantized weight, its factors quantized by turns.

    Attributes:
        bits: Of the factors' codes.
        iterations: Turns of L and R.
        damping: Share of the Hessian's mean diagonal that is added.
    """

    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)

    bits: int | None = Field(default=4, ge=2, le=8)
    iterations: int = Field(default=10, ge=1, le=1000)
    damping: float = Field(1e-4, gt=0, le=1)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear as what it was, plus two quantized factors."""
        rank = self.rank_of(state.name, state.shape)
        if rank is None:
            return state
        base = base_of(state, "caldera")
        error_OI = state.reference_OI - base.dequantize()
        hessian = stats[Hessian]
        metric, notes = whitening(hessian, self.damping, 0.0)
        _, right_RI = best_factors(error_OI, rank, metric)
        right = self.encoded(right_RI, state.scale_dtype)
        best, least = None, float("inf")
        for _ in range(self.iterations):
            left_OR = best_left(error_OI, right.dequantize(), hessian, self.damping)
            left = self.encoded(left_OR, state.scale_dtype)
            lost_OI = error_OI - left.dequantize() @ right.dequantize()
            lost = float(metric.weigh(lost_OI).square().sum())
            if lost < least:
                best, least = LowRank(left, right), lost
            right = self._right(error_OI, left, state.scale_dtype)
        assert best is not None
        return state.with_current(Sum(base, best), *notes)

    def _right(self, error_OI: Tensor, left: Dense | Packed, dtype: torch.dtype) -> Dense | Packed:
        """R for a given L: least squares, whatever the inputs, since XXᵀ has full rank."""
        right_RI = torch.linalg.pinv(left.dequantize()) @ error_OI
        return self.encoded(right_RI, dtype)

    def cost(self, rows: int, columns: int) -> Cost:
        """A singular value decomposition, and the turns."""
        rank = self.rank or 0
        held = 4 * (7 * rows * columns + 3 * columns * columns)
        turns = self.iterations * (6.0 * rows * columns * rank + 2.0 * rows * columns * columns)
        return Cost(held, factor_flops(rows, columns) + columns**3 + turns, 40 * self.iterations)
