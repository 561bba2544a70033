"""What the codes of each number format mean, and the nearest level of a value: one place for all.

A level is what a code stands for before its scale: an integer, an E2M1 or E4M3 float, an entry of a
table. `rounder` gives the one rounding that every method uses; `codes_of` and `levels_of` go from
levels to stored codes and back.

- int: level = code - zero.
- float: E2M1 (OCP Microscaling Formats 1.0: 0, ½, 1, 1½, 2, 3, 4, 6) and E4M3 (OCP 8-bit Floating
  Point 1.0: up to 448); ties to the even mantissa, as compressed-tensors and IEEE 754 round.
- nf: the quantiles of QLoRA (arXiv:2305.14314, eq. 4 and appendix E; NF2 and NF3 by the same rule).
- bnb_fp: FP4 of bitsandbytes, whose bit patterns are in the order of its table. Between two levels
  of a table the midpoint goes to the lower one, as in bitsandbytes.
- iq4_nl: the 16 integers of llama.cpp's IQ4_NL, closer together around zero.
- k: level = code - zero; the zero of a symmetric format is 2^(bits-1), that of an asymmetric one
  the minimum over the scale, no integer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from pocketlm.core.spec import QuantSpec

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by bit pattern; the fourth bit is the sign
NF2 = (-1.0, 0.0, 0.4358181655406952, 1.0)
NF3 = (
    -1.0, -0.5350227355957031, -0.24693143367767334, 0.0,
    0.1833374798297882, 0.38199394941329956, 0.6229857206344604, 1.0,
)  # fmt: skip
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF = {2: NF2, 3: NF3, 4: NF4}
IQ4_NL = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
    1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
BNB_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)  # as E2M1: sign apart

E4M3_MAX = 448.0
# bits → mantissa bits, smallest step, largest level
_MINIFLOATS = {4: (1, 0.5, 6.0), 8: (3, 2.0**-9, E4M3_MAX)}
_ONE_EXPONENT = 1 << 23  # of a float32's bits
_EXPONENT_BITS = 0x7F800000
LEAST_DIVISOR = 1e-38  # below it a scale has no float32 reciprocal; so in bitsandbytes

Rounder = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def largest_level(spec: QuantSpec) -> float:
    """The largest magnitude of a level; the scale of a tile is its largest weight over this."""
    if spec.type == "int" or (spec.type == "k" and spec.symmetric):
        return float(-spec.code_min)
    if spec.type == "k":
        return float((1 << spec.bits) - 1)
    if spec.type == "iq4_nl":
        return -IQ4_NL[0]
    return _MINIFLOATS[spec.bits][2] if spec.type == "float" else 1.0


def mirrored(spec: QuantSpec) -> bool:
    """Whether the levels are the same with all signs turned; if not, a negative scale may pay."""
    return spec.type in ("float", "bnb_fp")


def level_ends(spec: QuantSpec) -> tuple[float, float]:
    """The lowest and the highest level, zero points apart."""
    if spec.type == "int" or (spec.type == "k" and spec.symmetric):
        return float(spec.code_min), float(spec.code_max)
    if spec.type == "k":
        return 0.0, largest_level(spec)
    if spec.type == "iq4_nl":
        return IQ4_NL[0], IQ4_NL[-1]
    return -largest_level(spec), largest_level(spec)


def minifloat(spec: QuantSpec) -> tuple[int, float, float]:
    """Of a float format: mantissa bits, smallest step, largest level."""
    return _MINIFLOATS[spec.bits]


def table(spec: QuantSpec) -> Tensor:
    """The distinct levels of a format with a table, rising, float32, on the CPU."""
    return _sorted_table(spec.type, spec.bits)[0]


def level_gap(x: Tensor, spec: QuantSpec) -> Tensor:
    """How far apart the two levels are that lie around values, or nearest to those beyond the ends.

    Args:
        x: float32, in levels: a weight over its scale.
        spec: The number format.

    Returns:
        Distances in levels, of the shape of `x`; 1 for integers.
    """
    if spec.type in ("int", "k"):
        return torch.ones_like(x)
    if spec.type == "float":
        mantissa_bits, least_step, largest = _MINIFLOATS[spec.bits]
        return _step(x.clamp(-largest, largest), mantissa_bits, least_step)
    table = _sorted_table(spec.type, spec.bits)[0].to(x.device)
    above = torch.bucketize(x, table, out_int32=True).clamp_(1, len(table) - 1).flatten()
    distances = table.diff()
    return distances.index_select(0, above - 1).view(x.shape)


def rounder(spec: QuantSpec) -> Rounder:
    """The rounding of a number format: nearest(x, scale, zero) → level, x ≈ scale · level.

    `scale` and `zero` broadcast against `x`; the zero point is None where there is none. Values
    beyond the largest level become it. Works on float32 (float64 for integers too).
    """
    if spec.type == "int" or (spec.type == "k" and spec.symmetric):
        return _integer_rounder(spec.code_min, spec.code_max)
    if spec.type == "k":
        return _minimum_rounder(1 << spec.bits)
    if spec.type == "float":
        return _minifloat_rounder(*_MINIFLOATS[spec.bits])
    return _table_rounder(spec)


def _integer_rounder(code_min: int, code_max: int) -> Rounder:
    def nearest(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        level = torch.round(x / scale)
        if zero is None:
            return level.clamp_(code_min, code_max)
        return level.add_(zero).clamp_(code_min, code_max).sub_(zero)

    return nearest


def _minimum_rounder(codes: int) -> Rounder:
    def nearest(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        assert zero is not None
        return (x / scale).add_(zero).round_().clamp_(0, codes - 1).sub_(zero)

    return nearest


def _minifloat_rounder(mantissa_bits: int, least_step: float, largest: float) -> Rounder:
    def nearest(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        level = (x / scale).clamp_(-largest, largest)
        step = _step(level, mantissa_bits, least_step)
        return level.div_(step).round_().mul_(step)

    return nearest


def _step(level: Tensor, mantissa_bits: int, least_step: float) -> Tensor:
    """2^(exponent - mantissa bits), the exponent taken from float32's bits."""
    least = int(torch.tensor(least_step).view(torch.int32))
    step = (level.view(torch.int32) & _EXPONENT_BITS).sub_(mantissa_bits * _ONE_EXPONENT)
    return step.clamp_(min=least).view(torch.float32)


