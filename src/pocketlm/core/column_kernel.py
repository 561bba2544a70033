"""The walk over one block of columns as one Triton kernel: what `columns.py` loops over, for a GPU.

Rows do not depend on each other, so a program keeps some rows of the block in registers, settles
column after column and carries each change on to the later ones. No sum crosses rows and nothing is
added atomically: the result does not depend on how rows are shared out.

Legend: R rows of a program, C columns of the block, O output rows. Tensors are transposed, [C, O].
"""

# Triton's language is not Python's: its types tell a checker nothing.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pocketlm.core.levels import LEAST_DIVISOR, level_ends, minifloat, table
from pocketlm.core.spec import QuantSpec

ROWS, WARPS = 16, 1  # of a program: on an H200 0.118 ms a block of 128, 32 rows 0.14, 4 warps 0.15
PLAIN, INTEGER, MINIFLOAT, TABLE, MINIMUM = 0, 1, 2, 3, 4
TO_INTEGER = {torch.float32: 1.5 * 2.0**23, torch.float64: 1.5 * 2.0**52}


@triton.jit
def divided(x, y):
    """The quotient, rounded as IEEE 754 has it; Triton's own of float32 is not."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def to_integer(x, TO_INTEGER: tl.constexpr):
    """The nearest integer, halves to even, for |x| < 2^22: adding 1.5 · 2^23 rounds it off."""
    return (x + TO_INTEGER) - TO_INTEGER


@triton.jit
def _nearest(
    x, scale, zero, low, high, least_step, bounds, levels,
    FORMAT: tl.constexpr, MANTISSA: tl.constexpr, ENTRIES: tl.constexpr,
    LEAST_DIVISOR: tl.constexpr, TO_INTEGER: tl.constexpr,
):  # fmt: skip
    """The level of each value [R]: `core.levels.rounder`, number format by number format."""
    if FORMAT == 1:
        inside = tl.minimum(tl.maximum(divided(x, scale), low - zero), high - zero)
        level = to_integer(inside, TO_INTEGER)
    elif FORMAT == 2:
        inside = tl.minimum(tl.maximum(divided(x, scale), low), high)
        exponent = (inside.to(tl.int32, bitcast=True) & 0x7F800000) - (MANTISSA << 23)
        step = tl.maximum(exponent.to(tl.float32, bitcast=True), least_step)
        step = tl.where(exponent < 0, least_step, step)
        level = to_integer(divided(inside, step), TO_INTEGER) * step
    elif FORMAT == 4:
        inside = tl.minimum(tl.maximum(divided(x, scale) + zero, low), high)
        level = to_integer(inside, TO_INTEGER) - zero
    else:
        usable = tl.where(tl.abs(scale) < LEAST_DIVISOR, LEAST_DIVISOR, scale)
        scaled = x * divided(tl.full(x.shape, 1.0, x.dtype), usable)
        bound = tl.load(bounds + tl.arange(0, ENTRIES))
        place = tl.sum((scaled[None, :] > bound[:, None]).to(tl.int32), 0)
        level = tl.load(levels + place).to(x.dtype)
    return level


@triton.jit
def _walk(
    start, matrix, current, scale, zero, mask, settled, change, bounds, levels,
    rows, columns, matrix_stride, low, high, least_step,
    FORMAT: tl.constexpr, MANTISSA: tl.constexpr, ENTRIES: tl.constexpr,
    HAS_CURRENT: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_MASK: tl.constexpr,
    LEAST_DIVISOR: tl.constexpr, TO_INTEGER: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_C = tl.arange(0, C)
    live_R, live_C = row_R < rows, column_C < columns
    live_CR = live_C[:, None] & live_R[None, :]
    tile_CR = tl.load(start + column_C[:, None] * rows + row_R[None, :], mask=live_CR, other=0.0)
    for i in range(columns):
        at_R = i * rows + row_R
        x_R = tl.sum(tl.where(column_C[:, None] == i, tile_CR, 0.0), 0)
        value_R = x_R
        keep_R = tl.full((R,), 1.0, x_R.dtype)
        if HAS_MASK:
            keep_R = tl.load(mask + at_R, mask=live_R, other=0).to(x_R.dtype)
        if FORMAT == 0:
            value_R = x_R * keep_R
            tl.store(settled + at_R, value_R, mask=live_R)
        else:
            scale_R = tl.load(scale + at_R, mask=live_R, other=1.0)
            zero_R = tl.zeros((R,), x_R.dtype)
            if HAS_ZERO:
                zero_R = tl.load(zero + at_R, mask=live_R, other=0.0)
            level_R = _nearest(
                x_R, scale_R, zero_R, low, high, least_step, bounds, levels,
                FORMAT, MANTISSA, ENTRIES, LEAST_DIVISOR, TO_INTEGER,
            )  # fmt: skip
            level_R = level_R * keep_R
            tl.store(settled + at_R, level_R, mask=live_R)
            value_R = level_R * scale_R
        line = matrix + i * matrix_stride
        if HAS_CURRENT:
            change_R = tl.load(current + at_R, mask=live_R, other=0.0) - value_R
        else:
            change_R = divided(x_R - value_R, tl.zeros((R,), x_R.dtype) + tl.load(line + i))
        tl.store(change + at_R, change_R, mask=live_R)
        later_C = tl.load(line + column_C, mask=(column_C > i) & live_C, other=0.0)
        tile_CR -= later_C[:, None] * change_R[None, :]


def walk(
    start_CO: Tensor,
    matrix_CC: Tensor,
    spec: QuantSpec | None,
    scale_CO: Tensor | None,
    zero_CO: Tensor | None,
    mask_CO: Tensor | None,
    current_CO: Tensor | None,
    *,
    program_rows: int = ROWS,
    warps: int = WARPS,
) -> tuple[Tensor, Tensor]:
    """Settles the columns of a block in turn; see `columns.feed_back` and `columns.descend`.

    Args:
        start_CO: The block's columns, each a row of memory; float32 (float64 without minifloats).
        matrix_CC: What a change of column i takes from column j > i, times the change. Without
            `current_CO` the diagonal divides the change.
        spec: The number format; None: values stay as they are, but for the mask.
        scale_CO: Scales, where there is a format.
        zero_CO: Zero points, where the grid has some.
        mask_CO: Bool: which weights stay.
        current_CO: What changes are counted from; None: from the column as it stands when its turn
            comes.
        program_rows: R, a power of two.
        warps: Warps of a program.

    Returns:
        Levels (values without a format) and changes, both [C, O].
    """
    columns, rows = start_CO.shape
    matrix_CC = matrix_CC.contiguous()  # factors come from solvers by columns
    mask_CO = None if mask_CO is None else mask_CO.contiguous()
    settled_CO, change_CO = torch.empty_like(start_CO), torch.empty_like(start_CO)
    form, mantissa, low, high, least_step, entries = PLAIN, 0, 0.0, 0.0, 0.0, 1
    bounds = levels = start_CO  # not read but of tables
    if spec is not None:
        low, high = level_ends(spec)
        if spec.type == "int" or (spec.type == "k" and spec.symmetric):
            form = INTEGER
        elif spec.type == "k":
            form = MINIMUM  # zero points are no integers
        elif spec.type == "float":
            form, (mantissa, least_step, _) = MINIFLOAT, minifloat(spec)
        else:
            form, levels = TABLE, table(spec).to(start_CO)
            entries = len(levels)
            middles = (levels[:-1] + levels[1:]) / 2
            filled = 1 << (entries - 1).bit_length()
            bounds = levels.new_full((filled,), torch.inf)
            bounds[: len(middles)] = middles
            entries = filled
    _walk[(triton.cdiv(rows, program_rows),)](
        start_CO, matrix_CC, start_CO if current_CO is None else current_CO,
        start_CO if scale_CO is None else scale_CO, start_CO if zero_CO is None else zero_CO,
        start_CO if mask_CO is None else mask_CO, settled_CO, change_CO, bounds, levels,
        rows, columns, matrix_CC.stride(0), low, high, least_step,
        FORMAT=form, MANTISSA=mantissa, ENTRIES=entries,
        HAS_CURRENT=current_CO is not None, HAS_ZERO=zero_CO is not None,
        HAS_MASK=mask_CO is not None, LEAST_DIVISOR=LEAST_DIVISOR,
        TO_INTEGER=TO_INTEGER[start_CO.dtype], R=program_rows,
        C=max(16, triton.next_power_of_2(columns)), num_warps=warps,
    )  # fmt: skip
    return settled_CO, change_CO
