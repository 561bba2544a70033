"""The text of the inline PTX: packed codes → 16-bit floats, a pair at a time, in registers.

Exponent trick: the bits of a code, put into the mantissa of a float whose unit in the last place
is 1, make that float 128 + u (bfloat16, 0x4300) or 1024 + u (float16, 0x6400). One ``lop3`` masks
a pair of codes and sets both exponents; one fused multiply-add takes the constant and half the
range off again. A code that lies n bits further up, but still in the mantissa, needs no shift: its
float is 128 + 2ⁿ u, and the multiply-add scales it. Every step is exact.

An 8-bit code has one bit too many for bfloat16's mantissa: its low 7 bits and its high bit make two
floats, 128 + u₇ and 128 (2 - u₈), and their difference is the signed code.

Plain text, so that it can be read, and tested, without Triton. Only ``fma`` takes bf16x2 before
compute capability 9.0.
"""

from __future__ import annotations

import struct

AND_OR = "0xEA"  # lop3: (a & b) | c
NOT_AND_OR = "0xAE"  # lop3: (~a & b) | c
KINDS = BF16, FP16 = "bf16x2", "f16x2"
ONE = {BF16: 128, FP16: 1024}  # the float whose unit in the last place is 1
MANTISSA = {BF16: 7, FP16: 10}  # bits


def pair(kind: str, value: float) -> str:
    """Twice the same float, as an immediate."""
    if kind == FP16:
        bits = int.from_bytes(struct.pack("<e", value), "little")
    else:
        bits = int.from_bytes(struct.pack("<f", value), "little") >> 16
    return f"0x{bits * 0x00010001:08X}"


def low(kind: str, width: int) -> str:
    """Two words of 16 bits, in register n = 16 / width, → n pairs of floats."""
    lines = ["{ .reg .b32 s, v, f, m;"]
    for field in range(16 // width):
        place = field % (MANTISSA[kind] // width)
        lines += _masked(kind, width, field, place, f"${16 // width}")
        lines += _finished(kind, width, width * place, f"${field}")
    return " ".join([*lines, "}"])


def three(kind: str, parity: int) -> str:
    """Low bits ($8), and a word of high bits ($9) whose half of number `parity` belongs to them."""
    lines = ["{ .reg .b32 s, v, f, m, h;"]
    for field in range(8):
        place = field % ((MANTISSA[kind] - 1) // 2)  # a bit is left for the high one
        lines += _masked(kind, 2, field, place, "$8")
        lines.append(_shift("h", "$9", field + 8 * parity - 2 - 2 * place))
        lines.append(f"lop3.b32 v, h, {_both(4 << 2 * place)}, v, {AND_OR};")
        lines += _finished(kind, 3, 2 * place, f"${field}")
    return " ".join([*lines, "}"])


def eight(kind: str) -> str:
    """Two words of 16 bits ($2) → a pair of the low bytes, a pair of the high ones."""
    lines = ["{ .reg .b32 s, v, f, m, h;"]
    magic, minus = pair(kind, ONE[kind]), pair(kind, -1)
    for field in range(2):
        lines.append(_shift("s", "$2", 8 * field))
        if kind == FP16:
            lines.append(f"lop3.b32 v, s, {_both(0xFF)}, {magic}, {AND_OR};")
            lines += _finished(kind, 8, 0, f"${field}")
            continue
        lines.append(f"lop3.b32 h, s, {_both(0x80)}, {magic}, {NOT_AND_OR};")
        lines.append(f"lop3.b32 v, s, {_both(0x7F)}, {magic}, {AND_OR};")
        lines.append(f"mov.b32 m, {minus}; fma.rn.{kind} ${field}, h, m, v;")
    return " ".join([*lines, "}"])


def scale(kind: str, zeros: bool) -> str:
    """Pairs ($1) times scales ($2), a zero point ($3) taken off before where there is one."""
    lines = ["{ .reg .b32 v, m, none;", f"mov.b32 none, {pair(kind, -0.0)};"]  # adds nothing
    lines.append(f"mov.b32 m, {pair(kind, -1)};")
    lines.append(f"fma.rn.{kind} v, $3, m, $1;" if zeros else "mov.b32 v, $1;")
    lines.append(f"fma.rn.{kind} $0, v, $2, none;")
    return " ".join([*lines, "}"])


def load(kind: str) -> str:
    """A number from memory that does not change ($1) into a whole register, if $2 is above 0."""
    lines = ["{ .reg .pred p;", "setp.gt.s32 p, $2, 0;", "mov.b32 $0, 0;"]
    return " ".join([*lines, f"@p ld.global.nc.{kind} $0, [$1];", "}"])


def registers(results: int, arguments: int) -> str:
    """Constraints of that many registers; a result is written before the last argument is read."""
    return ",".join(["=&r"] * results + ["r"] * arguments)


def _masked(kind: str, width: int, field: int, place: int, word: str) -> list[str]:
    """A field, read at the place-th field of the mantissa, with its exponent, in v.

    The word is shifted, into s, for the first place only.
    """
    mask = _both(((1 << width) - 1) << (width * place))
    lines = [] if place else [_shift("s", word, width * field)]
    return [*lines, f"lop3.b32 v, s, {mask}, {pair(kind, ONE[kind])}, {AND_OR};"]


def _finished(kind: str, width: int, bits_up: int, to: str) -> list[str]:
    """From v = ONE + 2^bits_up u to u - 2^(width - 1)."""
    scale, half = 2.0**-bits_up, 1 << (width - 1)
    return [
        f"mov.b32 f, {pair(kind, scale)};",
        f"mov.b32 m, {pair(kind, -(ONE[kind] * scale + half))};",
        f"fma.rn.{kind} {to}, v, f, m;",
    ]


def _both(mask: int) -> str:
    return f"0x{mask * 0x00010001:08x}"


def _shift(to: str, word: str, bits: int) -> str:
    """To the right; to the left where `bits` is negative."""
    if bits == 0:
        return f"mov.b32 {to}, {word};"
    return f"{'shr.u32' if bits > 0 else 'shl.b32'} {to}, {word}, {abs(bits)};"
