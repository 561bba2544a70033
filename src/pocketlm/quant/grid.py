"""Scales and zero points for tiles of weights: min-max, or the multiple that loses least.

Legend: O output rows, I input columns, R tiles below and G beside each other, n weights of a tile.
Where a tile is a group of one row's columns, R is O.

Symmetric integer grids use scales of either sign: a group's largest weight then lands on the code
-2^(bits-1), the one code that has no positive twin, so that all 2^bits levels serve. Other number
formats take positive scales by the rules of their references (`core/scales.py`); a search may turn
the sign where the levels are not mirrored and the scale is a plain float (NF4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pocketlm.core.columns import serves as kernel_takes
from pocketlm.core.levels import codes_of, mirrored, rounder
from pocketlm.core.scales import (
    Scale,
    rounded_scale,
    scale_for,
    smallest_scale,
    spread_rows,
    stored,
    tensor_divisor,
)
from pocketlm.core.spec import QuantSpec
from pocketlm.core.state import LinearState
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.quant.block_grid import block_scale, rounded_blocks

ROWS_AT_ONCE_BYTES = 64 << 20  # working memory of the search
WIDEST_IN_KERNEL = 1024  # weights of a group that a kernel keeps in registers


@dataclass(frozen=True)
class Grid:
    """The scale and zero point of every tile.

    Attributes:
        scale_OG: What multiplies the levels: of an integer grid in its stored dtype, [O, G]; else
            float32 [R, G], as decoded from `stored`.
        zero_OG: int8, or float32 where minima are no multiples of the scale ("k"); None where the
            grid is symmetric.
        stored: The scales as they are stored; None for integers, whose scales are plain floats.
    """

    scale_OG: Tensor
    zero_OG: Tensor | None = None
    stored: Scale | None = None

    @classmethod
    def of(cls, packed: Packed) -> Grid:
        """The grid of a quantized weight."""
        if isinstance(packed, PackedInt):
            return cls(packed.scale_OG, packed.zero_OG)
        return cls.stored_as(packed.scale)

    @classmethod
    def stored_as(cls, scale: Scale) -> Grid:
        """The grid of scales, and perhaps minima, as they are stored."""
        values_RG, minima_RG = scale.values_RG(), scale.minima()
        return cls(values_RG, None if minima_RG is None else minima_RG / values_RG, scale)

    def by_column(
        self, shape: tuple[int, int], spec: QuantSpec, order_I: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every weight, transposed, in float32: a column is a row of it.

        Args:
            shape: (O, I) of the weight.
            spec: Its tiles.
            order_I: The columns that are wanted, in their order; None: as stored.

        Returns:
            Scales [I, O], contiguous, and zero points [I, O] if there are any.
        """
        rows, columns = shape
        if order_I is None:
            order_I = torch.arange(columns, device=self.scale_OG.device)
        group_I = order_I // (spec.group_size or columns)
        scale_OG = spread_rows(self.scale_OG.to(torch.float32), rows, spec)
        zero_IO = None if self.zero_OG is None else self.zero_OG.to(torch.float32).T[group_I]
        return scale_OG.T[group_I].contiguous(), zero_IO


def grid_of(state: LinearState) -> Grid:
    """The grid that an earlier step chose for a linear; else min-max."""
    earlier = state.grid()
    if earlier is not None:
        return Grid.of(earlier)
    return minmax_grid(
        state.reference_OI, state.spec, state.scale_dtype, shared_absmax=state.shared_absmax
    )


