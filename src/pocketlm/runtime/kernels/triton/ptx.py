"""The text of the inline PTX: packed codes → 16-bit floats, a pair at a time, in registers.

Exponent trick: the bits of a code, put into the mantissa of a float whose unit in the last place
is 1, make that float 128 + u (bfloat16, 0x4300) or 1024 + u (float16, 0x6400). One ``lop3`` masks
a pair of codes and sets both exponents; one fused multiply-add takes the constant and half the
range off again. Every step is exact. An 8-bit code has one bit too many for bfloat16's mantissa:
its low 7 bits and its high bit make two floats, 128 + u₇ and 128 (2 - u₈), and their difference
is the signed code.

Plain text, so that it can be read, and tested, without Triton. Only ``fma`` takes bf16x2 before
compute capability 9.0.
"""

from __future__ import annotations

AND_OR = "0xEA"  # lop3: (a & b) | c
NOT_AND_OR = "0xAE"  # lop3: (~a & b) | c
KINDS = BF16, FP16 = "bf16x2", "f16x2"
MAGIC = {BF16: "0x43004300", FP16: "0x64006400"}
ONE = {BF16: "0x3F803F80", FP16: "0x3C003C00"}
MINUS_ONE = {BF16: "0xBF80BF80", FP16: "0xBC00BC00"}
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


def low(kind: str, bits: int) -> str:
    """Two words of 16 bits, in register n = 16 / bits, → n pairs of floats."""
    count, lines = 16 // bits, _open(kind, bits)
    mask = f"0x{((1 << bits) - 1) * 0x00010001:08x}"
    for field in range(count):
        lines.append(_shift("s", f"${count}", bits * field))
        lines.append(f"lop3.b32 s, s, {mask}, {MAGIC[kind]}, {AND_OR};")
        lines.append(f"fma.rn.{kind} ${field}, s, one, minus;")
    return " ".join([*lines, "}"])


def three(kind: str, parity: int) -> str:
    """Low bits ($8), and a word of high bits ($9) whose half of number `parity` belongs to them."""
    lines = _open(kind, 3)
    for field in range(8):
        lines.append(_shift("s", "$8", 2 * field))
        lines.append(_shift("h", "$9", field + 8 * parity - 2))  # the high bit to place 2
        lines.append(f"lop3.b32 s, s, 0x00030003, {MAGIC[kind]}, {AND_OR};")
        lines.append(f"lop3.b32 s, h, 0x00040004, s, {AND_OR};")
        lines.append(f"fma.rn.{kind} ${field}, s, one, minus;")
    return " ".join([*lines, "}"])


def eight(kind: str) -> str:
    """Two words of 16 bits ($2) → a pair of the low bytes, a pair of the high ones."""
    lines = _open(kind, 8)
    for field in range(2):
        lines.append(_shift("s", "$2", 8 * field))
        if kind == FP16:
            lines.append(f"lop3.b32 s, s, 0x00ff00ff, {MAGIC[kind]}, {AND_OR};")
            lines.append(f"fma.rn.{kind} ${field}, s, one, minus;")
            continue
        lines.append(f"mov.b32 minus, {MINUS_ONE[kind]};")
        lines.append(f"lop3.b32 h, s, 0x00800080, {MAGIC[kind]}, {NOT_AND_OR};")
        lines.append(f"lop3.b32 s, s, 0x007f007f, {MAGIC[kind]}, {AND_OR};")
        lines.append(f"fma.rn.{kind} ${field}, h, minus, s;")
    return " ".join([*lines, "}"])


def scale(kind: str, zeros: bool) -> str:
    """Pairs ($1) times scales ($2), a zero point ($3) taken off before where there is one."""
    lines = ["{ .reg .b32 s, minus, none;", "mov.b32 none, 0x80008000;"]  # -0: adds nothing
    lines.append(f"mov.b32 minus, {MINUS_ONE[kind]};")
    lines.append(f"fma.rn.{kind} s, $3, minus, $1;" if zeros else "mov.b32 s, $1;")
    lines.append(f"fma.rn.{kind} $0, s, $2, none;")
    return " ".join([*lines, "}"])


def registers(results: int, arguments: int) -> str:
    """Constraints of that many registers; a result is written before the last argument is read."""
    return ",".join(["=&r"] * results + ["r"] * arguments)
