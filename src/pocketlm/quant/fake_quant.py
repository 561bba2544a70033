"""A weight in its number format as a differentiable function of what learned methods move.

    ŵ = s · (nearest level to w / s + v, z)

v are offsets, in gaps between levels: for integers in codes, nearest = clamp(round(·) + z) - z.
s and z come from the grid's ends, of which each may be multiplied:
    symmetric:   s = m · s₀
    asymmetric:  s = (m₁ · high - m₂ · low) / (2^bits - 1),   z = round(code_min - m₂ · low / s)
Both are rounded as they will be stored. Rounding passes gradients straight through
(arXiv:1308.3432). With `in` 1 for what lies within the levels and 0 beyond:
    ∂ŵ/∂v = s · in,   ∂ŵ/∂s = level - in · w / s,   ∂ŵ/∂z = s · (in - 1).

Legend: O output rows, I input columns, R tiles below and G beside each other, n weights of a tile
(quant/grid.py); in most formats a tile is a group of one row's columns, and R is O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketlm.core.errors import UnsupportedLayer
from pocketlm.core.levels import level_ends, level_gap, rounder
from pocketlm.core.reconstruct import Parameter, Schedule, reconstruct
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import BlockTask, Cost, LinearState
from pocketlm.core.tensors import Packed
from pocketlm.quant.grid import Grid, grid_of, grouped, packed, renewed, smallest_scale, ungrouped


class FakeQuant(torch.autograd.Function):
    """ŵ [R, G, n]; nothing but the arguments is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, v: Tensor | None, s: Tensor, z: Tensor | None, spec: QuantSpec
    ) -> Tensor:
        """ŵ from w [R, G, n], v of the same shape, in levels, s and z [R, G, 1]."""
        ctx.save_for_backward(w, v, s, z)
        ctx.spec = spec
        return _level(_place(w, v, s), z, spec).mul_(s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of v, s and z; w is not learned but through v."""
        (g,) = gradients
        w, v, s, z = ctx.saved_tensors
        _, needs_v, needs_s, needs_z = ctx.needs_input_grad[:4]
        place = _place(w, v, s)
        low, high = _reach(ctx.spec)
        if z is None:
            inside_g = g * ((place >= low) & (place <= high))
        else:
            inside_g = g * ((place >= low - z) & (place <= high - z))
        of_v = of_s = of_z = None
        if needs_s:
            level = _level(place, z, ctx.spec)
            of_s = (g * level).sum(-1, keepdim=True) - (inside_g * w).sum(-1, keepdim=True) / s
        if needs_z:
            of_z = (inside_g - g).sum(-1, keepdim=True) * s
        if needs_v:
            of_v = inside_g.mul_(s)
        return None, of_v, of_s, of_z, None


def _place(w: Tensor, v: Tensor | None, s: Tensor) -> Tensor:
    """Where weights lie among the levels, before rounding."""
    return w / s if v is None else (w / s).add_(v)


def _level(place: Tensor, z: Tensor | None, spec: QuantSpec) -> Tensor:
    return rounder(spec)(place, torch.ones((), device=place.device), z)


def _reach(spec: QuantSpec) -> tuple[float, float]:
    """Between what values rounding is not clipping: half a gap beyond the ends."""
    low, high = level_ends(spec)
    below, above = level_gap(torch.tensor([low, high]), spec).tolist()
    return low - below / 2, high + above / 2


OPERATIONS = 40  # of an iteration's W(θ) and its gradient, each a pass over the weight
FLOPS_A_PASS = 16.0  # of matrix products in the time that a pass over a weight takes


def passes_cost(rows: int, columns: int, iterations: int, bytes_a_weight: int) -> Cost:
    """What learning takes for one linear beside forward and backward passes of the block."""
    flops = FLOPS_A_PASS * OPERATIONS * iterations * rows * columns
    return Cost(bytes_a_weight * rows * columns, flops, OPERATIONS * iterations)


def ends_of(grid: Grid, spec: QuantSpec) -> tuple[Tensor, ...]:
    """What a grid is made of, float32 [R, G] each: its scale, or its high and its low end."""
    scale_OG = grid.scale_OG.float()
    if grid.zero_OG is None:
        return (scale_OG,)
    zero_OG = grid.zero_OG.float()
    return (spec.code_max - zero_OG) * scale_OG, (spec.code_min - zero_OG) * scale_OG


class LearnedGrid:
    """A Learner (core/reconstruct.py): the weight on its grid, of which some parts are learned.

    Args:
        state: The linear.
        ends: As of `ends_of`: what the multipliers multiply; None: the grid's own.
        multipliers: One [R, G] for each end; none where the grid stays.
        offsets: v [R, G, n], in gaps; None: none.
        shape: Applied to the multipliers, such as a sigmoid.

    Raises:
        UnsupportedLayer: If it has minima, or scales stored together (K-quants).
    """

    def __init__(
        self,
        state: LinearState,
        ends: tuple[Tensor, ...] | None = None,
        multipliers: Sequence[Parameter] = (),
        offsets: Parameter | None = None,
        shape: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        if state.spec.type == "k":
            raise UnsupportedLayer(
                f"{state.spec.name} is no grid whose scales and minima are learned.",
                where=state.name,
                remedy="Take gptq, or a format such as Q4_0 or IQ4_NL.",
            )
        self.parameters: Sequence[Parameter] = (
            *multipliers,
            *(() if offsets is None else (offsets,)),
        )
        self._state, self._spec, self._start = state, state.spec, grid_of(state)
        self._fixed = ends is None and not multipliers
        self._ends = ends_of(self._start, state.spec) if ends is None else ends
        self._multipliers, self._shape = multipliers, shape
        self._offsets = None if offsets is None else offsets.values
        self._weight_RGn = grouped(state.reference_OI, state.spec)
        self._gap_RGn = None
        if offsets is not None and state.spec.type != "int":
            place_RGn = self._weight_RGn / self._start.scale_OG.float()[:, :, None]
            self._gap_RGn = level_gap(place_RGn, state.spec)

    def weight_OI(self) -> Tensor:
        """The weight [O, I], float32, differentiable in the parameters."""
        _, scale_RG, zero_RG = self._grid()
        weight_RGn = FakeQuant.apply(
            self._weight_RGn, self._moved(), scale_RG[:, :, None], _each(zero_RG), self._spec
        )
        return self._state.masked(ungrouped(weight_RGn, self._shape_OI, self._spec))

    def packed(self) -> Packed:
        """The weight as it is kept; it decodes to `weight_OI`."""
        with torch.no_grad():
            grid, scale_RG, zero_RG = self._grid()
            place_RGn = _place(self._weight_RGn, self._moved(), scale_RG[:, :, None])
            level_RGn = _level(place_RGn, _each(zero_RG), self._spec)
            level_OI = self._state.masked(ungrouped(level_RGn, self._shape_OI, self._spec))
            return packed(level_OI, grid, self._spec)

    @property
    def _shape_OI(self) -> tuple[int, int]:
        rows, columns = self._state.reference_OI.shape
        return rows, columns

    def _moved(self) -> Tensor | None:
        """Offsets in levels."""
        if self._gap_RGn is None or self._offsets is None:
            return self._offsets
        return self._offsets * self._gap_RGn

    def _grid(self) -> tuple[Grid, Tensor, Tensor | None]:
        """The grid as it will be stored, and its scale and zero point, float32, differentiable."""
        spec, moved = self._spec, self._ends
        if self._fixed:
            zero_OG = self._start.zero_OG
            return (
                self._start,
                self._start.scale_OG.float(),
                None if zero_OG is None else zero_OG.float(),
            )
        if self._multipliers:
            pairs = zip(self._ends, self._multipliers, strict=True)
            moved = tuple(end * self._shape(multiplier.values) for end, multiplier in pairs)
        if len(moved) == 1:
            grid = renewed(self._start, moved[0].detach(), spec)
            return grid, _straight_through(moved[0], grid.scale_OG.float()), None
        high_RG, low_RG = moved
        scale_RG = (high_RG - low_RG) / (spec.code_max - spec.code_min)
        kept_RG = scale_RG.detach().to(self._start.scale_OG.dtype)
        kept_RG = kept_RG.clamp(min=smallest_scale(kept_RG.dtype))
        scale_RG = _straight_through(scale_RG, kept_RG.float())
        zero_RG = spec.code_min - low_RG / scale_RG
        whole_RG = zero_RG.detach().round().clamp_(spec.code_min, spec.code_max)
        grid = Grid(kept_RG, whole_RG.to(torch.int8))
        return grid, scale_RG, _straight_through(zero_RG, whole_RG)


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


def _each(zero_RG: Tensor | None) -> Tensor | None:
    return None if zero_RG is None else zero_RG[:, :, None]


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of `value`."""
    return rounded + (value - value.detach())
