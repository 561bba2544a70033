"""SmoothQuant: moves part of the activations' outliers into the weights.

    s_i = max|x_i|^a / max|W_i|^(1-a)   (arXiv:2211.10438, eq. 4)

The producer is divided by s, the readers' columns multiplied: activations become easier to round,
weights a little harder; the function stays. One forward pass; no search.

Legend: O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.spec import Strict
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import AbsMax, Stat

SMALLEST = 1e-5  # of |x| and |w|, as in the paper's code, so that dead columns have a scale


class Smoothquant(Strict):
    """Divides activations by what their range can spare.

    Attributes:
        strength: How much of the activations' range goes into the weights: a.
    """

    kind: ClassVar[Literal["fold"]] = "fold"
    summary: ClassVar[str] = "moves outliers of activations into weights (needs a next step)"
    needs: ClassVar[tuple[type[Stat], ...]] = (AbsMax,)
    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})

    strength: float = Field(0.5, ge=0, le=1)

    def scale(self, linears: Sequence[LinearState], stats: Statistics) -> Tensor | None:
        """s, or None where no calibration token reached the linears."""
        largest_I = stats[AbsMax].value_I()
        if not bool((largest_I > 0).any()):
            return None
        weights_I = torch.stack([s.reference_OI.abs().amax(0) for s in linears]).amax(0)
        inputs_I, weights_I = largest_I.clamp(min=SMALLEST), weights_I.clamp(min=SMALLEST)
        return inputs_I**self.strength / weights_I ** (1 - self.strength)

    def cost(self, rows: int, columns: int) -> Cost:
        """One pass over the weight."""
        return Cost(4 * rows * columns, 2.0 * rows * columns, 10)
