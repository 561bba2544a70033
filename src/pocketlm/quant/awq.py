"""AWQ: scales up the input columns that matter, before they are rounded, and their producer down.

For linears W that read x, find the scale s [I] of least squared output error
    sum over the linears of  tr(E H Eᵀ),   E = Q(W diag(s)) diag(s)⁻¹ - W,   H = E[x xᵀ],
along s = m^a / |W|^b (AWQ, arXiv:2306.00978, eq. 4-5), m = E[x²]^½ the size of each input and |W|
the mean size of a column over the largest weight of its group; a runs over a grid, b is a or 0 (the
paper's search has b = 0, its implementation both). tr(E H Eᵀ) is the exact error of the linears'
output on the calibration tokens, from their Hessian: no activation is kept and none is run again.

Cost: 2 · steps products [O, I] × [I, I] a group, after one forward pass that gathers H.

Legend: O output rows, I input columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pocketlm.core.linalg import product
from pocketlm.core.spec import Strict
from pocketlm.core.state import Cost, LinearState, Statistics
from pocketlm.core.stats import Hessian, Stat
from pocketlm.quant.grid import (
    grouped,
    kernel_serves,
    minmax_grid,
    multiples_tried,
    round_to_grid,
    searched_grid,
    ungrouped,
)

SMALLEST, SHRINKS = 0.6, 5  # of the search for each trial's grid


class Awq(Strict):
    """Searches a scale for the columns of each group of linears whose producer can be divided.

    Attributes:
        steps: Exponents tried between 0 and 1.
        clip: Whether each trial's grid is clipped as `clip` would, at 5 shrinks; else min-max.
    """

    kind: ClassVar[Literal["fold"]] = "fold"
    needs: ClassVar[tuple[type[Stat], ...]] = (Hessian,)
    preserves: ClassVar[frozenset[str]] = frozenset({"shape"})
    makes: ClassVar[frozenset[str]] = frozenset()

    steps: int = Field(20, ge=1, le=200)
    clip: bool = True

    def scale(self, linears: Sequence[LinearState], stats: Statistics) -> Tensor | None:
        """The scale of least error, or None where none beats leaving the columns alone."""
        hessian = stats[Hessian]
        diagonal_I = hessian.diagonal_I()
        if not bool((diagonal_I > 0).any()):
            return None
        inputs_I = diagonal_I.sqrt()
        weights_I = _column_size(linears)
        trials = [torch.ones_like(inputs_I)]
        for step in range(1, self.steps + 1):
            exponent = step / self.steps
            trials += [_centred(inputs_I**exponent), _centred((inputs_I / weights_I) ** exponent)]
        weigh_II = hessian.matrix_II()
        if weigh_II.is_cuda:
            weigh_II = weigh_II.bfloat16()  # trials only compete with each other
        errors = [self._error(linears, scale_I, diagonal_I, weigh_II) for scale_I in trials]
        best = int(torch.stack(errors).nan_to_num(nan=torch.inf).argmin())
        return trials[best] if best else None

    def _error(
        self, linears: Sequence[LinearState], scale_I: Tensor, diagonal_I: Tensor, weigh_II: Tensor
    ) -> Tensor:
        """The linears' squared output error, float64 []; one rounded weight is held at a time."""
        total = torch.zeros((), dtype=torch.float64, device=scale_I.device)
        for state in linears:
            error_OI = self._left_over(state, scale_I, diagonal_I)
            total += (product(error_OI, weigh_II, terms=1) * error_OI).sum().double()
        return total

    def _left_over(self, state: LinearState, scale_I: Tensor, diagonal_I: Tensor) -> Tensor:
        """E = Q(W diag(s)) diag(s)⁻¹ - W [O, I]; by one kernel where it serves, then bfloat16."""
        weight_OI, spec, dtype = state.reference_OI, state.spec, state.scale_dtype
        if self.clip and kernel_serves(weight_OI, spec):
            from pocketlm.quant.grid_kernel import left_over

            multiples = list(multiples_tried(spec, SMALLEST, SHRINKS))
            return left_over(weight_OI, spec, dtype, diagonal_I, multiples, scale_I)
        scaled_OI = weight_OI * scale_I
        if self.clip:
            weigh_I = diagonal_I / scale_I.square()
            grid = searched_grid(scaled_OI, spec, dtype, weigh_I, smallest=SMALLEST, steps=SHRINKS)
        else:
            grid = minmax_grid(scaled_OI, spec, dtype)
        return round_to_grid(scaled_OI, grid, spec).dequantize() / scale_I - weight_OI

    def cost(self, rows: int, columns: int) -> Cost:
        """A rounding and a product with the Hessian for each trial."""
        trials = 2 * self.steps + 1
        held = 4 * (4 * rows * columns + columns * columns)
        searching = 10 * 160.0 if self.clip else 20.0
        flops = trials * rows * columns * (2.0 * columns + searching)
        return Cost(held, flops, trials * (260 if self.clip else 20), kernel=self.clip)


def _column_size(linears: Sequence[LinearState]) -> Tensor:
    """The mean over rows of |w| over its group's largest |w| [I]; never zero."""
    sizes = []
    for state in linears:
        weight_RGn = grouped(state.reference_OI, state.spec).abs()
        largest_RG1 = weight_RGn.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        shape = (state.reference_OI.shape[0], state.reference_OI.shape[1])
        sizes.append(ungrouped(weight_RGn / largest_RG1, shape, state.spec))
    mean_I = torch.cat(sizes).mean(0)
    return mean_I.clamp(min=1e-4 * float(mean_I.max()) + torch.finfo(torch.float32).tiny)


def _centred(scale_I: Tensor) -> Tensor:
    """A scale about 1: over the geometric mean of its extremes; dead columns as the least of all.

    A dead input has no size; it takes the smallest live one, and at most a factor 10⁴ is spanned.
    """
    least = torch.where(scale_I > 0, scale_I, torch.inf).min()
    scale_I = torch.maximum(scale_I, torch.maximum(least, 1e-4 * scale_I.max()))
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()
