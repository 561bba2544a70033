"""Packed codes → 16-bit floats, a pair at a time, in registers (jitted; layout.py has the order).

Exponent trick: the bits of a code, put into the mantissa of a float whose unit in the last place
is 1, make that float 128 + u (bfloat16, 0x4300) or 1024 + u (float16, 0x6400). One ``lop3`` masks
a pair of codes and sets both exponents; one fused multiply-add takes the constant and half the
range off again. Every step is exact. An 8-bit code has one bit too many for bfloat16's mantissa:
its low 7 bits and its high bit make two floats, 128 + u₇ and 128 (2 - u₈), and their difference
is the signed code.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

AND_OR = "0xEA"  # lop3: (a & b) | c
NOT_AND_OR = "0xAE"  # lop3: (~a & b) | c
BF16, FP16 = "bf16x2", "f16x2"
MAGIC = {BF16: "0x43004300", FP16: "0x64006400"}
ONE = {BF16: "0x3F803F80", FP16: "0x3C003C00"}
# -(128 + half) or -(1024 + half), where half is 2^(width - 1), by width
MINUS = {
    BF16: {2: "0xC302C302", 3: "0xC304C304", 4: "0xC308C308"},
    FP16: {2: "0xE402E402", 3: "0xE404E404", 4: "0xE408E408", 8: "0xE480E480"},
}


def _open(kind: str, width: int) -> list[str]:
    lines = ["{ .reg .b32 s, h, one, minus;", f"mov.b32 one, {ONE[kind]};"]
    if width in MINUS[kind]:
        lines.append(f"mov.b32 minus, {MINUS[kind][width]};")
    return lines


def _shift(to: str, word: str, bits: int) -> str:
    if bits == 0:
        return f"mov.b32 {to}, {word};"
    return f"{'shr.u32' if bits > 0 else 'shl.b32'} {to}, {word}, {abs(bits)};"


def _low(kind: str, bits: int) -> str:
    """Two words of 16 bits, in register n = 16 / bits, → n pairs of floats."""
    count, lines = 16 // bits, _open(kind, bits)
    mask = f"0x{((1 << bits) - 1) * 0x00010001:08x}"
    for field in range(count):
        lines.append(_shift("s", f"${count}", bits * field))
        lines.append(f"lop3.b32 s, s, {mask}, {MAGIC[kind]}, {AND_OR};")
        lines.append(f"fma.rn.{kind} ${field}, s, one, minus;")
    return " ".join([*lines, "}"])


def _three(kind: str, parity: int) -> str:
    """Low bits ($8), and a word of high bits ($9) whose half of number `parity` belongs to them."""
    lines = _open(kind, 3)
    for field in range(8):
        lines.append(_shift("s", "$8", 2 * field))
        lines.append(_shift("h", "$9", field + 8 * parity - 2))  # the high bit to place 2
        lines.append(f"lop3.b32 s, s, 0x00030003, {MAGIC[kind]}, {AND_OR};")
        lines.append(f"lop3.b32 s, h, 0x00040004, s, {AND_OR};")
        lines.append(f"fma.rn.{kind} ${field}, s, one, minus;")
    return " ".join([*lines, "}"])


def _eight(kind: str) -> str:
    """Two words of 16 bits ($2) → a pair of the low bytes, a pair of the high ones."""
    lines = _open(kind, 8)
    for field in range(2):
        lines.append(_shift("s", "$2", 8 * field))
        if kind == FP16:
            lines.append(f"lop3.b32 s, s, 0x00ff00ff, {MAGIC[kind]}, {AND_OR};")
            lines.append(f"fma.rn.{kind} ${field}, s, one, minus;")
            continue
        lines.append("mov.b32 minus, 0xBF80BF80;")  # -1
        lines.append(f"lop3.b32 h, s, 0x00800080, {MAGIC[kind]}, {NOT_AND_OR};")
        lines.append(f"lop3.b32 s, s, 0x007f007f, {MAGIC[kind]}, {AND_OR};")
        lines.append(f"fma.rn.{kind} ${field}, h, minus, s;")
    return " ".join([*lines, "}"])


def _registers(results: int, arguments: int) -> str:
    return ",".join(["=&r"] * results + ["r"] * arguments)


BF16_2, FP16_2 = gl.constexpr(_low(BF16, 2)), gl.constexpr(_low(FP16, 2))
BF16_4, FP16_4 = gl.constexpr(_low(BF16, 4)), gl.constexpr(_low(FP16, 4))
BF16_8, FP16_8 = gl.constexpr(_eight(BF16)), gl.constexpr(_eight(FP16))
BF16_3E, FP16_3E = gl.constexpr(_three(BF16, 0)), gl.constexpr(_three(FP16, 0))
BF16_3O, FP16_3O = gl.constexpr(_three(BF16, 1)), gl.constexpr(_three(FP16, 1))
SUB_MUL_BF16 = gl.constexpr("{ sub.rn.bf16x2 $0, $1, $3; mul.rn.bf16x2 $0, $0, $2; }")
SUB_MUL_FP16 = gl.constexpr("{ sub.rn.f16x2 $0, $1, $3; mul.rn.f16x2 $0, $0, $2; }")
MUL_BF16 = gl.constexpr("mul.rn.bf16x2 $0, $1, $2;")
MUL_FP16 = gl.constexpr("mul.rn.f16x2 $0, $1, $2;")
REGISTERS_2, REGISTERS_3 = gl.constexpr(_registers(8, 1)), gl.constexpr(_registers(8, 2))
REGISTERS_4, REGISTERS_8 = gl.constexpr(_registers(4, 1)), gl.constexpr(_registers(2, 1))


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
            SUB_MUL_BF16 if BF else SUB_MUL_FP16, "=&r,r,r,r", [v, s, z],
            dtype=v.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return gl.inline_asm_elementwise(
        MUL_BF16 if BF else MUL_FP16, "=r,r,r", [v, s], dtype=v.dtype, is_pure=True, pack=2
    )
