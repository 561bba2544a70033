"""The product for few rows of activations: one program makes 16 R outputs from whole rows of W.

Its warps share the columns: each takes a stretch of K, unpacks it straight into operand A of
mma.m16n8k16 (layout.py), and multiplies it with the activations as operand B, so that 8 of them
cost what one does. The codes enter as whole numbers; a group's sum is float32 and is scaled there;
zero points z are taken off as z Σ x, a product with ones. At the end the warps' sums are added in
a fixed order. There is no second launch and no atomic: the same inputs give the same bits.

Weights are read some steps ahead, the first before the kernel that made x has ended (programmatic
dependent launch): they do not depend on it. A program may make several sets of outputs in turn,
reading ahead from one into the next.

Legend as in layout.py; W warps, N activations, a step is C units for each warp.
"""

# ruff: noqa: RUF005 (what is jitted knows no unpacking into a tuple)
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from pocketlm.runtime.kernels.triton import ptx
from pocketlm.runtime.kernels.triton.unpack import copy_ahead, halves, unpack

LOAD_8, LOAD_16, LOAD_32 = (gl.constexpr(ptx.load(kind)) for kind in ("s8", "u16", "u32"))


@gluon.jit
def _units(q_ptr, tile, tiles, step, units, live, EVEN: gl.constexpr, R: gl.constexpr,
           C: gl.constexpr, W: gl.constexpr, WORDS: gl.constexpr):  # fmt: skip
    """The units of one step, [W, R, C, words of 32 bits]; read only if `live`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, WORDS // 32], [1, 1, 1, 32], [W, 1, 1, 1], [3, 2, 1, 0]
    )
    w = gl.arange(0, W)[:, None, None, None]
    r = gl.arange(0, R)[None, :, None, None]
    c = gl.arange(0, C)[None, None, :, None]
    word = gl.arange(0, WORDS)[None, None, None, :]
    r = gl.minimum(r, tiles - 1 - tile * R)  # the last program may have fewer
    unit = (step * W + w) * C + c
    base = q_ptr + (tile * R).to(gl.int64) * units * WORDS
    at = gl.set_auto_layout((r * units + unit) * WORDS + word, LAYOUT)
    if EVEN:
        return gl.load(base + at, mask=live, eviction_policy="evict_first")
    mask = gl.set_auto_layout((unit < units) & (r >= 0) & (word >= 0), LAYOUT) & live
    return gl.load(base + at, mask=mask, other=0, eviction_policy="evict_first")


@gluon.jit
def _per_group(s_ptr, tile, tiles, step, groups, live, STEPS: gl.constexpr, EVEN: gl.constexpr,
               R: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """Scales or zero points of a step's groups, [W, 16 R]: the bits that are stored, as int32.

    What goes round the loop are whole registers: halves of them would be put together as soon as
    they are there, and the loop would wait for what it has just asked for.
    """
    w = gl.arange(0, W)[:, None]
    row = gl.arange(0, R * 16)[None, :]
    group = (step * W + w) // STEPS
    at = gl.minimum(tile * R + row // 16, tiles - 1) * groups * 16 + group * 16 + row % 16
    at = gl.set_auto_layout(at, gl.SliceLayout(2, MMA))
    mask = gl.set_auto_layout((group < groups) & (row >= 0), gl.SliceLayout(2, MMA)) & live
    BITS: gl.constexpr = s_ptr.dtype.element_ty.primitive_bitwidth
    return gl.inline_asm_elementwise(
        LOAD_32 if BITS == 32 else LOAD_16 if BITS == 16 else LOAD_8, "=r,l,r",
        [s_ptr + at, mask.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _number(bits, like):
    """Scales as float32, from their bits."""
    if like.dtype.element_ty == gl.bfloat16:
        return (bits << 16).to(gl.float32, bitcast=True)
    if like.dtype.element_ty == gl.float16:
        return bits.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _activations(x_ptr, step, rows, columns, stride, EVEN: gl.constexpr, W: gl.constexpr,
                 K: gl.constexpr, N: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """The activations of a step as operand B, [W, K, N]."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    w = gl.arange(0, W)[:, None, None]
    k = gl.arange(0, K)[None, :, None]
    n = gl.arange(0, N)[None, None, :]
    first = (step * W + w) * K
    # In two parts, of which the second is known at compile time: it goes into the instruction.
    pointers = x_ptr + gl.set_auto_layout(n * stride + first + k % 8, OPERAND)
    pointers += gl.set_auto_layout(k // 8 * 8 + 0 * n + 0 * w, OPERAND)
    mask = (n < rows) & (first + k >= 0)
    if not EVEN:
        mask = mask & (first + k < columns)
    return gl.load(pointers, mask=gl.set_auto_layout(mask, OPERAND), other=0)


@gluon.jit
def _copy_activations(xs, x_ptr, step, rows, columns, stride, W: gl.constexpr, K: gl.constexpr,
                      N: gl.constexpr):  # fmt: skip
    """Starts to copy the activations of a step, [W, N, K]."""
    LANES: gl.constexpr = K // 8 if K < 256 else 32  # along a row
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 32 // LANES, LANES], [W, 1, 1], [2, 1, 0]
    )
    w = gl.arange(0, W)[:, None, None]
    n = gl.arange(0, N)[None, :, None]
    k = gl.arange(0, K)[None, None, :]
    # Beyond the rows the first are read again, beyond the columns the last: what they make is not
    # stored, or times 0. One row for all would be fetched in turn.
    column = gl.minimum((step * W + w) * K, columns - K) + k
    at = gl.set_auto_layout((n % rows) * stride + column, LAYOUT)
    copy_ahead(xs, x_ptr + at)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["rows"])
