"""The product for many rows of activations: Hopper's wgmma, weights unpacked into its operand A.

A program makes 16 W outputs for N activations. Units of weights and tiles of activations come
through a ring in shared memory (cp.async); a warp takes its 16 rows of weights from there, unpacks
and scales them in registers while the tensor cores still work on the step before, and they enter
wgmma as operand A; activations are operand B as they lie. With steps of 64 columns a product is
started while the one before still runs (with more columns ptxas makes them wait for each other).
Scaled weights are rounded to the activations' dtype, as `dequantize()` rounds them; sums are
float32.

Legend as in layout.py; W warps (4 or 8), N activations, K = C UNIT columns of a step.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pocketlm.runtime.kernels.triton.unpack import copy_ahead, scaled, unpack


@gluon.jit
def _first_units(ptr, tile, tiles, units, W: gl.constexpr, C: gl.constexpr, WORDS: gl.constexpr,
                 LAYOUT: gl.constexpr):  # fmt: skip
    """Where the units of the first step lie, [W, 1, C, words of 16 bits]."""
    w = gl.minimum(gl.arange(0, W)[:, None, None, None], tiles - 1 - tile * W)
    c = gl.arange(0, C)[None, None, :, None]
    word = gl.arange(0, WORDS)[None, None, None, :]
    base = ptr + (tile * W).to(gl.int64) * units * WORDS
    return base + gl.set_auto_layout((w * units + c) * WORDS + word, LAYOUT)


@gluon.jit
def _first_rows(ptr, tile, tiles, groups, W: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the scales or zero points of the first group lie, [16 W]."""
    row = gl.arange(0, 16 * W)
    at = gl.minimum(tile * W + row // 16, tiles - 1) * groups * 16 + row % 16
    return ptr + gl.set_auto_layout(at, LAYOUT)


@gluon.jit
def _ask(ring, sources, stage, step, STEPS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr,
         ZEROS: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """Copies of a step into a stage are begun."""
    xs, qs, ts, ss, zs = ring
    x_at, q_at, t_at, s_at, z_at = sources
    copy_ahead(xs.index(stage), x_at + step * (C * UNIT))
    copy_ahead(qs.index(stage), q_at + step * (C * UNIT * (2 if WIDTH == 3 else WIDTH)))
    copy_ahead(ss.index(stage), s_at + step // STEPS * 16)
    if WIDTH == 3:
        copy_ahead(ts.index(stage), t_at + step * (C * UNIT))
    if ZEROS:
        copy_ahead(zs.index(stage), z_at + step // STEPS * 16)


@gluon.jit
def _of_rows(shared, A: gl.constexpr, like: gl.constexpr):
    """Scales or zero points of the rows of operand A, [16 W, 1], in the dtype `like`."""
    return gl.expand_dims(shared.load(gl.SliceLayout(1, A)).to(gl.float32).to(like), 1)


@gluon.jit
def _operand(qs, ts, ss, zs, stage, A: gl.constexpr, DTYPE: gl.constexpr, WIDTH: gl.constexpr,
             UNIT: gl.constexpr, ZEROS: gl.constexpr, C: gl.constexpr, W: gl.constexpr,
             LOAD_Q: gl.constexpr, LOAD_T: gl.constexpr):  # fmt: skip
    """The weights of a stage as operand A, [16 W, C UNIT]."""
    q = qs.index(stage).load(LOAD_Q)
    s = _of_rows(ss.index(stage), A, DTYPE)
    top, z = q, s
    if WIDTH == 3:
        top = ts.index(stage).load(LOAD_T)
    if ZEROS:
        z = _of_rows(zs.index(stage), A, DTYPE)
    v = unpack(q, top, s, WIDTH, UNIT, 1, C, W)
    v = gl.convert_layout(gl.reshape(v, [W * 16, C * UNIT]), A, assert_trivial=True)
    return scaled(v, s, z, ZEROS)


@gluon.jit(do_not_specialize=["rows"])
def prefill_kernel(
    x_ptr, q_ptr, top_ptr, s_ptr, z_ptr, y_ptr,
    rows, outputs, units, groups, x_stride, y_stride,
    STEPS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr, ZEROS: gl.constexpr,
    C: gl.constexpr, W: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    DEEP: gl.constexpr,
):  # fmt: skip
    """Y [M, O] = x [M, I] Wᵀ; program (i, j) makes outputs 16 W i … for activations N j ….

    With SPLITS > 1 program (i, j, k) sums the k-th part of the columns into y [SPLITS, M, O].
    DEEP: two products may be under way; the steps are even in number.
    """
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    WORDS: gl.constexpr = UNIT * (2 if WIDTH == 3 else WIDTH)  # of a unit
    K: gl.constexpr = C * UNIT
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, N, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    TILE_X: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128 if K >= 64 else 64, element_bitwidth=16, rank=2
    )
    LINES: gl.constexpr = K // 8 if K < 64 else 8  # lanes along a row of activations, 16 bytes each
    LOAD_X: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LINES, LINES], [W, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    LOAD_Q: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, WORDS // 32], [1, 1, 1, 32], [W, 1, 1, 1], [3, 2, 1, 0]
    )
    LOAD_T: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, UNIT // 32], [1, 1, 1, 32], [W, 1, 1, 1], [3, 2, 1, 0]
    )
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LOAD_S: gl.constexpr = gl.BlockedLayout([4], [32], [W], [0])
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, N, K], TILE_X)
    qs = gl.allocate_shared_memory(gl.int16, [STAGES, W, 1, C, WORDS], PLAIN)
    ss = gl.allocate_shared_memory(s_ptr.dtype.element_ty, [STAGES, W * 16], LINE)
    ts, zs = qs, ss
    if WIDTH == 3:
        ts = gl.allocate_shared_memory(gl.int16, [STAGES, W, 1, C, UNIT], PLAIN)
    if ZEROS:
        zs = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, W * 16], LINE)
    tile = gl.program_id(0)
    first = gl.program_id(1) * N
    tiles, all_steps = gl.cdiv(outputs, 16), units // C
    start = all_steps * gl.program_id(2) // SPLITS
    steps = all_steps * (gl.program_id(2) + 1) // SPLITS - start

    n = gl.arange(0, N)[:, None]
    k = gl.arange(0, K)[None, :]
    x_row = (first + n) % rows  # one row for all that are too many would be fetched in turn
    x_at = x_ptr + gl.set_auto_layout(x_row.to(gl.int64) * x_stride + k, LOAD_X)
    q_at = _first_units(q_ptr, tile, tiles, units, W, C, WORDS, LOAD_Q)
    s_at = _first_rows(s_ptr, tile, tiles, groups, W, LOAD_S)
    t_at, z_at = q_at, s_at
    if WIDTH == 3:
        t_at = _first_units(top_ptr, tile, tiles, units, W, C, UNIT, LOAD_T)
    if ZEROS:
        z_at = _first_rows(z_ptr, tile, tiles, groups, W, LOAD_S)

    ring, sources = (xs, qs, ts, ss, zs), (x_at, q_at, t_at, s_at, z_at)
    for i in gl.static_range(STAGES - 1):
        if i < steps:
            _ask(ring, sources, i, start + i, STEPS, WIDTH, UNIT, ZEROS, C)
        async_copy.commit_group()

    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    v = _operand(qs, ts, ss, zs, 0, A, DTYPE, WIDTH, UNIT, ZEROS, C, W, LOAD_Q, LOAD_T)
    acc = gl.zeros([W * 16, N], gl.float32, ACC)
    before = v
    for i in range(0, steps, 2 if DEEP else 1):
        for half in gl.static_range(2 if DEEP else 1):
            # While the product of this step runs: the next step's weights, and a copy into what
            # the step before has left. DEEP: that one may still run when this one is started.
            at = i + half
            acc = warpgroup_mma(v, xs.index(at % STAGES).permute((1, 0)), acc, is_async=True)
            if DEEP:
                acc, before = warpgroup_mma_wait(1, [acc, before])
            async_copy.wait_group(STAGES - 3)
            fence_async_shared()
            ahead = at + STAGES - 1
            if ahead < steps:
                _ask(ring, sources, ahead % STAGES, start + ahead, STEPS, WIDTH, UNIT, ZEROS, C)
            async_copy.commit_group()
            next_stage = (at + 1) % STAGES
            following = _operand(
                qs, ts, ss, zs, next_stage, A, DTYPE, WIDTH, UNIT, ZEROS, C, W, LOAD_Q, LOAD_T
            )  # fmt: skip
            if DEEP:
                before, v = v, following
            else:
                acc, v = warpgroup_mma_wait(0, [acc, following])  # to be made before the wait
    if DEEP:
        acc, before = warpgroup_mma_wait(0, [acc, before])

    output = gl.set_auto_layout(gl.arange(0, W * 16), gl.SliceLayout(1, ACC))
    row = gl.set_auto_layout(gl.arange(0, N), gl.SliceLayout(0, ACC))
    output = gl.expand_dims(output, 1) + tile * (W * 16)
    row = gl.expand_dims(row, 0) + first
    mask = (row < rows) & (output < outputs)
    at = (row + gl.program_id(2) * rows).to(gl.int64) * y_stride + output
    gl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def add_parts_kernel(parts_ptr, y_ptr, count, SPLITS: gl.constexpr):
    """Y = the sum of [SPLITS, …] float32 over the first axis, in order; 1024 values a program."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    at = gl.program_id(0) * 1024 + gl.set_auto_layout(gl.arange(0, 1024), LAYOUT)
    total = gl.zeros([1024], gl.float32, LAYOUT)
    for part in gl.static_range(SPLITS):
        total += gl.load(parts_ptr + part * count.to(gl.int64) + at, mask=at < count, other=0.0)
    gl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < count)
