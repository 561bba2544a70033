"""The blocks in which GGUF files hold weights, bit by bit, by llama.cpp's names of the types.

A row is cut into blocks of 32 or 256 weights; a block is a few bytes: float16 scales, integers that
scale and shift its groups, codes. Narrow fields are spread over bytes in lanes: a run of `width`
bytes holds as many values of each lane, one lane in the lowest bits, the next above it.

Checked against the dequantization of the `gguf` package, bit for bit (layouts: ggml-common.h).

Legend: N blocks, n weights of a block, G groups of a block, B bytes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.core.errors import ArtifactError
from pocketlm.core.scales import Scale
from pocketlm.core.tensors import Packed, PackedFloat, PackedInt
from pocketlm.formats.gguf_types import SPECS, block_bytes, block_weights, row_bytes

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
POWERS_OF_3 = (81, 27, 9, 3, 1)


@dataclass(frozen=True)
class Blocks:
    """The fields of N blocks.

    Attributes:
        codes: uint8 [N, n], from 0 on.
        d: float16 [N, 1]; of MXFP4 a uint8.
        m: float16 [N, 1], of types with minima: what is added (Q4_1, Q5_1), or what the integers of
            the minima multiply.
        scales: uint8 [N, G], the bits of the groups' integers.
        minima: uint8 [N, G].
    """

    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None


def encode(weight: Packed, kind: str) -> Tensor:
    """The bytes of a weight that is in the number format of a type, or is held by it exactly.

    Args:
        weight: Codes and scales [O, I]; integers of a narrower code, or of wider groups, fit too.
        kind: The type.

    Returns:
        uint8 [O, bytes of a row].

    Raises:
        ArtifactError: If the type's blocks do not divide the columns, or a code does not fit.
    """
    rows, columns = weight.shape
    row = row_bytes(kind, columns)
    blocks = _from_int(weight, kind) if isinstance(weight, PackedInt) else _from_k(weight, kind)
    return _pack(kind, blocks).view(rows, row)


def decode(data: Tensor, kind: str) -> Packed:
    """The weight in the bytes of some rows, uint8 [O, bytes of a row]: the inverse of `encode`."""
    rows = data.shape[0]
    blocks = _unpack(kind, data.reshape(-1, block_bytes(kind)))
    spec, codes = SPECS[kind], blocks.codes
    if spec.type == "int":
        if kind in ("TQ1_0", "TQ2_0"):  # codes 0 to 3 stand for -1 to 2: the scale turns its sign
            return PackedInt(
                1 - codes.view(rows, -1).to(torch.int8), -blocks.d.view(rows, -1), None, 2
            )
        signed = (codes.to(torch.int16) + spec.code_min).to(torch.int8)
        return PackedInt(signed.view(rows, -1), blocks.d.view(rows, -1), None, spec.bits)
    return PackedFloat(codes.view(rows, -1), _scale_of(blocks, kind, rows), spec)


def _scale_of(blocks: Blocks, kind: str, rows: int) -> Scale:
    spec, d = SPECS[kind], blocks.d.view(rows, -1)
    if kind == "MXFP4":
        return Scale("e8m0", d)
    if blocks.scales is None:
        return Scale("float", d, minimum_RG=None if blocks.m is None else -blocks.m.view(rows, -1))
    scales = blocks.scales.view(torch.int8) if kind == "Q6_K" else blocks.scales.to(torch.int8)
    if kind == "Q3_K":
        scales = scales - 32
    if spec.symmetric or blocks.minima is None or blocks.m is None:
        return Scale("k", scales.view(rows, -1), d)
    minima = blocks.minima.view(rows, -1)
    return Scale("k", scales.view(rows, -1), d, None, minima, blocks.m.view(rows, -1))


def _from_int(weight: PackedInt, kind: str) -> Blocks:
    """Integers: a code is shifted to start from 0, a scale repeated in each block it spans."""
    spec, n = SPECS[kind], block_weights(kind)
    level = weight.codes_OI.to(torch.int16)
    size = weight.group_size
    repeat, left = divmod(size, n)
    if left:
        raise ArtifactError(f"groups of {size} are no whole blocks of {kind}.")
    scale_OG = weight.scale_OG.repeat_interleave(repeat, 1)
    minimum = None
    if kind in ("Q4_1", "Q5_1"):
        zero_OG = torch.zeros_like(weight.scale_OG) if weight.zero_OG is None else weight.zero_OG
        shift = 1 << (weight.bits - 1)
        added_OG = -weight.scale_OG.float() * (zero_OG.float() + shift)
        codes, low = level + shift, 0
        minimum = added_OG.repeat_interleave(repeat, 1).half().view(-1, 1)
    else:
        if weight.zero_OG is not None:
            level = level - weight.zero_OG.to(torch.int16).repeat_interleave(size, 1)
        low = spec.code_min
        codes = level - low
        if kind in ("TQ1_0", "TQ2_0"):
            codes, scale_OG = 1 - level, -scale_OG
    most = 2 if kind == "TQ1_0" else (1 << spec.bits) - 1
    if int(codes.min()) < 0 or int(codes.max()) > most:
        raise ArtifactError(f"a code does not fit {kind}.")
    return Blocks(codes.to(torch.uint8).view(-1, n), scale_OG.half().view(-1, 1), minimum)


def _from_k(weight: PackedFloat, kind: str) -> Blocks:
    """Codes of llama.cpp's own number formats, and MXFP4."""
    if weight.spec != SPECS[kind]:
        raise ArtifactError(f"{weight.spec.name} is not what {kind} holds.")
    scale, n = weight.scale, block_weights(kind)
    codes = weight.codes_OI.reshape(-1, n)
    if scale.kind != "k":
        minima = scale.minimum_RG
        added = None if minima is None else -minima.reshape(-1, 1)
        return Blocks(codes, scale.stored_RG.reshape(-1, 1), added)
    assert scale.outer is not None
    groups = n // (weight.spec.group_size or n)
    stored = scale.stored_RG.reshape(-1, groups)
    if kind == "Q3_K":
        stored = stored + 32
    fields = stored.contiguous().view(torch.uint8)
    if scale.minimum_RG is None or scale.outer_minimum is None:
        return Blocks(codes, scale.outer.reshape(-1, 1), None, fields)
    minima = scale.minimum_RG.reshape(-1, groups)
    return Blocks(
        codes, scale.outer.reshape(-1, 1), scale.outer_minimum.reshape(-1, 1), fields, minima
    )


