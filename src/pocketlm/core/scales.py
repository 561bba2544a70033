"""The scales of a weight's tiles as they are stored, for number formats that are no integers.

kind          stored, one a tile      outer                   what it means
``float``     a 16- or 32-bit float   –                       itself
``e8m0``      uint8 e                 –                       2^(e - 127) (OCP Microscaling 1.0)
``e4m3``      float8_e4m3fn s         float32 [1]             s / outer (NVFP4, the divisor as in
                                                              compressed-tensors)
``dynamic8``  uint8 c                 float32 [⌈R·G / 256⌉]   map[c] · outer[block] + offset
                                                              (QLoRA, arXiv:2305.14314, section 3)
``k``         int8 s                  float16 [R, S]          s · outer[super-block] (llama.cpp)

Formats of llama.cpp without a zero point have a minimum of each tile, w = scale · code - minimum:
a float16 beside "float", an integer over another float16 of the super-block beside "k".

Legend: R tiles below each other, G tiles and S super-blocks of 256 columns beside each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pocketlm.core.levels import E4M3_MAX, LEAST_DIVISOR, largest_level
from pocketlm.core.spec import DOUBLE_BLOCK, QuantSpec, ScaleType

LEAST_E4M3 = 2.0**-9
E8M0_BIAS = 127
# Deviation: OCP Microscaling 1.0 takes the exponent of the largest weight; compressed-tensors takes
# the next one from 1.75 times the power of two on, and so do we, to be bit-equal to it.
E8M0_ROUNDS_UP_FROM = 1.75


@dataclass(frozen=True)
class Scale:
    """The scales of a weight as they are stored.

    Attributes:
        kind: What `stored_RG` is.
        stored_RG: One value a tile.
        outer: What several of them share; None for "float" and "e8m0".
        offset: float32 [1], what all of them share; "dynamic8" only.
        minimum_RG: One value a tile, as stored; None where the format has no minima.
        outer_minimum: What minima share; "k" only.
    """

    kind: ScaleType
    stored_RG: Tensor
    outer: Tensor | None = None
    offset: Tensor | None = None
    minimum_RG: Tensor | None = None
    outer_minimum: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """What multiplies the levels, float32 [stop - start, G], for some rows of tiles."""
        stored = self.stored_RG[start:stop]
        if self.kind == "float":
            return stored.to(torch.float32)
        if self.kind == "e8m0":
            return stored.view(torch.float8_e8m0fnu).to(torch.float32)
        assert self.outer is not None
        if self.kind == "k":
            return _times_outer(stored, self.outer[start:stop])
        if self.kind == "e4m3":
            return stored.to(torch.float32) / self.outer
        assert self.offset is not None
        columns = stored.shape[1]
        place = torch.arange(start * columns, stop * columns, device=stored.device)
        values = dynamic_map().to(stored.device).index_select(0, stored.flatten().to(torch.int32))
        values = values * self.outer[place // DOUBLE_BLOCK] + self.offset
        return values.view(stored.shape)

    def values_RG(self) -> Tensor:
        """What multiplies the levels, float32 [R, G]."""
        return self.rows(0, self.stored_RG.shape[0])

    def minima(self, start: int = 0, stop: int | None = None) -> Tensor | None:
        """What is taken off each weight, float32 [stop - start, G]; None where there is nothing."""
        if self.minimum_RG is None:
            return None
        stored = self.minimum_RG[start:stop]
        if self.outer_minimum is None:
            return stored.to(torch.float32)
        return _times_outer(stored, self.outer_minimum[start:stop])

    def values_OG(self, rows: int, spec: QuantSpec) -> Tensor:
        """The same for each row of the weight, float32 [O, G]."""
        return spread_rows(self.values_RG(), rows, spec)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is stored."""
        known = (self.stored_RG, self.outer, self.offset, self.minimum_RG, self.outer_minimum)
        return tuple(tensor for tensor in known if tensor is not None)

    @property
    def stored_bits(self) -> int:
        """Stored bits, everything counted."""
        return sum(t.numel() * t.element_size() * 8 for t in self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> Scale:
        """The same scales with a function applied to every tensor, such as a move."""
        rest = (self.outer, self.offset, self.minimum_RG, self.outer_minimum)
        moved = [None if tensor is None else function(tensor) for tensor in rest]
        return Scale(self.kind, function(self.stored_RG), *moved)


def _times_outer(stored_RG: Tensor, outer_RS: Tensor) -> Tensor:
    """Integers times the float16 of their super-block, float32 [R, G]."""
    rows, groups = stored_RG.shape
    stored_RSg = stored_RG.to(torch.float32).view(rows, outer_RS.shape[1], -1)
    return (stored_RSg * outer_RS.to(torch.float32)[:, :, None]).view(rows, groups)


def spread_rows(values_RG: Tensor, rows: int, spec: QuantSpec) -> Tensor:
    """A value for each tile → a value for each row of the weight, [R, G] → [O, G]."""
    if values_RG.shape[0] == rows:
        return values_RG
    if spec.group_rows is None:
        return values_RG.expand(rows, -1)
    return values_RG.repeat_interleave(spec.group_rows, 0)[:rows]


def tensor_divisor(absmax: Tensor, spec: QuantSpec) -> Tensor | None:
    """The float32 [1] that all "e4m3" scales of a tensor share; None for other scales.

    outer = 448 · 6 / absmax: the tile with the largest weight gets the largest scale, 448 (NVIDIA's
    recipe, as in compressed-tensors).

    Args:
        absmax: The largest magnitude of the weights that share it, of any shape.
        spec: The number format.
    """
    if spec.scale != "e4m3":
        return None
    most = absmax.amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    outer = E4M3_MAX * largest_level(spec) / most
    return torch.nan_to_num(outer, posinf=1.0).reshape(1)


def scale_for(
    absmax_RG: Tensor, spec: QuantSpec, dtype: torch.dtype, outer: Tensor | None = None
) -> Tensor:
    """The scale, float32 [R, G], at which the largest weight of each tile meets the largest level.

    Rounded as it will be stored, but for "dynamic8", which `stored` rounds for all tiles together.

    Args:
        absmax_RG: The largest magnitude in each tile.
        spec: The number format.
        dtype: In which a "float" scale is stored.
        outer: From `tensor_divisor`.
    """
    if spec.scale == "e8m0":
        # 2^e of absmax = m · 2^e with m in [1, 2), then the largest exponent of a level off it.
        mantissa, exponent = torch.frexp(absmax_RG.float())  # m in [1/2, 1)
        exponent = exponent - 1 + (2 * mantissa >= E8M0_ROUNDS_UP_FROM).int()
        exponent -= 2 if spec.bits == 4 else 8
        exponent = torch.where(absmax_RG > 0, exponent, -E8M0_BIAS)
        return _powers(exponent)
    return rounded_scale(absmax_RG.float() / largest_level(spec), spec, dtype, outer)


def rounded_scale(
    values_RG: Tensor, spec: QuantSpec, dtype: torch.dtype, outer: Tensor | None = None
) -> Tensor:
    """The storable scales nearest to some values, float32 [R, G].

    "e8m0" rounds in the logarithm; it and "e4m3" make what is not positive the least they hold.

    Args:
        values_RG: float32.
        spec: The number format.
        dtype: In which a "float" scale is stored.
        outer: From `tensor_divisor`.
    """
    if spec.scale == "float":
        least = smallest_scale(dtype)
        stored = values_RG.to(dtype)
        return torch.where(stored.abs() < least, least, stored).float()
    if spec.scale == "e8m0":
        mantissa, exponent = torch.frexp(values_RG)
        exponent = exponent - (mantissa < 0.5**0.5).int()
        return _powers(torch.where(values_RG > 0, exponent, -E8M0_BIAS))
    if spec.scale == "e4m3":
        assert outer is not None
        codes = (values_RG * outer).clamp(LEAST_E4M3, E4M3_MAX).to(torch.float8_e4m3fn)
        return codes.float() / outer
    return values_RG


def stored(
    values_RG: Tensor, spec: QuantSpec, dtype: torch.dtype, outer: Tensor | None = None
) -> Scale:
    """Scales as they are stored; exact for what `scale_for` and `rounded_scale` give.

    Args:
        values_RG: float32.
        spec: The number format.
        dtype: In which a "float" scale is stored.
        outer: From `tensor_divisor`.
    """
    if spec.scale == "float":
        return Scale("float", values_RG.to(dtype))
    if spec.scale == "e8m0":
        return Scale("e8m0", values_RG.to(torch.float8_e8m0fnu).view(torch.uint8))
    if spec.scale == "e4m3":
        assert outer is not None
        return Scale("e4m3", (values_RG * outer).to(torch.float8_e4m3fn), outer)
    return _double_quantized(values_RG)


def _powers(exponent: Tensor) -> Tensor:
    """2^exponent, float32, between the ends of E8M0 (255 stands for NaN)."""
    biased = (exponent + E8M0_BIAS).clamp(0, 254).to(torch.uint8)
    return biased.view(torch.float8_e8m0fnu).to(torch.float32)


def smallest_scale(dtype: torch.dtype) -> float:
    """The least magnitude a stored scale may have; float16 counts on its subnormals."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def _double_quantized(values_RG: Tensor) -> Scale:
    """Scales less their mean, in blocks of 256, each over its largest, on the dynamic map."""
    flat = values_RG.float().flatten()
    offset = flat.mean()
    blocks = -(-flat.numel() // DOUBLE_BLOCK)
    padded = flat.new_zeros(blocks * DOUBLE_BLOCK)
    padded[: flat.numel()] = flat - offset
    padded_BN = padded.view(blocks, DOUBLE_BLOCK)
    outer_B = padded_BN.abs().amax(1)
    table = dynamic_map().to(flat.device)
    normal_BN = padded_BN * outer_B.clamp(min=LEAST_DIVISOR).reciprocal()[:, None]
    codes_BN = torch.bucketize(normal_BN, (table[:-1] + table[1:]) / 2, out_int32=True)
    codes = codes_BN.to(torch.uint8).flatten()[: flat.numel()]
    return Scale("dynamic8", codes.view(values_RG.shape), outer_B, offset.reshape(1))


@lru_cache(maxsize=1)
def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type (arXiv:1511.04561), rising, on the CPU.

    One decade from 10^-6 to 1 after the other; each has twice the steps of the one below it, and
    the map holds the middles of the steps, their negatives, 0 and 1.
    """
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        decades.append(10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0))
    positive = torch.cat(decades)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values
