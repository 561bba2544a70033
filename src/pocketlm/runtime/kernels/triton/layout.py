"""How codes lie for the Triton kernels: in the order in which a tensor core's operand wants them.

A weight is cut into tiles of 16 rows, and a row of tiles into units of 32 to 128 columns. A unit
is what one warp loads at once: each of its 32 lanes takes 4 to 16 neighbouring bytes, and they
hold the very values that this lane has to bring to the instruction ``mma.m16n8k16``, operand A:

    lane 4 r + t holds rows r and r + 8, columns 2 t + p and 2 t + p + 8 of each 16, p in (0, 1).

So nothing is moved between lanes after loading. Inside a 32-bit word of a lane, the values p = 0
stand in the low half and p = 1 in the high half, so that one bit operation puts a pair where a
half2 or bf16x2 wants it. Codes of 3 bits are two planes: the two low bits, and the high bit.

Codes are stored without a sign, u = c + 2^(width - 1). The wgmma instruction wants the same order
of its operand A, 16 rows for each of four warps.

Legend: T tiles of 16 rows, C units, R = 8 and H = 2: row = 8 h + r; S steps of 16 columns, K = 2,
L = 4 and P = 2: column = 16 s + 8 k + 2 l + p; G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 16
PACKED_ROWS = 1024  # at once, whole tiles: words of 64 bits stand for codes on the way
LARGEST_UNIT = {2: 128, 3: 128, 4: 64, 8: 32}  # columns, by width: 16 bytes a lane (3: and 8)


def lane_bits(bits: int, group_size: int) -> int:
    """Bits that a code takes: 2, 3, 4 or 8. Halves of a word of high bits do not exist."""
    if bits == 3 and group_size % 64:
        return 4
    return bits if bits <= 4 else 8


def unit_columns(width: int, group_size: int) -> int:
    """The widest unit that groups are made of; 0 where none is."""
    candidates = (unit for unit in (128, 64, 32) if unit <= LARGEST_UNIT[width])
    return next((unit for unit in candidates if group_size % unit == 0), 0)


def pack_planes(codes_OI: Tensor, width: int, unit: int) -> list[Tensor]:
    """Signed codes in operand order.

    Args:
        codes_OI: int8, from -2^(width - 1) to 2^(width - 1) - 1.
        width: Bits that a code takes: 2, 3, 4 or 8.
        unit: Columns of a unit; divides I.

    Returns:
        One plane, int32 [T, C, 32, words], or two where width is 3. Rows beyond O are zeros.
    """
    parts = [_planes(part_oI, width, unit) for part_oI in codes_OI.split(PACKED_ROWS)]
    return [torch.cat(planes) for planes in zip(*parts, strict=True)]


def pack_groups(value_OG: Tensor) -> Tensor:
    """Scales or zero points [O, G] as [T, G, 16]."""
    value_OG = _whole_tiles(value_OG)
    groups = value_OG.shape[1]
    return value_OG.view(-1, TILE_ROWS, groups).transpose(1, 2).contiguous()


def _planes(codes_OI: Tensor, width: int, unit: int) -> list[Tensor]:
    unsigned_OI = _whole_tiles(codes_OI).to(torch.int32) + (1 << (width - 1))
    if width != 3:
        return [_plane(unsigned_OI, width, unit)]
    return [_plane(unsigned_OI & 3, 2, unit), _plane(unsigned_OI >> 2, 1, unit)]


def _whole_tiles(value_OX: Tensor) -> Tensor:
    missing = -value_OX.shape[0] % TILE_ROWS
    return torch.nn.functional.pad(value_OX, (0, 0, 0, missing))


def _plane(values_OI: Tensor, bits: int, unit: int) -> Tensor:
    """Values of `bits` bits as words, int32 [T, C, 32, words]."""
    rows, columns = values_OI.shape
    sides = (rows // 16, 2, 8, columns // unit, unit // 16, 2, 4, 2)  # T H R C S K L P
    ordered = values_OI.view(sides).permute(0, 3, 2, 6, 4, 5, 1, 7)  # T C R L S K H P
    fields = ordered.reshape(rows // 16, columns // unit, 32, -1, 16 // bits, 2)
    shifts = torch.arange(16 // bits, device=values_OI.device)[:, None] * bits
    shifts = shifts + torch.tensor([0, 16], device=values_OI.device)
    words = (fields.long() << shifts).sum((-1, -2))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