def decode_kernel(
    x_ptr, q_ptr, top_ptr, s_ptr, z_ptr, y_ptr,
    rows, columns, outputs, units, groups, x_stride, y_stride,
    STEPS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr, ZEROS: gl.constexpr,
    EVEN: gl.constexpr, R: gl.constexpr, C: gl.constexpr, W: gl.constexpr, N: gl.constexpr,
    AHEAD: gl.constexpr, SHARED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Y [M, O] = x [M, I] Wᵀ for M ≤ N; program i makes outputs 16 R i to 16 R (i + 1), and with
    fewer programs than tiles those of every P-th set of tiles from there on.

    AHEAD: steps whose weights are under way; divides their number. SHARED: activations come
    through shared memory, copied one step ahead: for more than a few of them. PDL: the kernel
    behind this one may start as soon as all programs run, and this one did so itself.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8]
    )
    WORDS: gl.constexpr = UNIT * (2 if WIDTH == 3 else WIDTH) // 2  # of a unit, 32 bits each
    TOP: gl.constexpr = UNIT // 2  # words of its high bits
    K: gl.constexpr = C * UNIT
    program, programs = gl.program_id(0), gl.num_programs(0)
    tiles, steps = gl.cdiv(outputs, 16), gl.cdiv(units, C * W)
    sets = gl.cdiv(tiles, R)
    qs, tops, ss, zs = (), (), (), ()
    for i in gl.static_range(AHEAD):
        qs += (_units(q_ptr, program, tiles, i, units, True, EVEN, R, C, W, WORDS),)
        if WIDTH == 3:
            tops += (_units(top_ptr, program, tiles, i, units, True, EVEN, R, C, W, TOP),)
        ss += (_per_group(s_ptr, program, tiles, i, groups, True, STEPS, EVEN, R, W, MMA),)
        if ZEROS:
            zs += (_per_group(z_ptr, program, tiles, i, groups, True, STEPS, EVEN, R, W, MMA),)
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; // $0", "=r", [],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    if SHARED:
        XS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
        xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2, W, N, K], XS)
        _copy_activations(xs.index(0), x_ptr, 0, rows, columns, x_stride, W, K, N)
    ones = gl.full([W, 16, K], 1.0, x_ptr.dtype.element_ty, gl.DotOperandLayout(0, MMA, 2))
    copied = 0
    for tile in range(program, sets, programs):
        total = gl.zeros([W, R * 16, N], gl.float32, MMA)
        for first in range(0, steps, AHEAD):
            for i in gl.static_range(AHEAD):
                step = first + i
                q, s = halves(qs[i]), _number(ss[i], s_ptr)
                top = q
                if WIDTH == 3:
                    top = halves(tops[i])
                same = step + AHEAD < steps  # the step that comes AHEAD is of the same tiles
                at = gl.where(same, tile, tile + programs)
                ahead = gl.where(same, step + AHEAD, i)
                live = at < sets
                next_q = _units(q_ptr, at, tiles, ahead, units, live, EVEN, R, C, W, WORDS)
                qs = qs[:i] + (next_q,) + qs[i + 1 :]
                if WIDTH == 3:
                    next_top = _units(
                        top_ptr, at, tiles, ahead, units, live, EVEN, R, C, W, UNIT // 2
                    )
                    tops = tops[:i] + (next_top,) + tops[i + 1 :]
                next_s = _per_group(
                    s_ptr, at, tiles, ahead, groups, live, STEPS, EVEN, R, W, MMA
                )  # fmt: skip
                ss = ss[:i] + (next_s,) + ss[i + 1 :]
                if SHARED:
                    _copy_activations(
                        xs.index((copied + 1) % 2), x_ptr, gl.where(step + 1 < steps, step + 1, 0),
                        rows, columns, x_stride, W, K, N,
                    )  # fmt: skip
                    async_copy.wait_group(1)
                    b = xs.index(copied % 2).permute((0, 2, 1))
                    b = b.load(gl.DotOperandLayout(1, MMA, 2))
                    copied += 1
                else:
                    b = _activations(x_ptr, step, rows, columns, x_stride, EVEN, W, K, N, MMA)
                a = unpack(q, top, b, WIDTH, UNIT, R, C, W)
                a = gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
                part = mma_v2(a, b, gl.zeros([W, R * 16, N], gl.float32, MMA))
                if ZEROS:
                    z = zs[i].to(gl.float32)  # a whole number
                    next_z = _per_group(
                        z_ptr, at, tiles, ahead, groups, live, STEPS, EVEN, R, W, MMA
                    )  # fmt: skip
                    zs = zs[:i] + (next_z,) + zs[i + 1 :]
                    sums = mma_v2(ones, b, gl.zeros([W, 16, N], gl.float32, MMA))
                    if R > 1:
                        sums = gl.sum(sums, 1, keep_dims=True) * 0.0625
                    part -= gl.expand_dims(z, 2) * sums
                total += part * gl.expand_dims(s, 2)
        if SHARED:
            async_copy.wait_group(0)  # what is still copied must not meet what the sum puts there
        y = gl.sum(total, 0)
        output = gl.set_auto_layout(
            tile * (R * 16) + gl.arange(0, R * 16)[:, None] + 0 * gl.arange(0, N)[None, :],
            gl.SliceLayout(0, MMA),
        )
        row = gl.set_auto_layout(
            gl.arange(0, N)[None, :] + 0 * gl.arange(0, R * 16)[:, None], gl.SliceLayout(0, MMA)
        )
        mask = (row < rows) & (output < outputs)
        gl.store(y_ptr + row * y_stride + output, y.to(y_ptr.dtype.element_ty), mask=mask)
