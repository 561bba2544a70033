"""The search for integer grids as one Triton kernel: a group is read once and all trials are tried.

What `grid.searched_grid` means, for groups of a row; and, for AWQ, what rounding on the best grid
leaves of a weight whose columns are scaled for it. A group's sum is one program's: the result does
not depend on how groups are shared out.

Legend: O rows, I columns, G groups of a program, N weights of a group.
"""

# Triton's language is not Python's: its types tell a checker nothing.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pocketlm.core.column_kernel import TO_INTEGER, divided, to_integer
from pocketlm.core.scales import smallest_scale
from pocketlm.core.spec import QuantSpec

GROUPS, WARPS = 8, 4  # of a program


@triton.jit
def _grid(
    low, high, zeros, code_min, code_max, smallest,
    SYMMETRIC: tl.constexpr, FLIP: tl.constexpr, STORED: tl.constexpr, TO_INTEGER: tl.constexpr,
):  # fmt: skip
    """Scale and zero point of each group over [low, high]; see `grid._integer_grid`."""
    if SYMMETRIC:
        largest = tl.where(high > -low, high, low)
        scale = divided(largest, zeros + (code_max if FLIP else code_min))
        scale = scale.to(STORED).to(low.dtype)
        scale = tl.where(tl.abs(scale) < smallest, smallest, scale)
        zero = zeros
    else:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        scale = divided(high - low, zeros + (code_max - code_min)).to(STORED).to(low.dtype)
        scale = tl.where(scale < smallest, smallest, scale)
        zero = to_integer(code_min - divided(low, scale), TO_INTEGER)
        zero = tl.minimum(tl.maximum(zero, code_min), code_max)
    return scale, zero


@triton.jit
def _level(x, scale, zero, code_min, code_max, TO_INTEGER: tl.constexpr):
    scale, zero = scale[:, None], zero[:, None]
    inside = tl.minimum(tl.maximum(divided(x, scale), code_min - zero), code_max - zero)
    return to_integer(inside, TO_INTEGER)


