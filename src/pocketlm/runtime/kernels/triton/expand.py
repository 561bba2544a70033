"""Rows of a packed weight as floats [O, I], for products with so many activations that unpacking
once and calling the card's own matrix product is faster.

A program writes 16 rows, W stretches of K columns. Values are rounded as `dequantize()` rounds
them. Legend as in layout.py.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pocketlm.runtime.kernels.triton.unpack import scaled, unpack


@gluon.jit
def _units(q_ptr, tile, step, units, C: gl.constexpr, W: gl.constexpr, WORDS: gl.constexpr):
    """Units of a row tile, [W, 1, C, words of 16 bits]."""
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, WORDS // 32], [1, 1, 1, 32], [W, 1, 1, 1], [3, 2, 1, 0]
    )
    w = gl.arange(0, W)[:, None, None, None]
    c = gl.arange(0, C)[None, None, :, None]
    word = gl.arange(0, WORDS)[None, None, None, :]
    unit = (step * W + w) * C + c
    at = gl.set_auto_layout(unit * WORDS + word, LAYOUT)
    mask = gl.set_auto_layout((unit < units) & (word >= 0), LAYOUT)
    return gl.load(q_ptr + tile.to(gl.int64) * units * WORDS + at, mask=mask, other=0)


@gluon.jit
def _per_group(
    ptr, tile, step, groups, STEPS: gl.constexpr, like, W: gl.constexpr, A: gl.constexpr
):
    w = gl.arange(0, W)[:, None]
    row = gl.arange(0, 16)[None, :]
    group = gl.minimum((step * W + w) // STEPS, groups - 1)
    at = gl.set_auto_layout((tile * groups + group) * 16 + row, gl.SliceLayout(2, A))
    return gl.expand_dims(gl.load(ptr + at).to(gl.float32).to(like), 2)


@gluon.jit(do_not_specialize=["first_tile"])
def expand_kernel(
    q_ptr, top_ptr, s_ptr, z_ptr, w_ptr, first_tile, outputs, columns, units, groups,
    STEPS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr, ZEROS: gl.constexpr,
    C: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Rows from 16 first_tile on; program (i, j) writes row tile i, stretch j of W K columns."""
    DTYPE: gl.constexpr = w_ptr.dtype.element_ty
    K: gl.constexpr = C * UNIT
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    STORE: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // K, K // 8], [W, 1, 1], [2, 1, 0])
    tile = gl.program_id(0) + first_tile
    step = gl.program_id(1)
    q = _units(q_ptr, tile, step, units, C, W, UNIT * (2 if WIDTH == 3 else WIDTH))
    top = q
    if WIDTH == 3:
        top = _units(top_ptr, tile, step, units, C, W, UNIT)
    s = _per_group(s_ptr, tile, step, groups, STEPS, DTYPE, W, A)
    z = s
    if ZEROS:
        z = _per_group(z_ptr, tile, step, groups, STEPS, DTYPE, W, A)
    v = unpack(q, top, s, WIDTH, UNIT, 1, C, W)
    v = scaled(gl.convert_layout(v, A, assert_trivial=True), s, z, ZEROS)
    v = gl.convert_layout(v, STORE)
    w = gl.arange(0, W)[:, None, None]
    row = gl.arange(0, 16)[None, :, None]
    k = gl.arange(0, K)[None, None, :]
    column = (step * W + w) * K + k
    at = (gl.program_id(0) * 16 + row).to(gl.int64) * columns + column
    mask = (tile * 16 + row < outputs) & (column < columns)
    gl.store(w_ptr + gl.set_auto_layout(at, STORE), v, mask=gl.set_auto_layout(mask, STORE))
