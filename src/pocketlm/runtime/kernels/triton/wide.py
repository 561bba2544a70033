"""The product for very many rows of activations: prefill.py's arithmetic, fed by the copy engine.

Two warpgroups make 64 outputs each for the same N activations. A warpgroup unpacks the next step's
weights into operand A while two of its products are under way; the two do not wait for each other,
only for the ring, which the first of them keeps filled through the bulk copy engine (TMA).

Work is shared out as in "Stream-K" (Osama et al., 2023, arXiv:2301.03598, section 4): the steps of
all tiles stand in one row, and each of as many programs as there are multiprocessors takes an equal
stretch. Who has a tile's first step owns it; programs behind it leave their sums in memory, and the
owner adds them in their order, so that results do not depend on timing.

Legend as in layout.py; K = C UNIT columns of a step, N activations of a tile of 128 outputs.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pocketlm.runtime.kernels.triton.unpack import scaled, unpack


@gluon.jit
def _stretch(program, steps):
    """The program's first step and the one after its last: whole pairs, nearly equal."""
    pairs = steps // 2
    programs = gl.num_programs(0)
    return pairs * program // programs * 2, pairs * (program + 1) // programs * 2


@gluon.jit
def _ask(sources, ring, work, now, wanted, STEPS: gl.constexpr, WIDTH: gl.constexpr,
         ZEROS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Asks for the tiles of step `now`, if it is wanted."""
    x, q, t, s, z = sources
    xs, qs, ts, ss, zs, full, _ = ring
    first, _, steps, token_tiles, _ = work
    N: gl.constexpr = x.block_shape[0]
    K: gl.constexpr = x.block_shape[1]
    ROWS: gl.constexpr = q.block_shape[0]  # tiles of 16
    ONE: gl.constexpr = ROWS * (16 * (s.dtype.primitive_bitwidth // 8) + 4 * q.block_shape[1])
    TOP: gl.constexpr = ROWS * 4 * t.block_shape[1] if WIDTH == 3 else 0
    ZERO: gl.constexpr = ROWS * 16 * (z.dtype.primitive_bitwidth // 8) if ZEROS else 0
    at = first + now
    tile, step = at // steps, at % steps
    row, token, group = tile // token_tiles * ROWS, tile % token_tiles * N, step // STEPS * 16
    slot = now % STAGES
    ready = full.index(slot)
    mbarrier.expect(ready, 2 * N * K + ONE + TOP + ZERO, pred=wanted)
    tma.async_copy_global_to_shared(x, [token, step * K], ready, xs.index(slot), pred=wanted)
    word = step * q.block_shape[1]
    tma.async_copy_global_to_shared(q, [row, word], ready, qs.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(s, [row, group], ready, ss.index(slot), pred=wanted)
    if WIDTH == 3:
        word = step * t.block_shape[1]
        tma.async_copy_global_to_shared(t, [row, word], ready, ts.index(slot), pred=wanted)
    if ZEROS:
        tma.async_copy_global_to_shared(z, [row, group], ready, zs.index(slot), pred=wanted)


@gluon.jit
def _of_rows(shared, HALF: gl.constexpr, R: gl.constexpr, A: gl.constexpr, like: gl.constexpr):
    """Scales or zero points of the rows of operand A, [64 R, 1], in the dtype `like`."""
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    line = shared._reinterpret(shared.dtype, [2, 64 * R], LINES).index(HALF)
    return gl.expand_dims(line.load(gl.SliceLayout(1, A)).to(gl.float32).to(like), 1)


@gluon.jit
def _words(shared, HALF: gl.constexpr, R: gl.constexpr, WORDS: gl.constexpr, C: gl.constexpr):
    """Codes of a warpgroup, int16 [4 R, 1, C, WORDS / C]."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LOAD: gl.constexpr = gl.BlockedLayout([1, WORDS // C // 32], [1, 32], [4, 1], [1, 0])
    value = shared._reinterpret(gl.int16, [2, 4 * R, WORDS], PLAIN).index(HALF).load(LOAD)
    return gl.reshape(value, [4 * R, 1, C, WORDS // C])


@gluon.jit
def _operand(qs, ts, ss, zs, slot, HALF: gl.constexpr, R: gl.constexpr, A: gl.constexpr,
             DTYPE: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr, ZEROS: gl.constexpr,
             C: gl.constexpr):  # fmt: skip
    """A warpgroup's weights of a step as operand A, [64 R, C UNIT]."""
    q = _words(qs.index(slot), HALF, R, C * UNIT * (2 if WIDTH == 3 else WIDTH), C)
    s = _of_rows(ss.index(slot), HALF, R, A, DTYPE)
    top, z = q, s
    if WIDTH == 3:
        top = _words(ts.index(slot), HALF, R, C * UNIT, C)
    if ZEROS:
        z = _of_rows(zs.index(slot), HALF, R, A, DTYPE)
    v = unpack(q, top, s, WIDTH, UNIT, 1, C, 4 * R)
    v = gl.convert_layout(gl.reshape(v, [64 * R, C * UNIT]), A, assert_trivial=True)
    return scaled(v, s, z, ZEROS)


@gluon.jit
def _halves(value):
    """[O, X] → two of [O, X / 2]; nothing is moved."""
    O: gl.constexpr = value.shape[0]  # noqa: E741
    X: gl.constexpr = value.shape[1]
    return gl.split(gl.permute(gl.reshape(value, [O, 2, X // 2]), [0, 2, 1]))


@gluon.jit
def _leave(acc, part_ptr, COLUMN: gl.constexpr, N: gl.constexpr):
    """Sums of a warpgroup into memory, [64 R, N] float32."""
    if acc.shape[0] * acc.shape[1] > 2048:
        low, high = _halves(acc)
        _leave(low, part_ptr, COLUMN, N)
        _leave(high, part_ptr, COLUMN + acc.shape[1] // 2, N)
    else:
        L: gl.constexpr = acc.type.layout
        output = gl.expand_dims(gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, L)), 1)
        row = gl.expand_dims(gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, L)), 0)
        gl.store(part_ptr + output * N + COLUMN + row, acc)


@gluon.jit
def _finish(acc, part_ptr, behind, y_ptr, outputs, rows, y_stride, COLUMN: gl.constexpr,
            N: gl.constexpr):  # fmt: skip
    """Results of a warpgroup, with the sums of `behind` programs, which lie one after the other."""
    if acc.shape[0] * acc.shape[1] > 2048:
        low, high = _halves(acc)
        _finish(low, part_ptr, behind, y_ptr, outputs, rows, y_stride, COLUMN, N)
        _finish(high, part_ptr, behind, y_ptr, outputs, rows, y_stride,
                COLUMN + acc.shape[1] // 2, N)  # fmt: skip
    else:
        L: gl.constexpr = acc.type.layout
        X: gl.constexpr = acc.shape[1]
        output = gl.expand_dims(gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, L)), 1)
        row = gl.expand_dims(gl.arange(0, X, layout=gl.SliceLayout(0, L)), 0)
        for one in range(behind):
            acc += gl.load(part_ptr + one * (2 * acc.shape[0] * N) + output * N + COLUMN + row)
        LINES: gl.constexpr = acc.shape[0] // 8
        STORE: gl.constexpr = gl.BlockedLayout([8, 1], [LINES, 32 // LINES], [1, 4], [0, 1])
        y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), STORE)
        output = gl.expand_dims(gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, STORE)), 1)
        row = gl.expand_dims(gl.arange(0, X, layout=gl.SliceLayout(0, STORE)), 0) + COLUMN
        mask = (output < outputs) & (row < rows)
        gl.store(y_ptr + row.to(gl.int64) * y_stride + output, y, mask=mask)


@gluon.jit
def _multiply(y_ptr, parts_ptr, flags_ptr, rows, outputs, y_stride, sources, ring, work,
              HALF: gl.constexpr, STEPS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr,
              ZEROS: gl.constexpr, C: gl.constexpr, R: gl.constexpr, N: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """The part of a warpgroup: half of the outputs of a tile."""
    xs, qs, ts, ss, zs, full, empty = ring
    first, last, steps, token_tiles, all_steps = work
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    now, count = 0, last - first
    mbarrier.wait(full.index(0), 0)
    v = _operand(qs, ts, ss, zs, 0, HALF, R, A, DTYPE, WIDTH, UNIT, ZEROS, C)
    before = v
    while now < count:
        tile, step = (first + now) // steps, (first + now) % steps
        taken = gl.minimum(steps - step, count - now)
        acc = gl.zeros([64 * R, N], gl.float32, ACC)
        for _ in range(0, taken, 2):
            for _half in gl.static_range(2):
                # A product is under way while the next step's weights are unpacked; they may take
                # the registers of the one before it, which has to have ended.
                acc = warpgroup_mma(v, xs.index(now % STAGES).permute((1, 0)), acc, is_async=True)
                acc, before = warpgroup_mma_wait(1, [acc, before])
                mbarrier.arrive(empty.index((now + STAGES - 1) % STAGES), count=1, pred=now > 0)
                if HALF == 0:
                    # What both have left two steps ago is filled again.
                    left = now - 2
                    wanted = (left >= 0) & (left + STAGES < count)
                    stage = (now + STAGES - 2) % STAGES
                    mbarrier.wait(empty.index(stage), left // STAGES & 1, pred=wanted)
                    _ask(sources, ring, work, left + STAGES, wanted, STEPS, WIDTH, ZEROS, STAGES)
                ahead = gl.minimum(now + 1, count - 1)
                mbarrier.wait(full.index(ahead % STAGES), (ahead // STAGES) & 1)
                following = _operand(
                    qs, ts, ss, zs, ahead % STAGES, HALF, R, A, DTYPE, WIDTH, UNIT, ZEROS, C
                )  # fmt: skip
                before, v = v, following
                now += 1
        acc, before = warpgroup_mma_wait(0, [acc, before])
        part = (gl.program_id(0) * 2 + HALF).to(gl.int64)
        if step == 0:
            behind = 0
            reach = tile * steps + steps
            if taken < steps:
                begin, end = _stretch(gl.program_id(0) + 1, all_steps)
                while begin < reach:
                    behind += 1
                    while gl.atomic_add(flags_ptr + part + 2 * behind, 0, sem="acquire") == 0:
                        pass
                    begin = end
                    _, end = _stretch(gl.program_id(0) + behind + 1, all_steps)
            output = (tile // token_tiles * 2 + HALF) * (64 * R)
            row = tile % token_tiles * N
            _finish(
                acc, parts_ptr + (part + 2) * (64 * R * N), behind,
                y_ptr + row.to(gl.int64) * y_stride + output,
                outputs - output, rows - row, y_stride, 0, N,
            )  # fmt: skip
        else:
            _leave(acc, parts_ptr + part * (64 * R * N), 0, N)
            gl.thread_barrier()
            gl.atomic_add(flags_ptr + part, 1, sem="release")


@gluon.jit(do_not_specialize=["rows", "token_tiles", "steps"])
def wide_kernel(
    x, q, t, s, z, y_ptr, parts_ptr, flags_ptr, rows, outputs, steps, token_tiles, y_stride,
    STEPS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr, ZEROS: gl.constexpr,
    C: gl.constexpr, R: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Y [M, O] = x [M, I] Wᵀ, of an even number of `steps`; as many programs as fit.

    `parts_ptr` [programs, 2, 64 R, N] float32 is scratch, `flags_ptr` [programs, 2] int32 zeros.
    """
    K: gl.constexpr = C * UNIT
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, N, K], x.layout)
    qs = gl.allocate_shared_memory(q.dtype, [STAGES, 8 * R, q.block_shape[1]], q.layout)
    ss = gl.allocate_shared_memory(s.dtype, [STAGES, 8 * R, 16], s.layout)
    ts, zs = qs, ss
    if WIDTH == 3:
        ts = gl.allocate_shared_memory(t.dtype, [STAGES, 8 * R, t.block_shape[1]], t.layout)
    if ZEROS:
        zs = gl.allocate_shared_memory(z.dtype, [STAGES, 8 * R, 16], z.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    all_steps = gl.cdiv(outputs, 128 * R) * token_tiles * steps
    first, last = _stretch(gl.program_id(0), all_steps)
    sources = (x, q, t, s, z)
    ring = (xs, qs, ts, ss, zs, full, empty)
    work = (first, last, steps, token_tiles, all_steps)
    for now in gl.static_range(STAGES):
        _ask(sources, ring, work, now, now < last - first, STEPS, WIDTH, ZEROS, STAGES)
    gl.warp_specialize(
        [
            (_multiply, (y_ptr, parts_ptr, flags_ptr, rows, outputs, y_stride, sources, ring, work,
                         0, STEPS, WIDTH, UNIT, ZEROS, C, R, N, STAGES)),
            (_multiply, (y_ptr, parts_ptr, flags_ptr, rows, outputs, y_stride, sources, ring, work,
                         1, STEPS, WIDTH, UNIT, ZEROS, C, R, N, STAGES)),
        ],
        [4],
        [256],
    )  # fmt: skip