@triton.jit
def _search(
    weight, importance, column_scale, multiples, best_scale, best_zero, left_over,
    groups, groups_of_row, width, trials, code_min, code_max, smallest,
    SYMMETRIC: tl.constexpr, WEIGHED: tl.constexpr, SCALED: tl.constexpr, STORED: tl.constexpr,
    TO_INTEGER: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    group_G = tl.program_id(0) * G + tl.arange(0, G)
    place_N = tl.arange(0, N)
    live_G = group_G < groups
    live_GN = live_G[:, None] & (place_N < width)[None, :]
    at_GN = group_G.to(tl.int64)[:, None] * width + place_N[None, :]
    column_GN = (group_G % groups_of_row)[:, None] * width + place_N[None, :]
    weight_GN = tl.load(weight + at_GN, mask=live_GN, other=0.0)
    x_GN, weigh_GN = weight_GN, tl.where(live_GN, 1.0, 0.0)
    if WEIGHED:
        weigh_GN = tl.load(importance + column_GN, mask=live_GN, other=0.0)
    if SCALED:
        s_GN = tl.load(column_scale + column_GN, mask=live_GN, other=1.0)
        x_GN = weight_GN * s_GN
        weigh_GN = divided(weigh_GN, s_GN * s_GN)
    low_G = tl.min(tl.where(live_GN, x_GN, float("inf")), 1)
    high_G = tl.max(tl.where(live_GN, x_GN, float("-inf")), 1)
    low_G, high_G = tl.where(live_G, low_G, 0.0), tl.where(live_G, high_G, 0.0)
    zeros_G = tl.zeros((G,), x_GN.dtype)
    scale_G, zero_G, error_G = zeros_G + 1.0, zeros_G, zeros_G + float("inf")
    for trial in range(trials):
        multiple = tl.load(multiples + trial)
        for flip in tl.static_range(2 if SYMMETRIC else 1):
            new_scale_G, new_zero_G = _grid(
                low_G * multiple, high_G * multiple, zeros_G, code_min, code_max, smallest,
                SYMMETRIC, flip == 1, STORED, TO_INTEGER,
            )  # fmt: skip
            level_GN = _level(x_GN, new_scale_G, new_zero_G, code_min, code_max, TO_INTEGER)
            off_GN = level_GN * new_scale_G[:, None] - x_GN
            new_error_G = tl.sum(off_GN * off_GN * weigh_GN, 1)
            better_G = new_error_G < error_G
            error_G = tl.where(better_G, new_error_G, error_G)
            scale_G = tl.where(better_G, new_scale_G, scale_G)
            zero_G = tl.where(better_G, new_zero_G, zero_G)
    if SCALED:
        level_GN = _level(x_GN, scale_G, zero_G, code_min, code_max, TO_INTEGER)
        left_GN = divided(level_GN * scale_G[:, None], s_GN) - weight_GN
        tl.store(left_over + at_GN, left_GN.to(left_over.dtype.element_ty), mask=live_GN)
    else:
        tl.store(best_scale + group_G, scale_G.to(STORED), mask=live_G)
        if not SYMMETRIC:
            tl.store(best_zero + group_G, zero_G.to(tl.int8), mask=live_G)


def search(
    weight_OI: Tensor,
    spec: QuantSpec,
    dtype: torch.dtype,
    importance_I: Tensor | None,
    multiples: Sequence[float],
) -> tuple[Tensor, Tensor | None]:
    """The scales [O, G] and zero points of least error; see `grid.searched_grid`.

    Args:
        weight_OI: The weight, float32.
        spec: Integers in groups of a row.
        dtype: Of the scales.
        importance_I: A weight for each column's error.
        multiples: Of the min-max range, that are tried.
    """
    rows, columns = weight_OI.shape
    groups = columns // (spec.group_size or columns)
    scale_OG = weight_OI.new_empty(rows, groups, dtype=dtype)
    zero_OG = None if spec.symmetric else weight_OI.new_empty(rows, groups, dtype=torch.int8)
    _launch(weight_OI, spec, dtype, importance_I, multiples, scale_OG, zero_OG, None, None)
    return scale_OG, zero_OG


def left_over(
    weight_OI: Tensor,
    spec: QuantSpec,
    dtype: torch.dtype,
    importance_I: Tensor,
    multiples: Sequence[float],
    column_scale_I: Tensor,
) -> Tensor:
    """Q(W diag(s)) diag(s)⁻¹ - W on the best grid for W diag(s), bfloat16 [O, I].

    Args:
        weight_OI: W, float32.
        spec: Integers in groups of a row.
        dtype: Of the scales.
        importance_I: A weight for each column's error in W; over s² in W diag(s).
        multiples: Of the min-max range, that are tried.
        column_scale_I: s.
    """
    left_OI = weight_OI.new_empty(weight_OI.shape, dtype=torch.bfloat16)
    _launch(weight_OI, spec, dtype, importance_I, multiples, left_OI, None, column_scale_I, left_OI)
    return left_OI


def _launch(
    weight_OI: Tensor,
    spec: QuantSpec,
    dtype: torch.dtype,
    importance_I: Tensor | None,
    multiples: Sequence[float],
    scale: Tensor,
    zero: Tensor | None,
    column_scale_I: Tensor | None,
    left_OI: Tensor | None,
) -> None:
    weight_OI = weight_OI.contiguous()
    width = spec.group_size or weight_OI.shape[1]
    groups = weight_OI.numel() // width
    filled = triton.next_power_of_2(width)
    at_once = max(1, GROUPS * 128 // filled)
    _search[(triton.cdiv(groups, at_once),)](
        weight_OI, weight_OI if importance_I is None else importance_I.to(weight_OI).contiguous(),
        weight_OI if column_scale_I is None else column_scale_I,
        torch.tensor(list(multiples), dtype=weight_OI.dtype, device=weight_OI.device),
        scale, scale if zero is None else zero, scale if left_OI is None else left_OI,
        groups, weight_OI.shape[1] // width, width, len(multiples),
        float(spec.code_min), float(spec.code_max), smallest_scale(dtype),
        SYMMETRIC=spec.symmetric, WEIGHED=importance_I is not None,
        SCALED=column_scale_I is not None, STORED=_TRITON[dtype],
        TO_INTEGER=TO_INTEGER[weight_OI.dtype], G=at_once, N=filled, num_warps=WARPS,
    )  # fmt: skip


_TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