def _table_rounder(spec: QuantSpec) -> Rounder:
    table, _ = _sorted_table(spec.type, spec.bits)
    bounds = (table[:-1] + table[1:]) / 2

    def nearest(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        nonlocal table, bounds
        table, bounds = table.to(x.device), bounds.to(x.device)
        # bitsandbytes multiplies by the reciprocal; a quotient differs at the midpoints.
        usable = torch.where(scale.abs() < LEAST_DIVISOR, LEAST_DIVISOR, scale)
        scaled = (x * usable.reciprocal()).contiguous()
        place = torch.bucketize(scaled, bounds, out_int32=True)
        return table.index_select(0, place.flatten()).view(place.shape)

    return nearest


@lru_cache(maxsize=8)
def _code_table(kind: str, bits: int) -> Tensor:
    """The levels of a table by code, float32 [2^bits], on the CPU."""
    if kind == "nf":
        return torch.tensor(NF[bits])
    if kind == "iq4_nl":
        return torch.tensor(IQ4_NL)
    half = torch.tensor({"float": E2M1, "bnb_fp": BNB_FP4}[kind])
    return torch.cat([half, -half])


@lru_cache(maxsize=8)
def _sorted_table(kind: str, bits: int) -> tuple[Tensor, Tensor]:
    """The distinct levels of a table in rising order, and the code of each (zero as +0)."""
    table = _code_table(kind, bits)
    order = torch.argsort(table, stable=True)
    if kind not in ("nf", "iq4_nl"):
        order = order[order != 8]  # minus zero
    return table[order], order.to(torch.uint8)


def codes_of(level: Tensor, spec: QuantSpec, zero: Tensor | None = None) -> Tensor:
    """The codes that are stored for levels.

    Args:
        level: What `rounder` gives, of any shape.
        spec: The number format.
        zero: Zero points that broadcast against the levels, of an asymmetric grid.

    Returns:
        int8 for integers, else uint8: the bit pattern, each in a byte of its own.
    """
    if spec.type == "int":
        return (level if zero is None else level + zero).to(torch.int8)
    if spec.type == "k":
        return (level + (-spec.code_min if zero is None else zero)).round().to(torch.uint8)
    if spec.bits == 8:
        return level.to(torch.float8_e4m3fn).view(torch.uint8)
    if spec.type == "float":
        half = torch.tensor(E2M1, device=level.device)
        magnitude = level.abs().contiguous()
        place = torch.bucketize(magnitude, (half[:-1] + half[1:]) / 2, out_int32=True)
        return (place + 8 * torch.signbit(level)).to(torch.uint8)
    table, codes = (t.to(level.device) for t in _sorted_table(spec.type, spec.bits))
    place = torch.bucketize(level.contiguous(), (table[:-1] + table[1:]) / 2, out_int32=True)
    return codes.index_select(0, place.flatten()).view(place.shape)


def levels_of(codes: Tensor, spec: QuantSpec, zero: Tensor | None = None) -> Tensor:
    """The levels, float32, that codes stand for: the inverse of `codes_of`.

    Of "k" with minima and no zero given these are the codes themselves.
    """
    if spec.type == "int":
        return codes.float() if zero is None else codes.float() - zero
    if spec.type == "k":
        shift = -spec.code_min if spec.symmetric else 0
        return codes.float() - (shift if zero is None else zero)
    if spec.bits == 8:
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    table = _code_table(spec.type, spec.bits).to(codes.device)
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
