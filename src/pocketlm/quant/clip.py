"""Clip search: shrinks each group's grid to where the weighted rounding error is least.

minimise over the shrink p:  sum_i m_i (w_i - Q_p(w_i))²

m_i = H_ii, the input's energy (AWQ's clipping, arXiv:2306.00978, weighs outputs by their inputs
likewise), or m_i = 1 / U_ii² with H⁻¹ = UᵀU, the part of an error in column i that GPTQ's feedback
leaves (arXiv:2210.17323, eq. 2). The second gives the smaller error of each layer on the
calibration text, the first the better model: docs/experiments.md has both.

A grid step: what follows (gptq, rtn) keeps its scales and zero points. Cost: `steps` passes over
the weight, twice that where symmetric (each sign of the scale). Scales that are powers of two have
two neighbours worth trying, whatever `steps` and `smallest` say.

Legend: I input columns.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.spec import Strict
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.quant.gptq import column_order
from pocketlm.quant.grid import round_to_grid, searched_grid


class Clip(Strict):
    """Searches the clipping of every group.

    Attributes:
        weighting: "diagonal": H_ii; "feedback": 1 / U_ii²; "none": all columns alike.
        smallest: The strongest shrink of the min-max range that is tried.
        steps: How many shrinks are tried.
        damping: Of the Hessian, where the weighting is "feedback"; best the same as gptq's.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)
    preserves: ClassVar[frozenset[str]] = frozenset({"mask", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    weighting: Literal["diagonal", "feedback", "none"] = "diagonal"
    smallest: float = Field(0.3, gt=0, lt=1)
    steps: int = Field(24, ge=1, le=1000)
    damping: float = Field(0.01, gt=0, le=1)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear, rounded to the nearest code of the searched grid."""
        grid = searched_grid(
            state.reference_OI,
            state.spec,
            state.scale_dtype,
            self._importance_I(stats[Hessian]),
            smallest=self.smallest,
            steps=self.steps,
            shared_absmax=state.shared_absmax,
        )
        return state.with_current(round_to_grid(state.reference_OI, grid, state.spec))

    def _importance_I(self, hessian: Hessian) -> Tensor | None:
        diagonal_I = hessian.diagonal_I()
        # Where no token was seen, all columns count the same.
        if self.weighting == "none" or not bool((diagonal_I > 0).any()):
            return None
        if self.weighting == "diagonal":
            return diagonal_I
        order_I = column_order(hessian, "activation")
        assert order_I is not None
        importance_I = torch.empty_like(diagonal_I)
        factor = hessian.inverse_factor(self.damping, order_I)
        importance_I[order_I] = factor.upper_II.diagonal().square().reciprocal()
        return importance_I

    def cost(self, rows: int, columns: int) -> Cost:
        """2 · steps passes over the weight, some rows at a time; the factor is shared with gptq."""
        passes = 2 * self.steps
        flops = 160.0 * passes * rows * columns
        return Cost(9 * rows * columns, flops, 25 * passes, kernel=True)