def _join(values: Tensor, bits: int, width: int) -> Tensor:
    """Narrow values [N, n] in lanes, uint8 [N, n · bits / 8]."""
    lanes_NLw = values.reshape(values.shape[0], -1, 8 // bits, width)
    out = torch.zeros_like(lanes_NLw[:, :, 0])
    for lane in range(8 // bits):
        out |= lanes_NLw[:, :, lane] << (bits * lane)
    return out.reshape(values.shape[0], -1)


def _split(data: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `_join`."""
    runs = data.reshape(data.shape[0], -1, 1, width)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    values = (runs >> shifts[:, None]) & ((1 << bits) - 1)
    return values.reshape(data.shape[0], -1)


def _raw(halves: Tensor) -> Tensor:
    """float16 [N, 1] as bytes [N, 2]."""
    return halves.contiguous().to(torch.float16).view(torch.uint8)


def _join_six(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes (Q4_K, Q5_K)."""
    low, high = (values.chunk(2, 1) for values in (scales, minima))
    return torch.cat(
        [
            low[0] | ((low[1] >> 4) << 6),
            high[0] | ((high[1] >> 4) << 6),
            (low[1] & 0xF) | ((high[1] & 0xF) << 4),
        ],
        1,
    )


def _split_six(data: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_join_six`."""
    first, second, rest = data.chunk(3, 1)
    scales = torch.cat([first & 0x3F, (rest & 0xF) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 0x3F, (rest >> 4) | ((second >> 6) << 4)], 1)
    return scales, minima


def _join_ternary(codes: Tensor) -> Tensor:
    """256 codes from 0 to 2 in 52 bytes, five in one (TQ1_0): a fraction of 3^5 over 256."""
    runs = (codes[:, :160].reshape(-1, 5, 32), codes[:, 160:240].reshape(-1, 5, 16))
    last = codes[:, 240:].reshape(-1, 4, 4)
    out = []
    for run in (*runs, last):
        powers = torch.tensor(POWERS_OF_3[: run.shape[1]], device=codes.device)
        value = (run.to(torch.int64) * powers[:, None]).sum(1)
        out.append(-(value * -256 // 243))  # rounded up
    return torch.cat(out, 1).to(torch.uint8)


def _split_ternary(data: Tensor) -> Tensor:
    """The inverse of `_join_ternary`."""
    parts = []
    for run, count in ((data[:, :32], 5), (data[:, 32:48], 5), (data[:, 48:], 4)):
        powers = torch.tensor(POWERS_OF_3[::-1][:count], device=data.device)
        scaled = (run[:, None].to(torch.int64) * powers[:, None]) & 0xFF
        parts.append(((scaled * 3) >> 8).reshape(data.shape[0], -1))
    return torch.cat(parts, 1).to(torch.uint8)


def _pack(kind: str, blocks: Blocks) -> Tensor:
    codes = blocks.codes
    if kind == "MXFP4":
        return torch.cat([blocks.d, _join(codes, 4, 16)], 1)
    d = _raw(blocks.d)
    m = d[:, :0] if blocks.m is None else _raw(blocks.m)
    if kind in ("Q4_0", "Q4_1", "IQ4_NL"):
        return torch.cat([d, m, _join(codes, 4, 16)], 1)
    if kind in ("Q5_0", "Q5_1"):
        return torch.cat([d, m, _join(codes >> 4, 1, 1), _join(codes & 0xF, 4, 16)], 1)
    if kind == "Q8_0":
        return torch.cat([d, codes ^ 0x80], 1)  # two's complement
    if kind == "TQ1_0":
        return torch.cat([_join_ternary(codes), d], 1)
    if kind == "TQ2_0":
        return torch.cat([_join(codes, 2, 32), d], 1)
    scales = blocks.scales
    assert scales is not None
    if kind == "Q3_K":
        shifts = torch.cat([_join(scales & 0xF, 4, 8), _join(scales >> 4, 2, 4)], 1)
        return torch.cat([_join(codes >> 2, 1, 32), _join(codes & 3, 2, 32), shifts, d], 1)
    if kind == "Q6_K":
        return torch.cat([_join(codes & 0xF, 4, 64), _join(codes >> 4, 2, 32), scales, d], 1)
    assert blocks.minima is not None
    if kind == "Q2_K":
        return torch.cat([scales | (blocks.minima << 4), _join(codes, 2, 32), d, m], 1)
    high = _join(codes >> 4, 1, 32) if kind == "Q5_K" else d[:, :0]
    six = _join_six(scales, blocks.minima)
    return torch.cat([d, m, six, high, _join(codes & 0xF, 4, 32)], 1)


def _unpack(kind: str, data: Tensor) -> Blocks:
    def halves(start: int) -> Tensor:
        return data[:, start : start + 2].contiguous().view(torch.float16)

    if kind == "MXFP4":
        return Blocks(_split(data[:, 1:], 4, 16), data[:, :1])
    if kind in ("Q4_0", "IQ4_NL"):
        return Blocks(_split(data[:, 2:], 4, 16), halves(0))
    if kind == "Q4_1":
        return Blocks(_split(data[:, 4:], 4, 16), halves(0), halves(2))
    if kind in ("Q5_0", "Q5_1"):
        at = 4 if kind == "Q5_1" else 2
        codes = _split(data[:, at + 4 :], 4, 16) | (_split(data[:, at : at + 4], 1, 1) << 4)
        return Blocks(codes, halves(0), halves(2) if kind == "Q5_1" else None)
    if kind == "Q8_0":
        return Blocks(data[:, 2:] ^ 0x80, halves(0))
    if kind == "TQ1_0":
        return Blocks(_split_ternary(data[:, :52]), halves(52))
    if kind == "TQ2_0":
        return Blocks(_split(data[:, :64], 2, 32), halves(64))
    if kind == "Q3_K":
        codes = _split(data[:, 32:96], 2, 32) | (_split(data[:, :32], 1, 32) << 2)
        scales = _split(data[:, 96:104], 4, 8) | (_split(data[:, 104:108], 2, 4) << 4)
        return Blocks(codes, halves(108), None, scales)
    if kind == "Q6_K":
        codes = _split(data[:, :128], 4, 64) | (_split(data[:, 128:192], 2, 32) << 4)
        return Blocks(codes, halves(208), None, data[:, 192:208].contiguous())
    if kind == "Q2_K":
        scales, minima = data[:, :16] & 0xF, data[:, :16] >> 4
        return Blocks(_split(data[:, 16:80], 2, 32), halves(80), halves(82), scales, minima)
    scales, minima = _split_six(data[:, 4:16])
    codes = _split(data[:, -128:], 4, 32)
    if kind == "Q5_K":
        codes = codes | (_split(data[:, 16:48], 1, 32) << 4)
    return Blocks(codes, halves(0), halves(2), scales, minima)