def grouped(weight_OI: Tensor, spec: QuantSpec) -> Tensor:
    """The weight by tiles, [R, G, n]: a view where a tile is a group of one row's columns.

    Tiles that end beyond the weight are filled up with zeros.
    """
    rows, columns = weight_OI.shape
    if spec.group_rows == 1 and spec.fits(columns):
        return weight_OI.reshape(rows, columns // (spec.group_size or columns), -1)
    height, width = spec.group_rows or rows, spec.group_size or columns
    below, beside = spec.tiles((rows, columns))
    if (below * height, beside * width) != (rows, columns):
        missing = (0, beside * width - columns, 0, below * height - rows)
        weight_OI = torch.nn.functional.pad(weight_OI, missing)
    return weight_OI.view(below, height, beside, width).transpose(1, 2).reshape(below, beside, -1)


def ungrouped(tiles_RGn: Tensor, shape: tuple[int, int], spec: QuantSpec) -> Tensor:
    """The inverse of `grouped`: [O, I]."""
    rows, columns = shape
    if spec.group_rows == 1 and spec.fits(columns):
        return tiles_RGn.view(rows, columns)
    height, width = spec.group_rows or rows, spec.group_size or columns
    below, beside = spec.tiles(shape)
    whole = tiles_RGn.view(below, beside, height, width).transpose(1, 2)
    return whole.reshape(below * height, beside * width)[:rows, :columns].contiguous()


def minmax_grid(
    weight_OI: Float[Tensor, "o i"],
    spec: QuantSpec,
    dtype: torch.dtype,
    shared_absmax: float | None = None,
    *,
    flip: bool = False,
) -> Grid:
    """The grid that reaches every weight: no clipping.

    Args:
        weight_OI: The weight.
        spec: Its number format and tiles.
        dtype: Of stored scales that are plain floats.
        shared_absmax: The largest magnitude among the weights that share one constant of the
            tensor (NVFP4); None: this weight's own.
        flip: Formats of either sign only: the largest weight takes the largest code or level.

    Returns:
        Scales and zero points [R, G].
    """
    if spec.type == "k":
        return Grid.stored_as(block_scale(weight_OI, spec, steps=0))
    dtype = plain_scale_dtype(spec, dtype)
    weight_RGn = grouped(weight_OI, spec)
    low_RG, high_RG = weight_RGn.amin(-1), weight_RGn.amax(-1)
    if spec.type == "int":
        return _integer_grid(low_RG, high_RG, spec, dtype, flip=flip)
    outer = _divisor(weight_OI, spec, shared_absmax)
    absmax_RG = torch.maximum(high_RG, -low_RG)
    scale_RG = scale_for(absmax_RG, spec, dtype, outer)
    return _stored_grid(-scale_RG if flip else scale_RG, spec, dtype, outer)


def plain_scale_dtype(spec: QuantSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales that are plain floats: llama.cpp's own formats have float16 alone."""
    return torch.float16 if spec.type in ("k", "iq4_nl") else dtype


def better_of(one: Grid, other: Grid, other_RG: Tensor) -> Grid:
    """The other grid in the groups where `other_RG` is true, the one elsewhere."""
    scale_RG, zero_RG = torch.where(other_RG, other.scale_OG, one.scale_OG), one.zero_OG
    if zero_RG is not None and other.zero_OG is not None:
        zero_RG = torch.where(other_RG, other.zero_OG, zero_RG)
    return Grid(scale_RG, zero_RG)


def searched_grid(
    weight_OI: Float[Tensor, "o i"],
    spec: QuantSpec,
    dtype: torch.dtype,
    importance_I: Float[Tensor, " i"] | None = None,
    *,
    smallest: float = 0.5,
    steps: int = 40,
    shared_absmax: float | None = None,
) -> Grid:
    """The grid of least squared error among shrunken min-max grids.

    minimise over p in (smallest, 1]:  sum_i importance_i (w_i - Q_p(w_i))^2 for each tile.

    Scales that are powers of two try their two neighbours instead; scales in E4M3 also one that
    puts the largest weight on the level 4 of E2M1 instead of 6 (p = 1.5).

    Args:
        weight_OI: The weight.
        spec: Its number format and tiles.
        dtype: Of stored scales that are plain floats; the search rounds through it.
        importance_I: A weight for each column's error, such as the Hessian's diagonal.
        smallest: The strongest shrink tried.
        steps: How many shrinks are tried.
        shared_absmax: As in `minmax_grid`.

    Returns:
        Scales and zero points [R, G].
    """
    if spec.type == "k":
        found = block_scale(weight_OI, spec, importance_I, smallest=smallest, steps=steps)
        return Grid.stored_as(found)
    dtype = plain_scale_dtype(spec, dtype)
    rows, columns = weight_OI.shape
    multiples = list(multiples_tried(spec, smallest, steps))
    if kernel_serves(weight_OI, spec):
        from pocketlm.quant.grid_kernel import search

        return Grid(*search(weight_OI, spec, dtype, importance_I, multiples))
    outer = _divisor(weight_OI, spec, shared_absmax)
    height = spec.group_rows or rows
    at_once = max(height, ROWS_AT_ONCE_BYTES // (columns * 4 * 4) // height * height)
    parts = [
        _search_rows(
            weight_OI[start : start + at_once], spec, dtype, importance_I, multiples, outer
        )
        for start in range(0, rows, at_once)
    ]
    scale_OG = torch.cat([part.scale_OG for part in parts])
    if spec.type != "int":
        return _stored_grid(scale_OG, spec, dtype, outer)
    zeros = [part.zero_OG for part in parts if part.zero_OG is not None]
    return Grid(scale_OG, torch.cat(zeros) if zeros else None)


def kernel_serves(weight_OI: Tensor, spec: QuantSpec) -> bool:
    """Whether `grid_kernel` searches this grid: integers in whole groups of a row, on a GPU."""
    plain = spec.type == "int" and spec.group_rows == 1 and spec.fits(weight_OI.shape[1])
    narrow = (spec.group_size or weight_OI.shape[1]) <= WIDEST_IN_KERNEL
    return plain and narrow and kernel_takes(weight_OI)


def _search_rows(
    weight_OI: Tensor,
    spec: QuantSpec,
    dtype: torch.dtype,
    importance_I: Tensor | None,
    multiples: list[float],
    outer: Tensor | None,
) -> Grid:
    weight_RGn = grouped(weight_OI, spec)
    importance_Gn = _grouped_importance(importance_I, weight_OI.shape[0], spec)
    low_RG, high_RG = weight_RGn.amin(-1), weight_RGn.amax(-1)

    def trial(multiple: float, flip: bool) -> Grid:
        low, high = low_RG * multiple, high_RG * multiple
        if spec.type == "int":
            return _integer_grid(low, high, spec, dtype, flip=flip)
        scale_RG = scale_for(torch.maximum(high, -low), spec, dtype, outer)
        return Grid(-scale_RG if flip else scale_RG)

    best = trial(1.0, False)
    best_error_RG = _error(weight_RGn, best, spec, importance_Gn)
    signs = (False, True) if _either_sign(spec) else (False,)
    for multiple in multiples:
        for flip in signs:
            other = trial(multiple, flip)
            error_RG = _error(weight_RGn, other, spec, importance_Gn)
            better_RG = error_RG < best_error_RG
            best_error_RG = torch.where(better_RG, error_RG, best_error_RG)
            best = better_of(best, other, better_RG)
    return best


def multiples_tried(spec: QuantSpec, smallest: float, steps: int) -> Iterator[float]:
    """The multiples of the min-max range that a search tries."""
    if spec.scale == "e8m0":
        yield from (0.5, 2.0)
        return
    for step in range(steps):
        yield 1.0 - (1.0 - smallest) * step / steps
    if spec.scale == "e4m3":
        yield 1.5


def _either_sign(spec: QuantSpec) -> bool:
    """Whether a search tries the negative scale too."""
    return spec.symmetric and not mirrored(spec) and spec.scale == "float"


def _grouped_importance(importance_I: Tensor | None, rows: int, spec: QuantSpec) -> Tensor | None:
    """A column's importance for each weight of a tile: [G, n], the same for all tiles below."""
    if importance_I is None:
        return None
    height = spec.group_rows or rows
    return grouped(importance_I.expand(height, -1), spec)[0]


def _divisor(weight_OI: Tensor, spec: QuantSpec, shared_absmax: float | None) -> Tensor | None:
    if spec.scale != "e4m3":
        return None
    if shared_absmax is None:
        return tensor_divisor(weight_OI.abs().amax(), spec)
    return tensor_divisor(torch.tensor(shared_absmax, device=weight_OI.device), spec)


def _stored_grid(
    scale_RG: Tensor, spec: QuantSpec, dtype: torch.dtype, outer: Tensor | None
) -> Grid:
    """A grid of scales as they come back from what is stored."""
    kept = stored(scale_RG, spec, dtype, outer)
    return Grid(kept.values_RG(), None, kept)


def renewed(grid: Grid, scale_RG: Tensor, spec: QuantSpec) -> Grid:
    """A grid with other scales, rounded as they are stored; its shared constants stay.

    Args:
        grid: Not of "dynamic8", whose scales hang together, nor with minima.
        scale_RG: float32; what is not finite or cannot be stored keeps the old scale.
        spec: The number format.
    """
    if grid.stored is None:
        kept_OG = scale_RG.to(grid.scale_OG.dtype)
        good_OG = torch.isfinite(kept_OG) & (kept_OG.abs() >= smallest_scale(kept_OG.dtype))
        return Grid(torch.where(good_OG, kept_OG, grid.scale_OG), grid.zero_OG)
    dtype, outer = grid.stored.stored_RG.dtype, grid.stored.outer
    good_RG = torch.isfinite(scale_RG) & ((scale_RG > 0) | (spec.scale in ("float", "k")))
    if spec.scale == "k":
        return Grid.stored_as(rounded_blocks(torch.where(good_RG, scale_RG, grid.scale_OG), spec))
    rounded_RG = rounded_scale(scale_RG, spec, dtype, outer)
    return _stored_grid(torch.where(good_RG, rounded_RG, grid.scale_OG), spec, dtype, outer)


def _integer_grid(
    low_OG: Tensor, high_OG: Tensor, spec: QuantSpec, dtype: torch.dtype, *, flip: bool = False
) -> Grid:
    """The grid over [low, high]; `flip` gives the larger side the shorter half of the codes."""
    tiny = smallest_scale(dtype)
    if spec.symmetric:
        largest_OG = torch.where(high_OG > -low_OG, high_OG, low_OG)
        scale_OG = largest_OG / (spec.code_max if flip else spec.code_min)
        scale_OG = scale_OG.to(dtype)
        return Grid(torch.where(scale_OG.abs() < tiny, tiny, scale_OG), None)
    low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
    scale_OG = ((high_OG - low_OG) / (spec.code_max - spec.code_min)).to(dtype)
    scale_OG = torch.where(scale_OG < tiny, tiny, scale_OG)
    zero_OG = torch.round(spec.code_min - low_OG / scale_OG.to(low_OG.dtype))
    return Grid(scale_OG, zero_OG.clamp(spec.code_min, spec.code_max).to(torch.int8))


def _nearest(weight_RGn: Tensor, grid: Grid, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The nearest level of every weight, and the scales in the same dtype, [R, G, 1]."""
    scale_RG1 = grid.scale_OG.to(weight_RGn.dtype)[:, :, None]
    zero_RG1 = None if grid.zero_OG is None else grid.zero_OG.to(weight_RGn.dtype)[:, :, None]
    return rounder(spec)(weight_RGn, scale_RG1, zero_RG1), scale_RG1


def _error(weight_RGn: Tensor, grid: Grid, spec: QuantSpec, importance_Gn: Tensor | None) -> Tensor:
    """Squared error of rounding to the grid, for each tile [R, G]."""
    level_RGn, scale_RG1 = _nearest(weight_RGn, grid, spec)
    error_RGn = level_RGn.mul_(scale_RG1).sub_(weight_RGn).square_()
    if importance_Gn is not None:
        error_RGn *= importance_Gn
    return error_RGn.sum(-1)


def round_to_grid(weight_OI: Float[Tensor, "o i"], grid: Grid, spec: QuantSpec) -> Packed:
    """The nearest code of every weight.

    Returns:
        The weight on the grid.
    """
    level_RGn, _ = _nearest(grouped(weight_OI, spec), grid, spec)
    rows, columns = weight_OI.shape
    return packed(ungrouped(level_RGn, (rows, columns), spec), grid, spec)


def packed(level_OI: Tensor, grid: Grid, spec: QuantSpec) -> Packed:
    """A weight as it is kept.

    Args:
        level_OI: The level of every weight, as `core.levels.rounder` gives it.
        grid: Scales and zero points.
        spec: Number format and tiles.
    """
    if grid.stored is not None:
        zero_OI = None
        if grid.zero_OG is not None:
            zero_OI = grid.zero_OG.repeat_interleave(spec.group_size or level_OI.shape[1], 1)
        return PackedFloat(codes_of(level_OI, spec, zero_OI), grid.stored, spec)
    zero_OG1 = None if grid.zero_OG is None else grid.zero_OG[:, :, None]
    codes_OGi = codes_of(grouped(level_OI, spec), spec, zero_OG1)
    return PackedInt(codes_OGi.view(level_OI.shape), grid.scale_OG, grid.zero_OG, spec.bits)
