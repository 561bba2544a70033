"""SmoothQuant: moves part of the activations' outliers into the weights.

    s_i = |x_i|^a / max|W_i|^(1-a)   (arXiv:2211.10438, eq. 4)

The producer is divided by s, the readers' columns multiplied: activations become easier to round,
weights a little harder; the function stays. One forward pass.

The paper takes one strength a for the whole model and |x_i| = max|x_i|. Without a given strength it
is searched for each group of linears that share an input: the one of least squared output error
    sum over the linears of  |X Wᵀ - Qa(X diag(s)⁻¹) Qw(W diag(s))ᵀ|²
on a sample X of the calibration inputs, both roundings at once, Qw to nearest.
Deviation: the search takes the root mean square of x_i for its size. Its minimum is lower than with
the largest: one token should not decide over a column (docs/experiments.md).

Cost: one product [T, I] × [I, O] of the sample for each strength.

Legend: T sampled tokens, O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.activations import InputQuantizer, static_quantizer
from pocketlm.core.spec import ActivationSpec, Strict
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import AbsMax, Sample, Stat
from pocketlm.quant.grid import minmax_grid, round_to_grid

SMALLEST = 1e-5  # of |x| and |w|, as in the paper's code, so that dead columns have a scale


class Smoothquant(Strict):
    """Divides activations by what their range can spare.

    Attributes:
        strength: How much of the activations' range goes into the weights: a; None: searched.
        steps: Strengths that the search tries between 0 and 1.
    """

    kind: ClassVar[Literal["fold"]] = "fold"
    needs: ClassVar[tuple[type[Stat], ...]] = (AbsMax, Sample)
    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})
    makes: ClassVar[frozenset[str]] = frozenset()

    strength: float | None = Field(None, ge=0, le=1)
    steps: int = Field(20, ge=1, le=200)

    def scale(self, linears: Sequence[LinearState], stats: Statistics) -> Tensor | None:
        """s; None where no calibration token reached the linears, or no scale lowers the error."""
        largest_I = stats[AbsMax].value_I()
        if not bool((largest_I > 0).any()):
            return None
        weights_I = torch.stack([s.reference_OI.abs().amax(0) for s in linears]).amax(0)
        if self.strength is not None:
            return smoothing(largest_I, weights_I, self.strength)
        x_TI = stats[Sample].rows_TI()
        size_I = x_TI.square().mean(0).sqrt()
        best_I, best_error = None, joint_error(linears, x_TI, torch.ones_like(size_I))
        for step in range(self.steps + 1):
            scale_I = smoothing(size_I, weights_I, step / self.steps)
            error = joint_error(linears, x_TI, scale_I)
            if error < best_error:
                best_I, best_error = scale_I, error
        return best_I

    def cost(self, rows: int, columns: int) -> Cost:
        """A rounding and a product with the sample for each strength."""
        trials = 1 if self.strength is not None else self.steps + 2
        held = 4 * (3 * rows * columns + 2 * Sample.ROWS * (rows + columns))
        flops = trials * (20.0 * rows * columns + 2.0 * Sample.ROWS * rows * columns)
        return Cost(held, flops, 40 * trials)


def smoothing(inputs_I: Tensor, weights_I: Tensor, strength: float) -> Tensor:
    """The scale of eq. 4, centred about 1: a factor that all columns share changes nothing.

    Args:
        inputs_I: The size of each input.
        weights_I: The largest weight of each column.
        strength: a.
    """
    inputs_I, weights_I = inputs_I.clamp(min=SMALLEST), weights_I.clamp(min=SMALLEST)
    scale_I = inputs_I**strength / weights_I ** (1 - strength)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


def joint_error(linears: Sequence[LinearState], x_TI: Tensor, scale_I: Tensor) -> float:
    """The squared output error of linears with scaled weights and inputs, both rounded.

    Args:
        linears: Linears that read x; their grids and the rounding of their inputs.
        x_TI: Some of their inputs.
        scale_I: Multiplies the weights' columns, divides the inputs.
    """
    scaled_TI = x_TI / scale_I
    rounded_TI = _rounded(scaled_TI, linears[0].inputs)
    total = torch.zeros((), dtype=torch.float64, device=x_TI.device)
    for state in linears:
        scaled_OI = state.reference_OI * scale_I
        grid = minmax_grid(scaled_OI, state.spec, state.scale_dtype)
        rounded_OI = round_to_grid(scaled_OI, grid, state.spec).dequantize()
        error_TO = rounded_TI @ rounded_OI.T - x_TI @ state.reference_OI.T
        total += error_TO.square().sum().double()
    return float(total)


def _rounded(x_TI: Tensor, spec: ActivationSpec | None) -> Tensor:
    if spec is None:
        return x_TI
    if spec.dynamic:
        return InputQuantizer(spec)(x_TI)
    return static_quantizer(x_TI.amin(), x_TI.amax(), spec)(x_TI)
