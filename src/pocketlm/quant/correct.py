"""Correction for inputs that earlier compression has changed (asymmetric calibration).

A linear should give for the compressed model's inputs X what the original gave for the original's
X₀. The target of least squared error |W X₀ - W' X|² is
    W' = W X₀Xᵀ (XXᵀ)⁻¹ = W + W D H⁻¹,   D = (X₀ - X)Xᵀ,  H = XXᵀ + damping,
and for any Q, |W X₀ - Q X|² = |(W' - Q) X|² + what no Q can mend. So every later step (clip, gptq,
refine) takes W' for W and does asymmetric calibration without knowing it (the objective of GPTAQ,
arXiv:2504.02692, eq. 4; its column-wise update is another way to the same target).

Cost: one more stream of activations, O(rows · columns²) and a factorisation.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from pocketlm.core.spec import Strict
from pocketlm.core.state import Cost, LinearState, Note, Statistics
from pocketlm.core.stats import Drift, Hessian, Stat


class Correct(Strict):
    """Moves what the next steps approximate to what makes up for changed inputs.

    Attributes:
        strength: Share of the correction that is taken; 1 trusts the calibration text fully.
        damping: Share of the Hessian's mean diagonal that is added.
    """

    kind: ClassVar[Literal["linear"]] = "linear"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian, Drift)
    preserves: ClassVar[frozenset[str]] = frozenset({"grid", "shape"})
    makes: ClassVar[frozenset[str]] = frozenset()

    strength: float = Field(0.5, gt=0, le=1)
    damping: float = Field(0.05, gt=0, le=1)

    def compress(self, state: LinearState, stats: Statistics) -> LinearState:
        """The linear with another reference; nothing is quantized yet."""
        drift = stats[Drift]
        if not drift.tokens:
            text = "its inputs have no counterpart in the original model: not corrected."
            return replace(state, notes=(*state.notes, Note("correct", text)))
        if not stats[Hessian].reached:
            return state
        factor = stats[Hessian].inverse_factor(self.damping, None)
        moved_OI = state.reference_OI @ drift.matrix_II().to(state.reference_OI)
        upper_II = factor.upper_II
        correction_OI = (moved_OI @ upper_II.T) @ upper_II
        return replace(state, reference_OI=state.reference_OI + self.strength * correction_OI)

    def cost(self, rows: int, columns: int) -> Cost:
        """Three products with a square matrix and its factor."""
        held = 4 * (3 * rows * columns + 4 * columns * columns)
        return Cost(held, 6.0 * rows * columns * columns + columns**3, 10)
