"""The product for very many rows of activations: prefill.py's arithmetic, fed by the copy engine.

Two warpgroups make 64 outputs each for the same N activations. A warpgroup unpacks the weights of
the next step into operand A while the product of this one runs. The two do not wait for each other,
only for the ring, which the first of them keeps filled through the bulk copy engine (TMA).

Work is shared out as in "Stream-K" (Osama et al., 2023, arXiv:2301.03598, section 4): the steps of
all tiles stand in one row, and each of as many programs as there are multiprocessors takes an equal
stretch of them. Who has a tile's first step owns it; those behind it leave their sums in memory,
and the owner adds them in their order, so that results do not depend on timing. Stretches lie from
the end of the row to its start: a program waits only for such as were started before it.

Legend as in layout.py; K = C UNIT columns of a step, N activations of a tile of 128 outputs.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from functools import lru_cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pocketlm.runtime.kernels.triton.unpack import scaled, unpack


def in_tiles(values: Tensor, shape: list[int], swizzle: int = 0) -> TensorDescriptor:
    """A tensor as the copy engine reads it.

    Args:
        values: Its first axis makes rows, all others a row.
        shape: Of a tile, two axes.
        swizzle: Bytes over which rows are permuted in shared memory; 128 for operands of wgmma.
    """
    layout = _layout(swizzle, 8 * values.element_size())
    return TensorDescriptor.from_tensor(values.flatten(1), shape, layout)


@lru_cache
def _layout(swizzle: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle, bits, rank=2)


@gluon.jit
def _me():
    """The number of the program's stretch."""
    return gl.num_programs(0) - 1 - gl.program_id(0)


@gluon.jit
def _stretch(number, steps, unit):
    """Its first step and the one after its last: whole units of steps, nearly equal in number."""
    units, programs = steps // unit, gl.num_programs(0)
    return units * number // programs * unit, units * (number + 1) // programs * unit


