"""Packed codes → 16-bit floats in the order of operand A (jitted; ptx.py has the arithmetic,
layout.py the order).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from pocketlm.runtime.kernels.triton import ptx

# Triton 3.9 has renamed it.
copy_ahead = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)

BF16_2, FP16_2 = (gl.constexpr(ptx.low(kind, 2)) for kind in ptx.KINDS)
BF16_3E, FP16_3E = (gl.constexpr(ptx.three(kind, 0)) for kind in ptx.KINDS)
BF16_3O, FP16_3O = (gl.constexpr(ptx.three(kind, 1)) for kind in ptx.KINDS)
BF16_4, FP16_4 = (gl.constexpr(ptx.low(kind, 4)) for kind in ptx.KINDS)
BF16_8, FP16_8 = (gl.constexpr(ptx.eight(kind)) for kind in ptx.KINDS)
SCALE_BF16, SCALE_FP16 = (gl.constexpr(ptx.scale(kind, False)) for kind in ptx.KINDS)
SHIFT_SCALE_BF16, SHIFT_SCALE_FP16 = (gl.constexpr(ptx.scale(kind, True)) for kind in ptx.KINDS)
REGISTERS_2, REGISTERS_3 = gl.constexpr(ptx.registers(8, 1)), gl.constexpr(ptx.registers(8, 2))
REGISTERS_4, REGISTERS_8 = gl.constexpr(ptx.registers(4, 1)), gl.constexpr(ptx.registers(2, 1))
REGISTERS_SCALE = gl.constexpr(ptx.registers(1, 2))
REGISTERS_SHIFT_SCALE = gl.constexpr(ptx.registers(1, 3))


@gluon.jit
def halves(words):
    """Words of 32 bits → words of 16 bits, twice as many along the last axis."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True,
        pack=1,
    )  # fmt: skip
    S: gl.constexpr = words.shape
    return gl.reshape(gl.join(low, high), [S[0], S[1], S[2], 2 * S[3]])


@gluon.jit
def _join8(a, b, c, d, e, f, g, h):
    """Field 4 s + 2 k + h of each word → [.., h, k, s]."""
    return gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))


@gluon.jit
def unpack(q, top, like, WIDTH: gl.constexpr, UNIT: gl.constexpr, R: gl.constexpr,
           C: gl.constexpr, W: gl.constexpr):  # fmt: skip
    """Units of words of 16 bits → codes [W, 16 R, C UNIT] in the order of operand A.

    Args:
        q: Codes, int16 [W, R, C, words]; their two low bits where WIDTH is 3.
        top: The high bits where WIDTH is 3, [W, R, C, words / 2].
        like: Any tensor of the dtype of the result.
        WIDTH: Bits that a code takes.
        UNIT: Columns of a unit.
        R: Row tiles.
        C: Units of a row tile.
        W: Warps, or sets of 16 R rows.
    """
    BF: gl.constexpr = like.dtype == gl.bfloat16
    if WIDTH == 4:
        q = gl.reshape(q, [W, R, C, 8, 4, UNIT // 16, 2])
        a, b, c, d = gl.inline_asm_elementwise(
            BF16_4 if BF else FP16_4, REGISTERS_4, [q],
            dtype=(like.dtype,) * 4, is_pure=True, pack=2,
        )  # fmt: skip
        v = gl.join(gl.join(a, b), gl.join(c, d))
        v = gl.permute(v, [0, 1, 7, 3, 2, 5, 8, 4, 6])  # of W R C r l s p h k
    elif WIDTH == 8:
        q = gl.reshape(q, [W, R, C, 8, 4, UNIT // 8, 2])
        a, b = gl.inline_asm_elementwise(
            BF16_8 if BF else FP16_8, REGISTERS_8, [q],
            dtype=(like.dtype,) * 2, is_pure=True, pack=2,
        )  # fmt: skip
        v = gl.permute(gl.join(a, b), [0, 1, 7, 3, 2, 5, 4, 6])  # of W R C r l (s k) p h
    elif WIDTH == 2:
        q = gl.reshape(q, [W, R, C, 8, 4, UNIT // 32, 2])
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            BF16_2 if BF else FP16_2, REGISTERS_2, [q],
            dtype=(like.dtype,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
        v = _join8(a, b, c, d, e, f, g, h)
        v = gl.permute(v, [0, 1, 7, 3, 2, 5, 9, 8, 4, 6])  # of W R C r l s p h k s
    else:
        gl.static_assert(WIDTH == 3)
        q = gl.reshape(q, [W, R, C, 8, 4, UNIT // 64, 2, 2])
        even, odd = gl.split(gl.permute(q, [0, 1, 2, 3, 4, 5, 7, 6]))
        top = gl.reshape(top, [W, R, C, 8, 4, UNIT // 64, 2])
        top = gl.convert_layout(top, even.type.layout, assert_trivial=True)
        odd = gl.convert_layout(odd, even.type.layout, assert_trivial=True)
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            BF16_3E if BF else FP16_3E, REGISTERS_3, [even, top],
            dtype=(like.dtype,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
        i, j, k, l, m, n, o, p = gl.inline_asm_elementwise(  # noqa: E741
            BF16_3O if BF else FP16_3O, REGISTERS_3, [odd, top],
            dtype=(like.dtype,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
        v = gl.join(_join8(a, b, c, d, e, f, g, h), _join8(i, j, k, l, m, n, o, p))
        v = gl.permute(v, [0, 1, 7, 3, 2, 5, 10, 9, 8, 4, 6])  # of W R C r l s p h k s s
    return gl.reshape(v, [W, R * 16, C * UNIT])


@gluon.jit
def scaled(v, s, z, ZEROS: gl.constexpr):
    """(v - z) s, two at a time."""
    BF: gl.constexpr = v.dtype == gl.bfloat16
    if ZEROS:
        return gl.inline_asm_elementwise(
            SHIFT_SCALE_BF16 if BF else SHIFT_SCALE_FP16, REGISTERS_SHIFT_SCALE, [v, s, z],
            dtype=v.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return gl.inline_asm_elementwise(
        SCALE_BF16 if BF else SCALE_FP16, REGISTERS_SCALE, [v, s],
        dtype=v.dtype, is_pure=True, pack=2,
    )  # fmt: skip
