"""Scales and zero points for groups of weights: min-max, or the shrink that loses least.

Legend: O output rows, G groups of a row, i columns of a group.

Symmetric grids use scales of either sign: a group's largest weight then lands on the code
-2^(bits-1), the one code that has no positive twin, so that all 2^bits levels serve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pocketlm.core.spec import QuantSpec
from pocketlm.core.tensors import PackedInt

ROWS_AT_ONCE_BYTES = 64 << 20  # working memory of the search


@dataclass(frozen=True)
class Grid:
    """The scale and zero point of every group, in the dtypes they are stored in."""

    scale_OG: Tensor
    zero_OG: Tensor | None


def grouped(weight_OI: Tensor, spec: QuantSpec) -> Tensor:
    """The weight as [O, G, i]."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(rows, columns // (spec.group_size or columns), -1)


def minmax_grid(
    weight_OI: Float[Tensor, "o i"], spec: QuantSpec, dtype: torch.dtype, *, flip: bool = False
) -> Grid:
    """The grid that reaches every weight: no clipping.

    Args:
        weight_OI: The weight.
        spec: The grid's bits, symmetry and group size, which divides I.
        dtype: Of the stored scales.
        flip: Symmetric grids only: the largest weight takes the largest code, not the smallest.

    Returns:
        Scales and zero points [O, G].
    """
    weight_OGi = grouped(weight_OI, spec)
    low_OG, high_OG = weight_OGi.amin(-1), weight_OGi.amax(-1)
    return _grid(low_OG, high_OG, spec, dtype, flip=flip)


def better_of(one: Grid, other: Grid, other_OG: Tensor) -> Grid:
    """The other grid in the groups where `other_OG` is true, the one elsewhere."""
    scale_OG, zero_OG = torch.where(other_OG, other.scale_OG, one.scale_OG), one.zero_OG
    if zero_OG is not None and other.zero_OG is not None:
        zero_OG = torch.where(other_OG, other.zero_OG, zero_OG)
    return Grid(scale_OG, zero_OG)


def searched_grid(
    weight_OI: Float[Tensor, "o i"],
    spec: QuantSpec,
    dtype: torch.dtype,
    importance_I: Float[Tensor, " i"] | None = None,
    *,
    smallest: float = 0.5,
    steps: int = 40,
) -> Grid:
    """The grid of least squared error among shrunken min-max grids.

    minimise over p in (smallest, 1]:  sum_i importance_i (w_i - Q_p(w_i))^2 for each group.

    Args:
        weight_OI: The weight.
        spec: The grid's bits, symmetry and group size, which divides I.
        dtype: Of the stored scales; the search rounds through it.
        importance_I: A weight for each column's error, such as the Hessian's diagonal.
        smallest: The strongest shrink tried.
        steps: How many shrinks are tried.

    Returns:
        Scales and zero points [O, G].
    """
    rows, columns = weight_OI.shape
    at_once = max(1, ROWS_AT_ONCE_BYTES // (columns * 4 * 4))
    parts = [
        _search_rows(weight_OI[start : start + at_once], spec, dtype, importance_I, smallest, steps)
        for start in range(0, rows, at_once)
    ]
    zero_OG = (
        None if spec.symmetric else torch.cat([p.zero_OG for p in parts if p.zero_OG is not None])
    )
    return Grid(torch.cat([p.scale_OG for p in parts]), zero_OG)


def _search_rows(
    weight_OI: Tensor,
    spec: QuantSpec,
    dtype: torch.dtype,
    importance_I: Tensor | None,
    smallest: float,
    steps: int,
) -> Grid:
    weight_OGi = grouped(weight_OI, spec)
    importance_Gi = None
    if importance_I is not None:
        importance_Gi = importance_I.reshape(weight_OGi.shape[1], -1)
    low_OG, high_OG = weight_OGi.amin(-1), weight_OGi.amax(-1)
    best = _grid(low_OG, high_OG, spec, dtype)
    best_error_OG = _error(weight_OGi, best, spec, importance_Gi)
    for step in range(steps):
        shrink = 1.0 - (1.0 - smallest) * step / steps
        for flip in (False, True) if spec.symmetric else (False,):
            trial = _grid(low_OG * shrink, high_OG * shrink, spec, dtype, flip=flip)
            error_OG = _error(weight_OGi, trial, spec, importance_Gi)
            better_OG = error_OG < best_error_OG
            best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
            best = better_of(best, trial, better_OG)
    return best


def smallest_scale(dtype: torch.dtype) -> float:
    """The least magnitude a stored scale may have; float16 counts on its subnormals."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def _grid(
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


def _error(weight_OGi: Tensor, grid: Grid, spec: QuantSpec, importance_Gi: Tensor | None) -> Tensor:
    """Squared error of rounding to the grid, for each group [O, G]."""
    scale_OG1 = grid.scale_OG.to(weight_OGi.dtype)[:, :, None]
    codes_OGi = torch.round(weight_OGi / scale_OG1)
    low, high = spec.code_min, spec.code_max
    if grid.zero_OG is None:
        codes_OGi = codes_OGi.clamp_(low, high)
    else:
        zero_OG1 = grid.zero_OG.to(weight_OGi.dtype)[:, :, None]
        codes_OGi = codes_OGi.add_(zero_OG1).clamp_(low, high).sub_(zero_OG1)
    error_OGi = codes_OGi.mul_(scale_OG1).sub_(weight_OGi).square_()
    if importance_Gi is not None:
        error_OGi *= importance_Gi
    return error_OGi.sum(-1)


def round_to_grid(weight_OI: Float[Tensor, "o i"], grid: Grid, spec: QuantSpec) -> PackedInt:
    """The nearest code of every weight.

    Returns:
        The weight on the grid: code = clamp(round(w / scale) + zero).
    """
    weight_OGi = grouped(weight_OI, spec)
    codes_OGi = torch.round(weight_OGi / grid.scale_OG.to(weight_OGi.dtype)[:, :, None])
    if grid.zero_OG is not None:
        codes_OGi += grid.zero_OG.to(weight_OGi.dtype)[:, :, None]
    codes_OI = codes_OGi.clamp_(spec.code_min, spec.code_max).to(torch.int8).view(weight_OI.shape)
    return PackedInt(codes_OI, grid.scale_OG, grid.zero_OG, spec.bits)