@gluon.jit
def _ask(sources, ring, work, now, wanted, STEPS: gl.constexpr, WIDTH: gl.constexpr,
         ZEROS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Asks for the tiles of step `now`, if it is wanted."""
    x, q, s, z = sources
    xs, qs, ss, zs, full, _ = ring
    first, _, steps, token_tiles, _, _ = work
    N: gl.constexpr = x.block_shape[0]
    K: gl.constexpr = x.block_shape[1]
    ONE: gl.constexpr = 8 * (16 * (s.dtype.primitive_bitwidth // 8) + 4 * q.block_shape[1])
    ZERO: gl.constexpr = 8 * 16 * (z.dtype.primitive_bitwidth // 8) if ZEROS else 0
    at = first + now
    tile, step = at // steps, at % steps
    row, token, group = tile // token_tiles * 8, tile % token_tiles * N, step // STEPS * 16
    slot = now % STAGES
    ready = full.index(slot)
    mbarrier.expect(ready, 2 * N * K + ONE + ZERO, pred=wanted)
    tma.async_copy_global_to_shared(x, [token, step * K], ready, xs.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(
        q, [row, step * q.block_shape[1]], ready, qs.index(slot), pred=wanted
    )
    tma.async_copy_global_to_shared(s, [row, group], ready, ss.index(slot), pred=wanted)
    if ZEROS:
        tma.async_copy_global_to_shared(z, [row, group], ready, zs.index(slot), pred=wanted)


@gluon.jit
def _of_rows(shared, HALF: gl.constexpr, A: gl.constexpr, like: gl.constexpr):
    """Scales or zero points of the rows of operand A, [64, 1], in the dtype `like`."""
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    line = shared._reinterpret(shared.dtype, [2, 64], LINES).index(HALF)
    return gl.expand_dims(line.load(gl.SliceLayout(1, A)).to(gl.float32).to(like), 1)


@gluon.jit
def _words(shared, HALF: gl.constexpr, WORDS: gl.constexpr, C: gl.constexpr):
    """Codes of a warpgroup, int16 [4, 1, C, WORDS / C]."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LOAD: gl.constexpr = gl.BlockedLayout([1, WORDS // C // 32], [1, 32], [4, 1], [1, 0])
    value = shared._reinterpret(gl.int16, [2, 4, WORDS], PLAIN).index(HALF).load(LOAD)
    return gl.reshape(value, [4, 1, C, WORDS // C])


@gluon.jit
def _operand(ring, slot, HALF: gl.constexpr, A: gl.constexpr,
             DTYPE: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr, ZEROS: gl.constexpr,
             C: gl.constexpr):  # fmt: skip
    """A warpgroup's weights of a step as operand A, [64, C UNIT]."""
    _, qs, ss, zs, _, _ = ring
    q = _words(qs.index(slot), HALF, C * UNIT * WIDTH, C)
    s = _of_rows(ss.index(slot), HALF, A, DTYPE)
    z = s
    if ZEROS:
        z = _of_rows(zs.index(slot), HALF, A, DTYPE)
    v = unpack(q, q, s, WIDTH, UNIT, 1, C, 4)
    v = gl.convert_layout(gl.reshape(v, [64, C * UNIT]), A, assert_trivial=True)
    return scaled(v, s, z, ZEROS)


@gluon.jit
def _halves(value):
    """[64, X] → two of [64, X / 2]; nothing is moved."""
    X: gl.constexpr = value.shape[1]
    return gl.split(gl.permute(gl.reshape(value, [64, 2, X // 2]), [0, 2, 1]))


@gluon.jit
def _in_lanes(value):
    """[64, X] → [16 X, 4] such that a lane holds rows of four; nothing is moved."""
    X: gl.constexpr = value.shape[1]
    value = gl.reshape(value, [4, 2, 8, X // 8, 4, 2])  # w h r j l p, as in layout.py
    return gl.reshape(gl.permute(value, [3, 0, 2, 4, 1, 5]), [16 * X, 4])


@gluon.jit
def _in_rows(value):
    """The way back."""
    X: gl.constexpr = value.shape[0] // 16
    value = gl.reshape(value, [X // 8, 4, 8, 4, 2, 2])
    return gl.reshape(gl.permute(value, [1, 4, 2, 0, 3, 5]), [64, X])


@gluon.jit
def _numbers(like):
    """0, 1, 2 … in the shape and layout of a tensor [X, 4]."""
    L: gl.constexpr = like.type.layout
    four = gl.expand_dims(gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, L)) * 4, 1)
    return four + gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, L)), 0)


@gluon.jit
def _store(acc, y_ptr, outputs, rows, y_stride, COLUMN: gl.constexpr):
    """Results of a warpgroup for the activations from COLUMN on; by pieces of 16 registers."""
    X: gl.constexpr = acc.shape[1]
    if X > 32:
        low, high = _halves(acc)
        _store(low, y_ptr, outputs, rows, y_stride, COLUMN)
        _store(high, y_ptr, outputs, rows, y_stride, COLUMN + X // 2)
    else:
        STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
        y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), STORE)
        output = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, STORE)), 1)
        row = gl.expand_dims(gl.arange(0, X, layout=gl.SliceLayout(0, STORE)), 0) + COLUMN
        mask = (output < outputs) & (row < rows)
        gl.store(y_ptr + row.to(gl.int64) * y_stride + output, y, mask=mask)


@gluon.jit
def _finish(acc, part_ptr, behind, y_ptr, outputs, rows, y_stride, COLUMN: gl.constexpr,
            N: gl.constexpr):  # fmt: skip
    """Results of a warpgroup, with the sums of `behind` programs, which lie one after the other."""
    if acc.shape[1] == N:
        low, high = _halves(acc)  # registers hold no more than half of the other sums
        _finish(low, part_ptr, behind, y_ptr, outputs, rows, y_stride, 0, N)
        _finish(high, part_ptr, behind, y_ptr, outputs, rows, y_stride, N // 2, N)
    else:
        total = _in_lanes(acc)
        at = _numbers(total) + COLUMN * 64
        for one in range(behind):
            total += gl.load(part_ptr + one * (128 * N) + at)
        _store(_in_rows(total), y_ptr, outputs, rows, y_stride, COLUMN)


@gluon.jit
def _wait_behind(flag_ptr, reach, all_steps, unit):
    """How many stretches behind this one begin before step `reach`; their sums are there."""
    behind = 0
    begin, _ = _stretch(_me() + 1, all_steps, unit)
    while begin < reach:
        behind += 1
        while gl.atomic_add(flag_ptr + 2 * behind, 0, sem="acquire") == 0:
            pass
        begin, _ = _stretch(_me() + behind + 1, all_steps, unit)
    return behind


@gluon.jit
def _multiply(y_ptr, parts_ptr, flags_ptr, rows, outputs, y_stride, sources, ring, work,
              HALF: gl.constexpr, SHARED: gl.constexpr, STEPS: gl.constexpr, WIDTH: gl.constexpr,
              UNIT: gl.constexpr, ZEROS: gl.constexpr, C: gl.constexpr,
              N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The part of a warpgroup: half of the outputs of a tile."""
    xs, _, _, _, full, empty = ring
    first, last, steps, token_tiles, all_steps, unit = work
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    now, count = 0, last - first
    mbarrier.wait(full.index(0), 0)
    v = _operand(ring, 0, HALF, A, DTYPE, WIDTH, UNIT, ZEROS, C)
    before = v
    while now < count:
        tile, step = (first + now) // steps, (first + now) % steps
        taken = gl.minimum(steps - step, count - now)
        acc = gl.zeros([64, N], gl.float32, ACC)
        for _pair in range(0, taken, 2):
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
                    ring, ahead % STAGES, HALF, A, DTYPE, WIDTH, UNIT, ZEROS, C
                )  # fmt: skip
                before, v = v, following
                now += 1
        acc, before = warpgroup_mma_wait(0, [acc, before])
        output = (tile // token_tiles * 2 + HALF) * 64
        row = tile % token_tiles * N
        y_at = y_ptr + row.to(gl.int64) * y_stride + output
        if SHARED:
            part = (_me() * 2 + HALF).to(gl.int64)
            if step == 0:
                behind = _wait_behind(flags_ptr + part, tile * steps + steps, all_steps, unit)
                at = parts_ptr + (part + 2) * (64 * N)
                _finish(acc, at, behind, y_at, outputs - output, rows - row, y_stride, 0, N)
            else:
                mine = _in_lanes(acc)
                gl.store(parts_ptr + part * (64 * N) + _numbers(mine), mine)
                gl.thread_barrier()
                gl.atomic_add(flags_ptr + part, 1, sem="release")
        else:
            _store(acc, y_at, outputs - output, rows - row, y_stride, 0)


@gluon.jit(do_not_specialize=["rows", "token_tiles", "steps", "unit"])
def wide_kernel(
    x, q, s, z, y_ptr, parts_ptr, flags_ptr, rows, outputs, steps, token_tiles, unit, y_stride,
    SHARED: gl.constexpr, STEPS: gl.constexpr, WIDTH: gl.constexpr, UNIT: gl.constexpr,
    ZEROS: gl.constexpr, C: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Y [M, O] = x [M, I] Wᵀ, of an even number of `steps`; no more programs than units of work.

    A stretch consists of units of `unit` steps: 2, or all of a tile. SHARED: it is 2; `parts_ptr`
    [programs, 2, 64, N] float32 is scratch then, and `flags_ptr` [programs, 2] int32 zeros.
    """
    K: gl.constexpr = C * UNIT
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, N, K], x.layout)
    qs = gl.allocate_shared_memory(q.dtype, [STAGES, 8, q.block_shape[1]], q.layout)
    ss = gl.allocate_shared_memory(s.dtype, [STAGES, 8, 16], s.layout)
    zs = ss
    if ZEROS:
        zs = gl.allocate_shared_memory(z.dtype, [STAGES, 8, 16], z.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    all_steps = gl.cdiv(outputs, 128) * token_tiles * steps
    first, last = _stretch(_me(), all_steps, unit)
    sources = (x, q, s, z)
    ring = (xs, qs, ss, zs, full, empty)
    work = (first, last, steps, token_tiles, all_steps, unit)
    for now in gl.static_range(STAGES):
        _ask(sources, ring, work, now, now < last - first, STEPS, WIDTH, ZEROS, STAGES)
    gl.warp_specialize(
        [
            (_multiply, (y_ptr, parts_ptr, flags_ptr, rows, outputs, y_stride, sources, ring, work,
                         0, SHARED, STEPS, WIDTH, UNIT, ZEROS, C, N, STAGES)),
            (_multiply, (y_ptr, parts_ptr, flags_ptr, rows, outputs, y_stride, sources, ring, work,
                         1, SHARED, STEPS, WIDTH, UNIT, ZEROS, C, N, STAGES)),
        ],
        [4],
        [256],
    )  # fmt: skip
