"""A weight on its grid as a differentiable function of what learned methods move.

    ŵ = s · (clamp(round(w / s + v + z)) - z)

v are offsets in codes; s and z come from the grid's ends, of which each may be multiplied:
    symmetric:   s = m · s₀
    asymmetric:  s = (m₁ · high - m₂ · low) / (2^bits - 1),   z = round(code_min - m₂ · low / s)
Both are rounded as they will be stored. Rounding passes gradients straight through
(arXiv:1308.3432). With `in` 1 for what lies within the codes and 0 beyond:
    ∂ŵ/∂v = s · in,   ∂ŵ/∂s = (code - z) - in · w / s,   ∂ŵ/∂z = s · (in - 1).

Legend: O output rows, I input columns, G groups of a row, i columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.reconstruct import Parameter, Schedule, reconstruct
from pocketlm.core.state import BlockTask, Cost, LinearState
from pocketlm.core.tensors import PackedInt
from pocketlm.quant.grid import Grid, grouped, minmax_grid, smallest_scale


class FakeQuant(torch.autograd.Function):
    """ŵ [O, G, i]; nothing but the arguments is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, v: Tensor | None, s: Tensor, z: Tensor | None, low: int, high: int
    ) -> Tensor:
        """ŵ from w [O, G, i], v of the same shape, s and z [O, G, 1]."""
        ctx.save_for_backward(w, v, s, z)
        ctx.low, ctx.high = low, high
        code = _place(w, v, s, z).round_().clamp_(low, high)
        return (code if z is None else code.sub_(z)).mul_(s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of v, s and z; w is not learned but through v."""
        (g,) = gradients
        w, v, s, z = ctx.saved_tensors
        _, needs_v, needs_s, needs_z = ctx.needs_input_grad[:4]
        code = _place(w, v, s, z).round_()
        inside_g = g * ((code >= ctx.low) & (code <= ctx.high))
        of_s = of_z = None
        if needs_s:
            level = code.clamp_(ctx.low, ctx.high)
            level = level if z is None else level.sub_(z)
            of_s = (g * level).sum(-1, keepdim=True) - (inside_g * w).sum(-1, keepdim=True) / s
        if needs_z:
            of_z = (inside_g - g).sum(-1, keepdim=True) * s
        return None, inside_g.mul_(s) if needs_v else None, of_s, of_z, None, None


def _place(w: Tensor, v: Tensor | None, s: Tensor, z: Tensor | None) -> Tensor:
    """Where weights lie among the codes, before rounding."""
    place = w / s
    if v is not None:
        place += v
    if z is not None:
        place += z
    return place


OPERATIONS = 40  # of an iteration's W(θ) and its gradient, each a pass over the weight
FLOPS_A_PASS = 16.0  # of matrix products in the time that a pass over a weight takes


def passes_cost(rows: int, columns: int, iterations: int, bytes_a_weight: int) -> Cost:
    """What learning takes for one linear beside forward and backward passes of the block."""
    flops = FLOPS_A_PASS * OPERATIONS * iterations * rows * columns
    return Cost(bytes_a_weight * rows * columns, flops, OPERATIONS * iterations)


def start_grid(state: LinearState) -> Grid:
    """The grid that an earlier step chose, else min-max."""
    earlier = state.grid()
    if earlier is not None:
        return Grid(earlier.scale_OG, earlier.zero_OG)
    return minmax_grid(state.reference_OI, state.spec, state.scale_dtype)


def ends_of(grid: Grid, state: LinearState) -> tuple[Tensor, ...]:
    """What a grid is made of, float32 [O, G] each: its scale, or its high and its low end."""
    scale_OG = grid.scale_OG.float()
    if grid.zero_OG is None:
        return (scale_OG,)
    zero_OG = grid.zero_OG.float()
    return (state.spec.code_max - zero_OG) * scale_OG, (state.spec.code_min - zero_OG) * scale_OG


class LearnedGrid:
    """A Learner (core/reconstruct.py): the weight on a grid, of which some parts are learned.

    Args:
        state: The linear.
        ends: From `ends_of`: what the multipliers multiply.
        multipliers: One [O, G] for each end; none where the grid stays.
        offsets: v [O, G, i]; None: none.
        shape: Applied to the multipliers, such as a sigmoid.
    """

    def __init__(
        self,
        state: LinearState,
        ends: tuple[Tensor, ...],
        multipliers: Sequence[Parameter] = (),
        offsets: Parameter | None = None,
        shape: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.parameters: Sequence[Parameter] = (
            *multipliers,
            *(() if offsets is None else (offsets,)),
        )
        self._state, self._ends, self._multipliers, self._shape = state, ends, multipliers, shape
        self._offsets = None if offsets is None else offsets.values
        self._weight_OGi = grouped(state.reference_OI, state.spec)

    def weight_OI(self) -> Tensor:
        """The weight [O, I], float32, differentiable in the parameters."""
        scale_OG, zero_OG = self._grid()
        spec, zero_OG1 = self._state.spec, None if zero_OG is None else zero_OG[:, :, None]
        weight_OGi = FakeQuant.apply(
            self._weight_OGi, self._offsets, scale_OG[:, :, None], zero_OG1,
            spec.code_min, spec.code_max,
        )  # fmt: skip
        return weight_OGi.view_as(self._state.reference_OI)

    def packed(self) -> PackedInt:
        """The weight as it is kept; it decodes to `weight_OI`, bit by bit."""
        spec = self._state.spec
        with torch.no_grad():
            scale_OG, zero_OG = self._grid()
            zero_OG1 = None if zero_OG is None else zero_OG[:, :, None]
            place_OGi = _place(self._weight_OGi, self._offsets, scale_OG[:, :, None], zero_OG1)
            codes_OGi = place_OGi.round_().clamp_(spec.code_min, spec.code_max).to(torch.int8)
        return PackedInt(
            codes_OGi.view_as(self._state.reference_OI),
            scale_OG.to(self._state.scale_dtype),
            None if zero_OG is None else zero_OG.to(torch.int8),
            spec.bits,
        )

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [O, G], float32, rounded as they will be stored."""
        spec, moved = self._state.spec, self._ends
        if self._multipliers:
            pairs = zip(self._ends, self._multipliers, strict=True)
            moved = [end * self._shape(multiplier.values) for end, multiplier in pairs]
        if len(moved) == 1:
            return _stored(moved[0], self._state.scale_dtype), None
        high_OG, low_OG = moved
        scale_OG = (high_OG - low_OG) / (spec.code_max - spec.code_min)
        scale_OG = _stored(scale_OG, self._state.scale_dtype)
        zero_OG = spec.code_min - low_OG / scale_OG
        rounded_OG = zero_OG.detach().round().clamp_(spec.code_min, spec.code_max)
        return scale_OG, _straight_through(zero_OG, rounded_OG)


def learn(
    task: BlockTask, learner_of: Callable[[LinearState], LearnedGrid], schedule: Schedule
) -> dict[str, LinearState]:
    """The states of a block's linears after learning, by module path.

    Args:
        task: The block.
        learner_of: Says what is learned of a linear.
        schedule: How.
    """
    learners = {name: learner_of(state) for name, state in task.states.items()}
    outcome = reconstruct(task, learners, schedule)
    return {
        name: state.with_current(learners[name].packed(), *outcome.notes(name))
        for name, state in task.states.items()
    }


def _stored(scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded as they are stored, never to nothing; the gradient goes straight through."""
    tiny = smallest_scale(dtype)
    kept_OG = scale_OG.detach().to(dtype).float()
    least_OG = torch.where(kept_OG < 0, -tiny, tiny)
    return _straight_through(scale_OG, torch.where(kept_OG.abs() < tiny, least_OG, kept_OG))


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of `value`."""
    return rounded + (value - value.detach())
